"""The preference-accuracy hook: every held-out pair scored exactly once, numbers and files that can be trusted.

Used by the trainer at each evaluation and by `evals/preference.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..data import image_store, images
from . import metrics as preference

CONDITIONS = ("true", "grey", "other")


class ScoredRows(Dataset):
    """Rows of a tokenized evaluation set by position, with the image as `condition` asks.

    `other` takes the image of the next row (in order, cyclic) that shows a different image: deterministic, and
    every image is used about as often as it occurs.
    """

    def __init__(self, rows, positions: Sequence[int], condition: str = "true"):
        self.rows, self.positions, self.condition = rows, list(positions), condition
        self.hashes = rows["image_hash"] if condition == "other" else []

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = self.positions[item]
        row = dict(self.rows[position], position=position)
        if row["image"] is None or self.condition == "true":
            return row
        if self.condition == "grey":
            width, height = (row["width"], row["height"])
            row["image"] = images.grey_like(width, height)
            return row
        for step in range(1, len(self.rows)):
            neighbour = (position + step) % len(self.rows)
            if self.hashes[neighbour] not in (row["image_hash"], ""):
                donor = self.rows[neighbour]
                shown = {key: donor[key] for key in ("image", "num_image_tokens", "width", "height")}
                return dict(row, shown_hash=donor["image_hash"], **shown)
        raise ValueError("grounding_eval: the evaluation set has one image only; there is no other image to show.")


def unique_ids(rows) -> list[str]:
    """pair_id of every row, made unique within its dataset (`#2`, `#3`, … for repeats; the position if empty)."""
    seen: dict[tuple[str, str], int] = {}
    ids = []
    for position, (name, pair_id) in enumerate(zip(rows["dataset"], rows["pair_id"])):
        pair_id = pair_id or f"row-{position}"
        count = seen[name, pair_id] = seen.get((name, pair_id), 0) + 1
        ids.append(pair_id if count == 1 else f"{pair_id}#{count}")
    return ids


def shard(positions: Sequence[int], rank: int, world_size: int) -> list[int]:
    """This rank's share; all ranks get equally many (the last position repeats), as collective forwards need."""
    if not positions:
        return []
    padded = list(positions) + [positions[-1]] * (-len(positions) % world_size)
    return padded[rank::world_size]


def score(
    score_batch: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
    rows,
    positions: Sequence[int],
    collator,
    batch_size: int,
    condition: str = "true",
    num_workers: int = 0,
    on_batch: Callable[[list[dict]], None] | None = None,
    on_loader: Callable[[DataLoader], None] | None = None,
) -> list[dict[str, Any]]:
    """Scores rows[positions] and returns one record a pair (see `scored_pairs`), with `position` added.

    Args:
        score_batch: a collated batch to {"logps": (2n,) summed log-probs, "lengths": (2n,)}, chosen first, and
            optionally further (n,) tensors that are copied into the records.
        on_batch: called with the records of each batch, for progress and for saving.

    Pairs whose image can't be decoded come back with "bad_image": reason and no scores.
    """
    ids = unique_ids(rows)
    loader = DataLoader(
        ScoredRows(rows, positions, condition), batch_size=batch_size, collate_fn=collator, num_workers=num_workers
    )
    if on_loader is not None:
        on_loader(loader)
    records = []
    for batch in loader:
        scores = {key: value.detach().double().cpu().tolist() for key, value in score_batch(batch).items()}
        n = len(batch["rows"])
        bad = dict(batch["bad_images"])
        found = []
        for i, row in enumerate(batch["rows"]):
            record = {
                "pair_id": ids[row["position"]],
                **{key: row[key] for key in ("dataset", "source", "question_type", "image_hash")},
                "subset": f"{row['source']}/{row['question_type']}",
                "image_condition": condition,
                "position": row["position"],
            }
            if row["pair_id"] in bad:
                record["bad_image"] = bad[row["pair_id"]]
            else:
                record["chosen_logp"], record["rejected_logp"] = scores["logps"][i], scores["logps"][n + i]
                record["chosen_tokens"], record["rejected_tokens"] = len(row["chosen_ids"]), len(row["rejected_ids"])
                record["correct"] = preference.is_correct(record)
                record.update({key: value[i] for key, value in scores.items() if key not in ("logps", "lengths")})
            found.append(record)
        records += found
        if on_batch is not None:
            on_batch(found)
    return records


def merge(parts: Iterable[list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of all ranks to (scored, unusable), each position once, in dataset order."""
    by_position = {record["position"]: record for part in parts for record in part}
    ordered = [by_position[position] for position in sorted(by_position)]
    scored = [r for r in ordered if "bad_image" not in r]
    return scored, [r for r in ordered if "bad_image" in r]


PAIR_KEYS = (
    "pair_id", "dataset", "subset", "source", "question_type", "image_hash", "image_condition",
    "chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens", "correct",
)  # fmt: skip


def public(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records reduced to the documented fields of preference_pairs.jsonl."""
    return [{key: record[key] for key in PAIR_KEYS} for record in records]


def pick_examples(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """About `count` records spread over the margin: the worst third, the best third, and evenly between."""
    ordered = sorted(records, key=preference.margin)
    if len(ordered) <= count:
        return ordered
    third = count // 3
    middle = ordered[third:-third] if third else ordered
    wanted = count - 2 * third
    step = len(middle) / max(wanted, 1)
    return ordered[:third] + [middle[int(i * step)] for i in range(wanted)] + (ordered[-third:] if third else [])


def write_examples(folder: str | os.PathLike, rows, records: Sequence[dict[str, Any]], tokenizer, count: int) -> list:
    """Writes preference_examples.jsonl and images/<hash>.png beside it; returns the examples.

    Texts are the tokenized ones decoded (so what the model saw, `cutoff_len` included); images are the original
    pixels as PNG.
    """
    folder = Path(folder)
    picked = pick_examples(records, count)
    if not picked:
        return []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    examples = []
    for record in picked:
        row = rows[record["position"]]
        example = {key: record[key] for key in PAIR_KEYS}
        example["image"] = None
        if row["image"] is not None:
            path = folder / "images" / f"{row['image_hash']}.png"
            if not path.exists():
                images.decode_rgb(image_store.read(row["image"])).save(path)
            example["image"] = {"path": f"images/{path.name}"}
        prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
        example["question"] = _question(prompt)
        for side in ("chosen", "rejected"):
            example[side] = tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True).strip()
        examples.append(example)
    target = folder / "preference_examples.jsonl"
    beside = target.with_suffix(".jsonl.partial")
    beside.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in examples), encoding="utf-8")
    beside.replace(target)
    return examples


def _question(prompt: str) -> str:
    """The user's words out of a decoded prompt, whichever conversation format it is in."""
    for opening, closing in (("[INST]", "[/INST]"), ("USER:", "ASSISTANT:"), ("<|im_start|>user", "<|im_end|>")):
        if opening in prompt and closing in prompt:
            return prompt.split(opening, 1)[1].rsplit(closing, 1)[0].strip()
    return prompt.strip()


def flat_metrics(summary: dict[str, Any], prefix: str) -> dict[str, float]:
    """Scalars of `preference.summarize` under `<prefix>_…`, subsets as `<prefix>_subset/<name>/accuracy` and `/n`."""
    flat = {f"{prefix}_{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
    for groups in summary.get("subsets", {}).values():
        if len(groups) < 2:
            continue  # one group is the whole set
        for name, metrics in groups.items():
            flat[f"{prefix}_subset/{name}/accuracy"] = metrics["preference_accuracy"]
            flat[f"{prefix}_subset/{name}/n"] = metrics["n"]
    return flat
