"""One evaluation into a folder: per-pair scores, the history of metrics, and examples with their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import columns, image_store, images
from ..errors import UserError
from ..files import write_jsonl
from . import metrics
from .records import CONDITIONS, EXAMPLES, HISTORY, PAIRS, ScoredPair, append_history, write_pairs
from .scoring import ScoredRow


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set scored by one model.

    name       the set's datasets, joined by commas: its name in preference_eval.json
    scored     {image condition: its scored rows, in dataset order}, "true" always among them
    unusable   rows whose own image could not be decoded
    summary    `metrics.summarize` of the pairs with their own image
    grounding  `metrics.grounding` of the pairs scored under every condition (`n` says how many); None if only the
               own image was shown, or if there is no such pair
    """

    name: str
    scored: dict[str, list[ScoredRow]]
    unusable: list[ScoredRow]
    summary: dict[str, Any]
    grounding: dict[str, Any] | None

    @property
    def pairs(self) -> list[ScoredPair]:
        """The pairs with their own image."""
        return pairs_of(self.scored["true"])

    @classmethod
    def of(
        cls, rows, merged: dict[str, tuple[list[ScoredRow], list[ScoredRow]]], beta: float, min_subset: int
    ) -> Evaluation:
        """The result of `scoring.merge` per condition for the set `rows`, with its metrics.

        Raises UserError when no pair was scored.
        """
        scored = {condition: good for condition, (good, _) in merged.items()}
        unusable = merged["true"][1]
        if not scored["true"]:
            reason = unusable[0].bad_image if unusable else "the evaluation set is empty"
            raise UserError(f"No pair of the evaluation set could be scored: {reason}")
        summary = metrics.summarize(pairs_of(scored["true"]), beta=beta, min_subset=min_subset)
        pairs = [pairs_of(scored[condition]) for condition in CONDITIONS if condition in scored]
        grounding = metrics.grounding_of_common(*pairs) if len(pairs) == len(CONDITIONS) else None
        return cls(dataset_names(rows), scored, unusable, summary, grounding)


def pairs_of(rows: Sequence[ScoredRow]) -> list[ScoredPair]:
    """The scores of rows that were scored."""
    return [row.pair for row in rows if row.pair is not None]


def dataset_names(rows) -> str:
    """The names of the datasets that make up an evaluation set, joined by commas."""
    return ",".join(sorted(set(columns.values(rows, "dataset"))))


def write_evaluation(
    folder: Path, rows, evaluation: Evaluation, tokenizer, num_examples: int, step: int, epoch: float, suffix: str = ""
) -> list[dict[str, Any]]:
    """Writes preference_pairs*.jsonl and preference_examples.jsonl, adds to preference_eval.json; returns the examples.

    suffix: goes into the names of the per-pair files of one of several evaluation sets; examples and images are
    written for the set without one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for condition, scored in evaluation.scored.items():
        end = suffix + ("" if condition == "true" else f"_{condition}")
        write_pairs(folder / f"{PAIRS}{end}.jsonl", pairs_of(scored))
    append_history(
        folder / HISTORY,
        {
            "step": step,
            "epoch": epoch,
            "dataset": evaluation.name,
            "metrics": evaluation.summary,
            "grounding": evaluation.grounding,
        },
    )
    return [] if suffix else write_examples(folder, rows, evaluation.scored["true"], tokenizer, num_examples)


def pick_examples(scored: Sequence[ScoredRow], count: int) -> list[ScoredRow]:
    """About `count` rows spread over the margin: the worst third, the best third, and evenly between."""
    ordered = sorted(scored, key=lambda row: row.pair.margin)
    if len(ordered) <= count:
        return ordered
    third = count // 3
    middle = ordered[third:-third] if third else ordered
    wanted = count - 2 * third
    step = len(middle) / max(wanted, 1)
    return ordered[:third] + [middle[int(i * step)] for i in range(wanted)] + (ordered[-third:] if third else [])


def write_examples(folder: Path, rows, scored: Sequence[ScoredRow], tokenizer, count: int) -> list[dict[str, Any]]:
    """Writes preference_examples.jsonl and images/<hash>.png beside it; returns the examples.

    Answers are the tokenized ones decoded (so what the model saw, `cutoff_len` included); images are the original
    pixels as PNG.
    """
    picked = pick_examples(scored, count)
    if not picked:
        return []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    examples = []
    for one in picked:
        row = rows[one.position]
        image = None
        if row["image"] is not None:
            path = folder / "images" / f"{row['image_hash'] or f'row-{one.position}'}.png"
            if not path.exists():
                images.decode_rgb(image_store.read(row["image"])).save(path)
            image = {"path": f"images/{path.name}"}
        answers = {
            side: tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True).strip()
            for side in ("chosen", "rejected")
        }
        examples.append({**one.pair.to_json(), "image": image, "question": row["question"], **answers})
    write_jsonl(folder / EXAMPLES, examples)
    return examples


def flat_metrics(summary: dict[str, Any], prefix: str) -> dict[str, float]:
    """Scalars of `metrics.summarize` under `<prefix>_…`, subsets as `<prefix>_subset/<name>/accuracy` and `/n`."""
    flat = {f"{prefix}_{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
    for groups in summary.get("subsets", {}).values():
        if len(groups) < 2:
            continue  # one group is the whole set
        for name, values in groups.items():
            flat[f"{prefix}_subset/{name}/accuracy"] = values["preference_accuracy"]
            flat[f"{prefix}_subset/{name}/n"] = values["n"]
    return flat
