"""Scores every held-out pair exactly once: rows under an image condition, the scoring loop, shards.

The trainer uses it at each evaluation, and so does `evals/preference.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..data import columns, images
from ..errors import UserError
from ..step.batches import fill_batches, image_runs
from .records import ScoredPair


@dataclass(frozen=True)
class ScoredRow:
    """The result of one row of an evaluation set.

    position   the row's number in the set
    pair_id, dataset   the pair's name there (see `unique_ids`)
    pair       its scores, or None when the image could not be decoded: then `bad_image` says why
    loss       the trainer's own loss of the pair, where it computes one
    """

    position: int
    pair_id: str
    dataset: str
    pair: ScoredPair | None = None
    bad_image: str = ""
    loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {**dataclasses.asdict(self), "pair": self.pair.to_json() if self.pair else None}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ScoredRow:
        """The row that `to_json` wrote."""
        pair = content["pair"]
        return cls(**{**content, "pair": ScoredPair.from_json(pair, "a saved score") if pair else None})


class ConditionedRows(Dataset):
    """Rows of a tokenized evaluation set by position, with the image as `condition` asks.

    `other` takes the image of the next row (in order, cyclic) that shows a different image: deterministic, and
    every image is used about as often as it occurs.
    """

    def __init__(self, rows, positions: Sequence[int], condition: str = "true"):
        self.rows, self.positions, self.condition = rows, list(positions), condition
        self.hashes = columns.values(rows, "image_hash") if condition == "other" else []

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = self.positions[item]
        row = dict(self.rows[position], position=position)
        if row["image"] is None or self.condition == "true":
            return row
        if self.condition == "grey":
            row["image"] = images.grey_like(row["width"], row["height"])
            return row
        for step in range(1, len(self.rows)):
            neighbour = (position + step) % len(self.rows)
            if self.hashes[neighbour] not in (row["image_hash"], ""):
                donor = self.rows[neighbour]
                shown = {key: donor[key] for key in ("image", "num_image_tokens", "width", "height")}
                return dict(row, shown_hash=donor["image_hash"], **shown)
        raise UserError("grounding_eval: the evaluation set has one image only; there is no other image to show.")


def unique_ids(rows) -> list[str]:
    """pair_id of every row, made unique within its dataset (`#2`, `#3`, … for repeats; the position if empty)."""
    named = [columns.values(rows, key) for key in ("dataset", "pair_id")]
    seen: dict[tuple[str, str], int] = {}
    ids = []
    for position, (name, pair_id) in enumerate(zip(*named, strict=True)):
        pair_id = pair_id or f"row-{position}"
        count = seen[name, pair_id] = seen.get((name, pair_id), 0) + 1
        ids.append(pair_id if count == 1 else f"{pair_id}#{count}")
    return ids


def in_groups(rows, positions: Sequence[int], batch_size: int, condition: str, arguments) -> list[int]:
    """The positions, in an order whose batches hold the pairs of one image together if the recipe groups by image.

    arguments: the recipe's `PluginArguments`. Under `other` neighbours show different images, so nothing is grouped.
    """
    if not arguments.group_pairs_by_image or condition == "other":
        return list(positions)
    hashes = columns.values(rows, "image_hash")
    return fill_batches(image_runs(hashes, positions, arguments.max_pairs_per_image), batch_size)


def shard(positions: Sequence[int], rank: int, world_size: int, batch_size: int = 1) -> list[int]:
    """This rank's share: whole batches of `batch_size`, dealt in turn, so that the pairs of an image stay together.

    All ranks get equally many batches (the last one repeats), as collective forwards need; `merge` counts a pair once.
    """
    size = max(min(batch_size, -(-len(positions) // world_size)), 1)  # a set of less than one round is shared out
    batches = [positions[start : start + size] for start in range(0, len(positions), size)]
    batches += batches[-1:] * (-len(batches) % world_size)
    return [position for batch in batches[rank::world_size] for position in batch]


def score(
    score_batch: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
    rows,
    positions: Sequence[int],
    collator,
    batch_size: int,
    condition: str = "true",
    num_workers: int = 0,
    on_batch: Callable[[list[ScoredRow]], None] | None = None,
    on_loader: Callable[[DataLoader], None] | None = None,
) -> list[ScoredRow]:
    """Scores rows[positions].

    Args:
        score_batch: a collated batch to {"logps": (2n,) summed log-probs, "loss": (n,) if there is one}; chosen first.
        on_batch: called with the scored rows of each batch, for progress and for saving.
        on_loader: called with the DataLoader before it starts.
    """
    ids = unique_ids(rows)
    loader = DataLoader(
        ConditionedRows(rows, positions, condition), batch_size=batch_size, collate_fn=collator, num_workers=num_workers
    )
    if on_loader is not None:
        on_loader(loader)
    scored = []
    for batch in loader:
        scores = {key: value.detach().double().cpu().tolist() for key, value in score_batch(batch).items()}
        n, bad = len(batch["rows"]), dict(batch["bad_images"])
        found = []
        for i, row in enumerate(batch["rows"]):
            if row.get("padding"):
                continue
            name = {"pair_id": ids[row["position"]], "dataset": row["dataset"]}
            if i in bad:
                found.append(ScoredRow(row["position"], **name, bad_image=bad[i]))
                continue
            pair = ScoredPair(
                **name,
                **{key: row[key] for key in ("source", "question_type", "image_hash")},
                subset=f"{row['source']}/{row['question_type']}",
                image_condition=condition,
                chosen_logp=scores["logps"][i],
                rejected_logp=scores["logps"][n + i],
                chosen_tokens=len(row["chosen_ids"]),
                rejected_tokens=len(row["rejected_ids"]),
            )
            loss = scores["loss"][i] if "loss" in scores else None
            found.append(ScoredRow(row["position"], **name, pair=pair, loss=loss))
        scored += found
        if on_batch is not None:
            on_batch(found)
    return scored


def merge(parts: Iterable[Sequence[ScoredRow]]) -> tuple[list[ScoredRow], list[ScoredRow]]:
    """Merges the rows of all ranks to (scored, unusable), each position once, in dataset order."""
    by_position = {row.position: row for part in parts for row in part}
    ordered = [by_position[position] for position in sorted(by_position)]
    return [row for row in ordered if row.pair], [row for row in ordered if not row.pair]
