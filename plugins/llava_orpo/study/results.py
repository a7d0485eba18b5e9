"""Results of a study: one JSON file per run, and the table made of them alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import UserError
from ..files import write_atomic, write_json
from .spec import Metric, Run, Setting, Study, text

FORMAT = 1
LEVEL = 0.95
INTERVALS = {
    "t": "mean over seeds and its 95 % interval by Student's t (the range where fewer than three have finished)",
    "range": "mean over seeds and their range, least to greatest (fewer than three seeds)",
}
TABLE_JSON, TABLE_MD, PLOT = "table.json", "table.md", "plot.svg"
DIGITS = 12  # significant digits of what is computed here, so that the last bit of a library does not show


def result_file(study: Study, run: Run) -> Path:
    """The file of a run's result."""
    return study.results / f"{run.name}.json"


def stored(study: Study, run: Run) -> dict[str, Any] | None:
    """The stored result of a run, or None if there is none of its recipe and command.

    Raises UserError if the file is not JSON.
    """
    result = _read(result_file(study, run))
    return result if result and result.get("mark") == run.mark else None


def is_finished(result: Mapping[str, Any] | None) -> bool:
    """Whether a stored result is that of a run that ended well."""
    return result is not None and "failed" not in result


def write_result(
    study: Study, run: Run, seconds: float, found: Mapping[str, float], failed: str = ""
) -> dict[str, Any]:
    """Writes and returns a run's result. failed: why it ended badly, in one line."""
    result = {
        "format": FORMAT,
        "study": study.name,
        "run": run.name,
        "values": run.setting.values,
        "seed": run.seed,
        "command": [*run.command],
        "after": [[*command] for command in run.after],
        "mark": run.mark,
        "seconds": round(seconds, 1),
        "versions": _versions(),
        **({"failed": failed} if failed else {"metrics": dict(found), "read_from": sources(study)}),
    }
    study.results.mkdir(parents=True, exist_ok=True)
    write_json(result_file(study, run), result)
    return result


def sources(study: Study) -> dict[str, str]:
    """{name of a metric: its `file.json:key.key`}."""
    return {metric.name: str(metric) for metric in study.metrics}


def value(result: Mapping[str, Any], metric: Metric) -> float | None:
    """A metric of a result; None for one that failed and for one stored under another meaning of that name."""
    same = is_finished(result) and result["read_from"].get(metric.name) == str(metric)
    return result["metrics"].get(metric.name) if same else None


def read_metrics(metrics: Sequence[Metric], folder: Path) -> dict[str, float]:
    """{name: value} of a run's folder. Raises UserError naming the file and the key that is missing or no number."""
    return {metric.name: _number(metric, folder) for metric in metrics}


def results_of(study: Study) -> tuple[list[tuple[Setting, list[dict[str, Any]]]], list[Path]]:
    """([(setting, its stored results by seed)], files of results that are of another recipe or command).

    Raises UserError for a file that is not JSON.
    """
    settings = study.settings() or _trials(study)
    rows, other = [], []
    for one in settings:
        runs = study.runs([one])
        found = [result for run in runs if (result := stored(study, run))]
        other += [path for run in runs if (path := result_file(study, run)).exists() and not stored(study, run)]
        rows.append((one, found))
    return rows, other


