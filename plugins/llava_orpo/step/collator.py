"""Tokenized pairs to one packed batch; each image decoded and preprocessed once, in the dataloader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import images
from ..data.conversation import full_prompt_ids
from ..data.image_store import load_image
from .batches import image_runs
from .packing import Pair, pack


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


