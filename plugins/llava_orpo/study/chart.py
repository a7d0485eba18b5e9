"""The plot of a study: a panel per metric, a point and its interval per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .spec import as_word, text

# Okabe and Ito's palette (jfly.uni-koeln.de/color), which colour-blind readers tell apart.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#999999")
MARKERS = "osD^vP*X"
MOST_PANELS = 6
WIDTH, HEIGHT = 5.2, 3.4  # inches of a panel


def write(table: Mapping[str, Any], path: Path) -> None:
    """Writes the plot of a table (`results.table`) as SVG; the same table gives the same bytes."""
    import io

    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": table["study"], "font.size": 9}):
        out = io.StringIO()
        draw(table).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    write_atomic(path, out.getvalue())


def draw(table: Mapping[str, Any]):
    """The matplotlib Figure of a table; at most six metrics have a panel."""
    from matplotlib.figure import Figure

    names = list(table["metrics"])[:MOST_PANELS]
    axis = x_axis(table["rows"])
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    height = HEIGHT if axis else max(HEIGHT, 0.26 * len(table["rows"]) + 1.0)
    figure = Figure(figsize=(WIDTH * columns, height * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=False):
        if axis is None:
            _rows(panel, table["rows"], name)
        else:
            _lines(panel, table["rows"], name, axis)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:  # one for all panels, beside them: the intervals leave no room inside
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3 * columns), frameon=False)
    figure.supxlabel(table["interval"], fontsize=7, color="#555555")
    return figure


def x_axis(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The key on the horizontal axis: the one with most values that are numbers (null may be among them), if any."""
    best, most = None, 1
    for key in dict.fromkeys(key for row in rows for key in row["values"]):
        values = [row["values"].get(key) for row in rows]
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        others = [value for value in values if value is not None and value not in numbers]
        if not others and len(set(map(as_word, values))) > max(most, 1) and len(set(numbers)) > 1:
            best, most = key, len(set(map(as_word, values)))
    # A line per setting would be no line: where every row has a value of its own (a search), rows read better.
    return best if best and len({_others(row, best) for row in rows}) < len(rows) else None


def _lines(panel, rows: Sequence[Mapping[str, Any]], name: str, axis: str) -> None:
    ticks = list(dict.fromkeys(text(axis, row["values"][axis]) for row in rows))  # evenly spaced, in the study's order
    series = list(dict.fromkeys(_others(row, axis) for row in rows))
    for index, label in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * min(0.08, 0.5 / len(series))  # intervals beside one another
        points = [row for row in rows if _others(row, axis) == label and name in row["metrics"]]
        x = [ticks.index(text(axis, row["values"][axis])) + shift for row in points]
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "label": label or None}
        panel.errorbar(x, *_values(points, name), capsize=3, linewidth=1.4, elinewidth=1, markersize=5, **style)
    panel.set_xticks(range(len(ticks)), ticks)
    panel.set_xlim(-0.5, len(ticks) - 0.5)
    panel.set_xlabel(axis)
    panel.set_ylabel(name)


def _rows(panel, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    points = [(index, row) for index, row in enumerate(rows) if name in row["metrics"]]
    means, errors = _values([row for _, row in points], name)
    panel.errorbar(
        means, [index for index, _ in points], xerr=errors, fmt="o", capsize=3, color=COLORS[0], markersize=5
    )
    panel.set_yticks(range(len(rows)), [_others(row, None) or row["name"] for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    panel.set_xlabel(name)


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[list[float]]]:
    found = [row["metrics"][name] for row in rows]
    means = [one["mean"] for one in found]
    below = [max(0.0, one["mean"] - one["low"]) for one in found]
    return means, [below, [max(0.0, one["high"] - one["mean"]) for one in found]]


def _others(row: Mapping[str, Any], axis: str | None) -> str:
    """What a row varies beside the axis; the name of a variant stands alone."""
    shown = {key: text(key, value) for key, value in row["values"].items() if key != axis}
    return ", ".join(value if key == "variant" else f"{key}={value}" for key, value in shown.items())
