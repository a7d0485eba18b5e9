"""The functions that demo_objects.yaml calls: POPE's measures (arXiv 2305.10355); answers may be whole sentences."""

from __future__ import annotations

import re


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    """The first word decides; an answer that opens with neither yes nor no is wrong, and not a yes."""
    word = re.match(r"\W*(yes|no)\b", results[0], re.IGNORECASE)
    entry = {"said": word[1].lower() if word else "", "true": doc["answer"], "category": doc["category"]}
    return {metric: entry for metric in ("accuracy", "precision", "recall", "yes_ratio")}


def accuracy(results):
    return _share(results, lambda r: r["said"] == r["true"])


def precision(results):
    """The share of right answers among those that say yes: 1 minus this is hallucination. 0 when no answer says yes."""
    return _share([r for r in results if r["said"] == "yes"], lambda r: r["true"] == "yes")


def recall(results):
    return _share([r for r in results if r["true"] == "yes"], lambda r: r["said"] == "yes")


def yes_ratio(results):
    """The share of answers that say yes; half would be right."""
    return _share(results, lambda r: r["said"] == "yes")


def _share(results, hit):
    return sum(map(hit, results)) / len(results) if results else 0.0