def table(study: Study, rows: Sequence[tuple[Setting, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """The table as JSON: per setting its values, its number of runs that finished and failed, and its metrics.

    A metric is {"mean", "low", "high", "values" by seed}; missing where no run has finished.
    """
    lines = []
    for setting, results in rows:
        finished = [result for result in results if is_finished(result)]
        metrics = {}
        for metric in study.metrics:
            values = {str(one["seed"]): found for one in finished if (found := value(one, metric)) is not None}
            if values:
                metrics[metric.name] = summary(list(values.values())) | {"values": values}
        line = {"name": setting.name, "values": setting.values, "finished": len(finished)}
        line["failed"] = [result["failed"] for result in results if not is_finished(result)]
        line["waiting"] = len(study.seeds) - len(results)
        line["seconds"] = _rounded(fmean(r["seconds"] for r in finished)) if finished else None
        lines.append({**line, "metrics": metrics})
    return {
        "format": FORMAT,
        "study": study.name,
        "recipe": study.recipe,
        "seeds": list(study.seeds),
        "metrics": sources(study),
        "interval": INTERVALS["t" if len(study.seeds) >= 3 else "range"],
        "best": _best(study, lines),
        "rows": lines,
    }


def summary(values: Sequence[float]) -> dict[str, float]:
    """{"mean", "low", "high"} of one setting's values: Student's t interval from three on, else their range."""
    mean = fmean(values)
    low, high = min(values), max(values)
    if len(values) >= 3:
        from scipy.stats import t

        half = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        low, high = mean - half, mean + half
    return {"mean": _rounded(mean), "low": _rounded(low), "high": _rounded(high)}


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown, with what its intervals are and what failed below it."""
    names = list(dict.fromkeys(key for row in table["rows"] for key in row["values"]))
    metrics = list(table["metrics"])
    head = [*names, *metrics, "runs", "seconds per run"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(names) + "---:|" * (len(metrics) + 2)]
    for row in table["rows"]:
        cells = [text(name, row["values"][name]) if name in row["values"] else "" for name in names]
        cells += [_cell(row["metrics"].get(metric)) for metric in metrics]
        total = row["finished"] + len(row["failed"]) + row["waiting"]
        cells += [str(total) if total == row["finished"] else f"{row['finished']} of {total}"]
        cells += ["" if row["seconds"] is None else f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += [
        "",
        f"{table['interval'][0].upper()}{table['interval'][1:]}; seeds {', '.join(map(str, table['seeds']))}.",
    ]
    if table["best"]:
        lines += ["", f"Best by {table['best']['metric']}: {table['best']['name']}."]
    failed = [f"- {row['name']}: {reason}" for row in table["rows"] for reason in row["failed"]]
    if failed:
        lines += ["", "Failed:", "", *failed]
    return "\n".join(lines) + "\n"


def write_table(study: Study) -> tuple[str, list[Path]]:
    """Writes table.json, table.md and the plot from the stored results alone; returns (Markdown, other files).

    The same results give the same bytes of the table; other files: see `results_of`. Raises UserError if no run has a
    result.
    """
    from . import chart

    rows, other = results_of(study)
    if not any(results for _, results in rows):
        raise UserError(f"{study.results} holds no result of this study; run it first.")
    made = table(study, rows)
    page = markdown(made)
    write_json(study.results / TABLE_JSON, made)
    write_atomic(study.results / TABLE_MD, f"`python scripts/study.py {study.file}`\n\n{page}")
    chart.write(made, study.results / PLOT)
    return page, other


def _trials(study: Study) -> list[Setting]:
    """The trials of a search that have results, read from their files."""
    found = {}
    for path in sorted(study.results.glob("trial-*.json")):
        result = _read(path) or {}
        number = result.get("run", "").removeprefix("trial-").partition("-")[0]
        if number.isdecimal() and isinstance(result.get("values"), dict):
            found[int(number)] = study.trial(int(number), result["values"])
    return [found[number] for number in sorted(found) if number < study.trials]


def _best(study: Study, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best trial of a search whose runs have all finished."""
    whole = [line for line in lines if line["finished"] == len(study.seeds) and study.metric in line["metrics"]]
    if not study.search or not whole:
        return None
    sign = 1 if study.direction == "maximize" else -1
    best = max(whole, key=lambda line: sign * line["metrics"][study.metric]["mean"])
    return {"metric": study.metric, "name": best["name"], "values": best["values"]}


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove it, and its run is done again.") from None
    if not isinstance(result, dict):
        raise UserError(f"{path} is no result of a run; remove it, and its run is done again.")
    return result


def _number(metric: Metric, folder: Path) -> float:
    path = folder / metric.file
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"metrics.{metric.name}: there is no {path}.") from None
    except ValueError as error:
        raise UserError(f"metrics.{metric.name}: {path} is not JSON ({error}).") from None
    for part in metric.path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            raise UserError(f"metrics.{metric.name}: {path} has no {metric.path} (stopped at `{part}`).") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"metrics.{metric.name}: {metric.path} of {path} is {value!r}, not a number.")
    return value


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("llava-orpo", "llamafactory", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cell(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return ""
    if len(metric["values"]) == 1:
        return _short(metric["mean"])
    return f"{_short(metric['mean'])} [{_short(metric['low'])}, {_short(metric['high'])}]"


def _short(value: float) -> str:
    return f"{value:.4g}" if value == 0 or abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
