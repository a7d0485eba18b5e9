"""The report's charts as Bokeh figures; colours of light and dark are in templates/report.css."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from bokeh.models import (
    ColumnDataSource,
    FactorRange,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
    Whisker,
)
from bokeh.plotting import figure

from ..preference.records import ScoredPair

# Mid-tones that stand out on white and on near-black and differ for colour-blind readers.
BEFORE, AFTER, THIRD = "#8b95a1", "#2f86d6", "#e08a1e"
MAX_POINTS = 5000
REFERENCE_LINE = {"line_dash": "dashed", "line_color": BEFORE, "line_width": 1}


def lines(series: Sequence[dict], percent: bool = False, small: bool = False) -> figure:
    """Values over training steps; `small` values get an exponent.

    A series is {"label", "steps", "values", "color"} and, optionally, "low" and "high" (drawn as a band) and "dots",
    True for few, separate measurements. Dense curves are drawn faintly behind their moving mean.
    """
    plot = _figure("step", None, percent=percent)
    plot.xaxis.ticker.min_interval = 1  # no half steps
    if small:
        plot.yaxis.formatter = PrintfTickFormatter(format="%.1e")
    for one in series:
        source = ColumnDataSource({"step": one["steps"], "value": one["values"]})
        if "low" in one:
            plot.varea(one["steps"], one["low"], one["high"], fill_color=one["color"], fill_alpha=0.18)
        dense = len(one["steps"]) >= 60 and not one.get("dots")
        line = plot.line(
            "step",
            "value",
            source=source,
            line_color=one["color"],
            line_width=1 if dense else 2,
            line_alpha=0.35 if dense else 1.0,
        )
        if dense:
            steps, smooth = _moving_mean(one["steps"], one["values"])
            plot.line(steps, smooth, line_color=one["color"], line_width=2)
        if one.get("dots"):
            line = plot.scatter("step", "value", source=source, size=7, color=one["color"])
        value = "@value{0.0%}" if percent else "@value{0.0000}"
        if small:
            value = "@value{%.2e}"
        tooltips = [(one["label"], value), ("step", "@step")]
        formatters = {"@value": "printf" if small else "numeral"}
        plot.add_tools(HoverTool(renderers=[line], tooltips=tooltips, formatters=formatters, mode="vline"))
    return plot


def accuracy_by_group(rows: Sequence[dict]) -> figure:
    """A dot and its 95 % interval per group and side.

    A row is {"name", "label", "sides": [(side, n, accuracy, low, high, color)]}; the first row is drawn on top. `name`
    labels the axis and differs between rows; `label` is the full name, shown on hovering.
    """
    names = [row["name"] for row in rows][::-1]
    plot = _figure("preference accuracy", None, y_range=FactorRange(*names, range_padding=0.15))
    plot.x_range = Range1d(-0.02, 1.02)
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.xaxis.ticker = plot.xgrid.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 1])
    plot.yaxis.axis_line_color = plot.yaxis.major_tick_line_color = plot.ygrid.grid_line_color = None
    plot.height = 84 + 46 * len(rows)
    plot.vspan(x=[0.5], **REFERENCE_LINE)
    sides = len(rows[0]["sides"])
    for index in range(sides):
        shift = 0.0 if sides == 1 else (0.16, -0.16)[index]
        values = [(row["name"], row["label"], *row["sides"][index]) for row in rows]
        source = ColumnDataSource(
            {
                "group": [(value[0], shift) for value in values],
                "label": [value[1] for value in values],
                "side": [value[2] for value in values],
                "n": [value[3] for value in values],
                "accuracy": [value[4] for value in values],
                "low": [value[5] for value in values],
                "high": [value[6] for value in values],
            }
        )
        color = rows[0]["sides"][index][5]
        plot.hbar(y="group", left="low", right="high", height=0.05, source=source, color=color, alpha=0.7)
        dots = plot.scatter("accuracy", "group", source=source, size=10, color=color)
        tooltips = [
            ("group", "@label"),
            ("@side", "@accuracy{0.0%}"),
            ("95 % interval", "@low{0.0%} to @high{0.0%}"),
            ("pairs", "@n"),
        ]
        plot.add_tools(HoverTool(renderers=[dots], tooltips=tooltips))
    return plot


def margin_histogram(sides: Sequence[tuple[str, Sequence[ScoredPair], str]]) -> figure:
    """The share of pairs per margin bin; the bins are common to all sides (label, pairs, color)."""
    margins = {label: np.array([pair.margin for pair in pairs]) for label, pairs, _ in sides}
    every = np.concatenate(list(margins.values()))
    edges = np.histogram_bin_edges(every, bins=min(40, max(10, int(np.sqrt(len(every) / len(sides)) * 2))))
    plot = _figure("margin, nats per token", "share of pairs", percent=True)
    plot.vspan(x=[0], **REFERENCE_LINE)
    for label, _, color in sides:
        counts, _ = np.histogram(margins[label], bins=edges)
        data = {"left": edges[:-1], "right": edges[1:], "share": counts / counts.sum(), "count": counts}
        bars = plot.quad(
            left="left",
            right="right",
            top="share",
            bottom=0,
            source=ColumnDataSource(data),
            fill_color=color,
            fill_alpha=0.45,
            line_color=color,
            line_width=1,
        )
        tooltips = [(label, "@share{0.0%} (@count pairs)"), ("margin", "@left{0.000} to @right{0.000}")]
        plot.add_tools(HoverTool(renderers=[bars], tooltips=tooltips))
    return plot


def margin_by_length(pairs: Sequence[ScoredPair], color: str) -> tuple[figure, int]:
    """The margin against how many tokens longer the chosen response is; also returns the number of points drawn."""
    if len(pairs) > MAX_POINTS:
        pairs = [pairs[i] for i in np.random.default_rng(0).choice(len(pairs), MAX_POINTS, replace=False)]
    plot = _figure("tokens chosen − tokens rejected", "margin, nats per token")
    plot.vspan(x=[0], **REFERENCE_LINE)
    plot.hspan(y=[0], **REFERENCE_LINE)
    source = ColumnDataSource(
        {
            "difference": [pair.chosen_tokens - pair.rejected_tokens for pair in pairs],
            "margin": [pair.margin for pair in pairs],
            "pair_id": [pair.pair_id for pair in pairs],
        }
    )
    alpha = 0.6 if len(pairs) < 500 else 0.3
    points = plot.scatter("difference", "margin", source=source, size=6, color=color, alpha=alpha, line_color=None)
    tooltips = [("pair", "@pair_id"), ("longer by", "@difference tokens"), ("margin", "@margin{0.000}")]
    plot.add_tools(HoverTool(renderers=[points], tooltips=tooltips))
    return plot, len(pairs)


def grounding_bars(sides: Sequence[tuple[str, dict, str]], names: dict[str, str]) -> figure:
    """Accuracy per image condition.

    A side is (label, {condition: metrics}, color); `names` maps conditions to their labels on the axis.
    """
    plot = _figure(
        "image", "preference accuracy", percent=True, x_range=FactorRange(*names.values(), range_padding=0.1)
    )
    plot.y_range = Range1d(0, 1.02)
    plot.xgrid.grid_line_color = plot.xaxis.major_tick_line_color = None
    plot.hspan(y=[0.5], **REFERENCE_LINE)
    width = 0.5 if len(sides) == 1 else 0.34
    for index, (label, conditions, color) in enumerate(sides):
        shift = 0.0 if len(sides) == 1 else (-0.19, 0.19)[index]
        metrics = [conditions[condition] for condition in names]
        source = ColumnDataSource(
            {
                "condition": [(name, shift) for name in names.values()],
                "accuracy": [m["preference_accuracy"] for m in metrics],
                "low": [m["preference_accuracy_low"] for m in metrics],
                "high": [m["preference_accuracy_high"] for m in metrics],
                "n": [m["n"] for m in metrics],
            }
        )
        bars = plot.vbar(x="condition", top="accuracy", width=width, source=source, color=color, fill_alpha=0.4)
        whisker = Whisker(base="condition", lower="low", upper="high", source=source, line_color=color, line_width=2)
        whisker.upper_head.line_color = whisker.lower_head.line_color = color
        whisker.upper_head.size = whisker.lower_head.size = 8
        plot.add_layout(whisker)
        tooltips = [
            (label, "@accuracy{0.0%}"),
            ("95 % interval", "@low{0.0%} to @high{0.0%}"),
            ("pairs", "@n"),
        ]
        plot.add_tools(HoverTool(renderers=[bars], tooltips=tooltips))
    return plot


def _figure(x_label: str | None, y_label: str | None, percent: bool = False, **ranges) -> figure:
    # No pan or zoom tools: they would keep a finger on a phone from scrolling the page.
    plot = figure(height=260, sizing_mode="stretch_width", toolbar_location=None, tools="", **ranges)
    plot.xaxis.axis_label, plot.yaxis.axis_label = x_label, y_label
    plot.min_border_right = 14
    plot.outline_line_color = plot.xaxis.minor_tick_line_color = plot.yaxis.minor_tick_line_color = None
    for axis in (*plot.xaxis, *plot.yaxis):
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.major_tick_in = 0
        axis.major_tick_out = 4
    if percent:
        plot.yaxis.formatter = NumeralTickFormatter(format="0%")
    return plot


def _moving_mean(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    window = max(5, len(values) // 20)
    kernel = np.ones(window) / window
    inner = slice((window - 1) // 2, (window - 1) // 2 + len(values) - window + 1)
    return np.asarray(steps)[inner], np.convolve(values, kernel, mode="valid")
