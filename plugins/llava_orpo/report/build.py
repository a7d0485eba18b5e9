"""The report page: tables, charts and examples of a run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from bokeh.embed import json_item

from ..preference.metrics import GROUP_KEYS, compare, grounding_of_common, summarize
from . import charts
from .examples import choose_examples
from .inputs import CONDITIONS, Run, read_texts
from .page import render, thumbnails

MAX_PAGE_BYTES = 9_500_000
THUMBNAIL_SIDES = (320, 240, 160, 96)  # pixels; the largest whose images keep the page under MAX_PAGE_BYTES
CONDITION_NAMES = {"true": "own image", "grey": "grey image", "other": "another image"}
# (metric, label, kind); none of them depends on beta, which preference_pairs.jsonl does not hold
SUMMARY_ROWS = (
    ("preference_accuracy", "Preference accuracy, mean log-prob", "percent"),
    ("preference_accuracy_sum", "Preference accuracy, summed log-prob", "percent"),
    ("logps/margin", "Margin, nats per token", "number"),
    ("logps/chosen", "Log-prob of chosen, per token", "number"),
    ("logps/rejected", "Log-prob of rejected, per token", "number"),
    ("sft_loss", "SFT loss on chosen", "number"),
    ("odds_ratio_loss", "Odds-ratio loss", "number"),
    ("log_odds", "Log odds ratio", "number"),
    ("ties", "Ties", "count"),
    ("n", "Pairs", "count"),
)


def build_page(
    after: Run,
    before: Run | None,
    generations: Path | None = None,
    max_examples: int = 200,
    min_subset: int = 20,
) -> str:
    """The page as text.

    Raises:
        UserError: an input file is damaged, or the baseline was scored on other pairs (the missing ids are named).
    """
    texts = read_texts(after, generations)
    examples = choose_examples(after, before, texts, max_examples)
    tables = summaries(after, before, min_subset)
    figures: dict[str, dict] = {}
    context = {
        "facts": after.facts,
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "tables": tables,
        "summary_rows": SUMMARY_ROWS,
        "training": training_charts(after, tables, figures),
        "groups": group_charts(tables, figures),
        "margins": margin_charts(after, before, figures),
        "grounding": grounding_chart(after, before, tables, figures),
        "examples": examples,
        "pairs_with_texts": len(texts),
        "answer_models": sorted({model for example in examples for model in example.texts.answers}),
        "condition_names": CONDITION_NAMES,
        "colors": {"before": charts.BEFORE, "after": charts.AFTER},
    }
    context["figures"] = {name: json_item(plot, name) for name, plot in figures.items()}
    bare = len(render(context, {}).encode())
    for side in THUMBNAIL_SIDES:
        images = thumbnails(examples, side)
        embedded = sum(len(images[e.texts.image]["source"]) for e in examples if e.texts.image)
        if bare + embedded <= MAX_PAGE_BYTES:
            break
    return render(context, images)


def summaries(after: Run, before: Run | None, min_subset: int) -> list[dict]:
    """Per evaluation set: {"dataset", "after", "before", "after_label", "before_label", "comparison"}.

    Metrics are those of `summarize`, or None for a side without pairs. The largest set comes first.
    """
    tables = []
    sets = {entry["dataset"] for entry in after.history}
    covered = {name for dataset in sets for name in dataset.split(",")}
    for dataset in sets | ({pair.dataset for pair in after.pairs["true"]} - covered):
        entries = [entry for entry in after.history if entry["dataset"] == dataset]
        pairs = _pairs_of(after, dataset)
        table = {
            "dataset": dataset,
            "after": summarize(pairs, beta=1.0, min_subset=min_subset) if pairs else entries[-1]["metrics"],
            "after_label": f"After (step {entries[-1]['step']})" if entries else "After",
            "before": None,
            "before_label": "Before",
            "comparison": None,
        }
        earlier = _pairs_of(before, dataset) if before else []
        if earlier:
            table["before"] = summarize(earlier, beta=1.0, min_subset=min_subset)
            table["comparison"] = compare(pairs, earlier) if pairs else None
        elif len(entries) > 1:
            table["before"] = entries[0]["metrics"]
            table["before_label"] = f"Before (step {entries[0]['step']})"
        tables.append(table)
    return sorted(tables, key=lambda table: (-table["after"]["n"], table["dataset"]))


def training_charts(run: Run, tables: list[dict], figures: dict) -> list[dict]:
    """Adds one figure per logged quantity; returns [{"id", "title", "legend"}].

    The held-out curves are those of the first table's evaluation set.
    """
    held_out = [entry for entry in run.history if entry["dataset"] == tables[0]["dataset"]]

    def logged(name: str, label: str, color: str = charts.BEFORE) -> list[dict]:
        points = [(entry["step"], entry[name]) for entry in run.log if name in entry]
        return [_series(label, points, color)] if points else []

    def measured(name: str) -> list[dict]:
        points = [(entry["step"], entry["metrics"][name]) for entry in held_out if name in entry["metrics"]]
        return [_series("held-out", points, charts.AFTER) | {"dots": True}] if points else []

    accuracy = measured("preference_accuracy")
    for series in accuracy:
        series["low"] = [entry["metrics"]["preference_accuracy_low"] for entry in held_out]
        series["high"] = [entry["metrics"]["preference_accuracy_high"] for entry in held_out]
    panels = {
        "Loss": logged("loss", "training") + measured("loss"),
        "Preference accuracy": logged("rewards/accuracies", "training") + accuracy,
        "Odds-ratio term": logged("odds_ratio_loss", "training") + measured("odds_ratio_loss"),
        "SFT term": logged("sft_loss", "training") + measured("sft_loss"),
        "Learning rate": logged("learning_rate", "learning rate", charts.THIRD),
    }
    shown = []
    for title, series in panels.items():
        if series:
            name = f"training-{len(shown)}"
            percent, small = title == "Preference accuracy", title == "Learning rate"
            figures[name] = charts.lines(series, percent, small)
            legend = [(one["label"], one["color"]) for one in series]
            shown.append({"id": name, "title": title, "legend": legend})
    return shown


def group_charts(tables: list[dict], figures: dict) -> list[dict]:
    """A chart and a table per grouping (source, question type, both) of every dataset."""
    shown = []
    for table in tables:
        for key in GROUP_KEYS:
            large = table["after"]["subsets"][key]
            small = table["after"]["small_subsets"][key]
            if key == "subset" and any(len(table["after"]["subsets"][k]) < 2 for k in GROUP_KEYS[:2]):
                continue  # the same groups again
            rows = []
            for name in sorted(large, key=lambda name: -large[name]["preference_accuracy"]):
                sides = [("After", large[name], charts.AFTER)]
                earlier = (table["before"] or {}).get("subsets", {}).get(key, {}).get(name)
                if earlier:
                    sides.insert(0, ("Before", earlier, charts.BEFORE))
                rows.append({"label": name, "sides": sides})
            complete = all(len(row["sides"]) == 2 for row in rows)
            for row, short in zip(rows, _short_names([row["label"] for row in rows]), strict=True):
                row["name"] = short
                row["sides"] = row["sides"] if complete else row["sides"][-1:]
            name = f"groups-{len(shown)}"
            if rows:
                points = [row | {"sides": [_interval(*side) for side in row["sides"]]} for row in rows]
                figures[name] = charts.accuracy_by_group(points)
            title = {
                "source": "By source",
                "question_type": "By question type",
                "subset": "By source and question type",
            }[key]
            dataset = table["dataset"] if len(tables) > 1 else None
            shown.append({"id": name, "title": title, "dataset": dataset, "rows": rows, "small": small})
    return [group for group in shown if group["rows"] or group["small"]]


def margin_charts(after: Run, before: Run | None, figures: dict) -> dict | None:
    """Margin histogram and length plot over all pairs scored with their own image; None if there are no pairs."""
    pairs = after.pairs["true"]
    if not pairs:
        return None
    sides = [("after", pairs, charts.AFTER)]
    if before and before.pairs["true"]:
        sides.insert(0, ("before", before.pairs["true"], charts.BEFORE))
    figures["margin-histogram"] = charts.margin_histogram(sides)
    figures["margin-length"], points = charts.margin_by_length(pairs, charts.AFTER)
    metrics = [(label, summarize(side, beta=1.0)) for label, side, _ in sides]
    legend = [(label, color) for label, _, color in sides]
    return {"legend": legend, "points": points, "n": len(pairs), "sides": metrics}


def grounding_chart(after: Run, before: Run | None, tables: list[dict], figures: dict) -> dict | None:
    """Adds bars of accuracy with the own, a grey and another image, for the first table's evaluation set.

    Returns None when grounding was not measured.
    """
    if not tables:
        return None
    dataset = tables[0]["dataset"]
    history = [entry["grounding"] for entry in after.history if entry["dataset"] == dataset and entry["grounding"]]
    now = _measure_grounding(after, dataset) or (history[-1] if history else None)
    if not now:
        return None
    earlier = _measure_grounding(before, dataset) if before else history[0] if len(history) > 1 else None
    sides = [("after", now, charts.AFTER)]
    if earlier:
        sides.insert(0, ("before", earlier, charts.BEFORE))
    figures["grounding-bars"] = charts.grounding_bars(sides, {"true": "own", "grey": "grey", "other": "another"})
    return {"after": now, "sides": sides, "legend": [(label, color) for label, _, color in sides]}


def _pairs_of(run: Run, dataset: str, condition: str = "true") -> list:
    """The pairs of an evaluation set. A set of several datasets is named by all of them, joined by commas."""
    names = dataset.split(",")
    return [pair for pair in run.pairs[condition] if pair.dataset in names]


def _measure_grounding(run: Run, dataset: str) -> dict | None:
    conditions = [_pairs_of(run, dataset, condition) for condition in CONDITIONS]
    return grounding_of_common(*conditions)


def _series(label: str, points: list[tuple[float, float]], color: str) -> dict:
    return {"label": label, "steps": [x for x, _ in points], "values": [y for _, y in points], "color": color}


def _interval(side: str, metrics: dict, color: str) -> tuple:
    low, high = metrics["preference_accuracy_low"], metrics["preference_accuracy_high"]
    return side, metrics["n"], metrics["preference_accuracy"], low, high, color


def _short_names(names: list[str], limit: int = 22) -> list[str]:
    """Axis labels of at most `limit` characters, all different."""
    short: list[str] = []
    for name in names:
        label = name if len(name) <= limit else name[: limit - 1] + "…"
        while label in short:
            label += "′"
        short.append(label)
    return short
