"""What demo_objects.yaml calls: POPE's measures (arXiv 2305.10355), with answers in whole sentences allowed."""

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
    """Of the answers that say yes, how many are right: 1 minus this is hallucination. 0 when none says yes."""
    return _share([r for r in results if r["said"] == "yes"], lambda r: r["true"] == "yes")


def recall(results):
    return _share([r for r in results if r["true"] == "yes"], lambda r: r["said"] == "yes")


def yes_ratio(results):
    """How many answers say yes; half would be right."""
    return _share(results, lambda r: r["said"] == "yes")


def _share(results, hit):
    return sum(map(hit, results)) / len(results) if results else 0.0
