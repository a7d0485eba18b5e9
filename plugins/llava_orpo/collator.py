"""Tokenized pairs to one packed batch; each image decoded and preprocessed once, in the dataloader's workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from . import images
from .mm_plugin import load_image
from .pairs import full_prompt_ids
from .shared_prefix import Pair, pack


@dataclass
class SharedPrefixCollator:
    """Pairs (rows of `PairProcessor`) to the keyword dict that `SharedPrefixTrainer` takes.

    Returns
        packed        PackedBatch; its pairs are in the order of `rows`
        pixel_values  (num_groups_with_image, max tiles, 3, tile, tile), absent for text-only batches
        image_sizes   (num_groups_with_image, 2), (height, width)
        weights       (n,) 1.0 for a good pair, 0.0 for one whose image can't be decoded: a grey picture stands in so
                      that the batch keeps its shape on every rank, and the pair counts nowhere
        rows          the n rows, in packed order
        bad_images    [(pair_id, reason), …]

    With `group_by_image`, pairs of one image share its tokens, at most `max_pairs_per_image` in a group.
    """

    processor: Any
    image_token_id: int
    group_by_image: bool = False
    max_pairs_per_image: int = 4

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        groups = self._group(features)
        rows = [row for group in groups for row in group]
        packed = pack(
            [
                [
                    Pair(full_prompt_ids(row, self.image_token_id), row["chosen_ids"], row["rejected_ids"])
                    for row in group
                ]
                for group in groups
            ],
            image_token_id=self.image_token_id,
        )
        batch: dict[str, Any] = {"packed": packed, "rows": rows, "bad_images": []}
        weights, pictures = [], []
        for group in groups:
            weight = 1.0
            if group[0]["image"] is not None:
                picture, reason = self._load(group[0])
                pictures.append(picture)
                if reason:
                    weight = 0.0
                    batch["bad_images"] += [(row["pair_id"], reason) for row in group]
            weights += [weight] * len(group)
        batch["weights"] = torch.tensor(weights)
        if pictures:
            batch.update(self.processor.image_processor(pictures, return_tensors="pt"))
        return batch

    def _load(self, row: dict[str, Any]):
        try:
            return load_image(row["image"]), ""
        except (images.ImageError, OSError) as err:
            return images.grey_like(row["width"], row["height"]), str(err)

    def _group(self, features: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        if not self.group_by_image:
            return [[row] for row in features]
        # the image shown, which for `ScoredRows` with another image is not the row's own
        keys = [row.get("shown_hash", row["image_hash"]) if row["image"] is not None else "" for row in features]
        runs = image_runs(keys, range(len(features)), self.max_pairs_per_image)
        return [[features[index] for index in run] for run in runs]


def image_runs(image_hashes: Sequence[str], order: Sequence[int], max_pairs: int) -> list[list[int]]:
    """Cuts a (shuffled) order of pair indices into runs of one image with at most `max_pairs` pairs each.

    Runs are in the order of their first pair; a pair without an image hash is a run of its own.
    """
    runs: list[list[int]] = []
    open_runs: dict[str, list[int]] = {}
    for index in order:
        key = image_hashes[index]
        run = open_runs.get(key) if key else None
        if run is None or len(run) >= max_pairs:
            run = []
            runs.append(run)
            if key:
                open_runs[key] = run
        run.append(index)
    return runs


def fill_batches(runs: Sequence[list[int]], batch_size: int) -> list[int]:
    """An order of all indices in which consecutive batches of `batch_size` hold whole runs as far as they fit.

    Best fit over the runs still open: a run is split only when no waiting run fits the rest of a batch. Every
    index appears exactly once, so epochs, steps and samples count pairs as without grouping.
    """
    waiting: dict[int, list[list[int]]] = {}
    for run in reversed(runs):
        for start in range(0, len(run), batch_size):
            piece = run[start : start + batch_size]
            waiting.setdefault(len(piece), []).append(piece)
    order: list[int] = []
    left = sum(len(piece) for pieces in waiting.values() for piece in pieces)
    while left:
        room = batch_size
        while room and left:
            size = next((s for s in range(room, 0, -1) if waiting.get(s)), None)
            if size is None:  # only longer runs wait: split one
                longer = waiting[min(s for s, pieces in waiting.items() if pieces)].pop()
                piece, rest = longer[:room], longer[room:]
                waiting.setdefault(len(rest), []).append(rest)
            else:
                piece = waiting[size].pop()
            order += piece
            room -= len(piece)
            left -= len(piece)
    return order


class GroupByImageSampler(Sampler[int]):
    """Shuffles pairs, then puts pairs of one image into the same batch of `batch_size` (see `fill_batches`).

    Every pair appears once an epoch. The order depends on seed and epoch alone (or is the given one, unshuffled), so a
    resumed run goes on where it stopped: accelerate calls `set_epoch`, without it epochs are counted here.
    """

    def __init__(self, image_hashes, batch_size: int, max_pairs: int, shuffle: bool, seed: int = 0):
        self.image_hashes = list(image_hashes)
        self.batch_size, self.max_pairs = batch_size, max_pairs
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.image_hashes)

    def __iter__(self) -> Iterator[int]:
        n = len(self.image_hashes)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        self.epoch += 1
        order = torch.randperm(n, generator=generator).tolist() if self.shuffle else list(range(n))
        order = fill_batches(image_runs(self.image_hashes, order, self.max_pairs), self.batch_size)
        if self.shuffle:  # best fit puts full runs first: shuffle whole batches, keep a short last one last
            full = n // self.batch_size
            picked = torch.randperm(full, generator=generator).tolist()
            batches = [order[b * self.batch_size : (b + 1) * self.batch_size] for b in picked]
            order = [index for batch in batches for index in batch] + order[full * self.batch_size :]
        return iter(order)
