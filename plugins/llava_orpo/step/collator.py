"""Tokenized pairs to one packed batch; each image is decoded and preprocessed once, in the dataloader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import images
from ..data.anyres import processor_geometry
from ..data.conversation import full_prompt_ids
from ..loss_keys import runs_rejected
from .attention import unwrap
from .batches import cut_to_fit, image_runs
from .damage import Damage
from .packing import TokenPair, chosen_alone, pack, packed_length
from .parts import whole_of
from .reference import ReferenceLogps


@dataclass
class SharedPrefixCollator:
    """Pairs (rows of `PairProcessor`) to the keyword dict that `SharedPrefixTrainer` takes.

    Returns
        packed        PackedBatch; its pairs are in the order of `rows`
        image_inputs  what the model's image processor makes of the images, handed to the model as it is; empty for
                      text-only batches. LLaVA-NeXT: pixel_values (num_groups_with_image, max tiles, 3, tile, tile)
                      and image_sizes, [height, width] of each, a list: the model reads them on the host
        weights       (n,) fp32, 1.0 for a good pair, 0.0 for one that is excluded from loss and metrics: its image
                      can't be decoded (a grey picture takes its place, so that the batch keeps its shape on every
                      rank), or it holds an empty place (`order.Padding`, or a stand-in, see below)
        rows          the n rows, in packed order; those of empty places are marked with `padding: True`
        bad_images    [(index in rows, reason), …]
        undamaged     [(index in rows, reason), …] of pairs that have no image term, where there is `damage`
        reference     ReferenceLogps of the rows, where there are `reference_logps`

    Rows that a training draws (`order.Drawn`) hold their epoch. Where there is `damage`, the chosen answers of those
    with an image are packed under a damaged image too, one for each group; under `without_rejected` their rejected
    answers are left out. Rows of an evaluation are packed as they are.

    With `group_by_image`, pairs of one image share its tokens, at most `max_pairs_per_image` in a group. With
    `always_with_image` a batch of text-only pairs gets a stand-in with a grey picture: the vision tower and the
    projector then run on every process, which collectives over their parameters wait for.

    With `max_tokens` a batch of more tokens is cut into parts of at most so many, between groups where that is enough
    and else between the pairs of a group. Such a batch holds `parts`, each of them a batch as above, in place of
    `packed` and `image_inputs`; rows, weights and bad_images are those of all parts.
    """

    processor: Any
    image_token_id: int
    group_by_image: bool = False
    max_pairs_per_image: int = 4
    always_with_image: bool = False
    max_tokens: int | None = None
    without_rejected: bool = False
    damage: Damage | None = None
    reference_logps: ReferenceLogps | None = None

    @classmethod
    def of(cls, processor, model, arguments, processes: int = 1) -> SharedPrefixCollator:
        """The collator for a loaded model and a recipe's `PluginArguments`."""
        token = unwrap(model).config.image_token_id
        mixed = arguments.allow_text_only and processes > 1
        grouping = arguments.group_pairs_by_image, arguments.max_pairs_per_image
        alone = not runs_rejected(vars(arguments))
        return cls(processor, token, *grouping, mixed, arguments.max_tokens_per_step, alone)

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        kept = [row for row in features if not row.get("padding")] or list(features[:1])
        groups = self._group(kept)
        if self.max_tokens is None:
            return self._batch(groups)
        parts = cut_to_fit(groups, self._num_tokens, self.max_tokens)
        return whole_of([self._batch(part) for part in parts]) if len(parts) > 1 else self._batch(groups)

    def _batch(self, groups: list[list[dict[str, Any]]]) -> dict[str, Any]:
        groups = self._with_image(groups)
        rows: list[dict[str, Any]] = []
        pictures, weights, bad, undamaged = [], [], [], []
        damaged: dict[int, Any] = {}
        for number, group in enumerate(groups):
            reason, pale = "", "it has no image"
            if group[0]["image"] is not None:
                picture, reason = self._load(group[0])
                pictures.append(picture)
                pale = ""
                if not reason and self._damaged(group):
                    damaged[number], pale = self.damage.of(group[0], picture)
            places = [len(rows) + i for i, row in enumerate(group) if not row.get("padding")]
            bad += [(place, reason) for place in places if reason]
            undamaged += [(place, pale) for place in places if pale and self.damage and "epoch" in group[0]]
            weights += [0.0 if reason or row.get("padding") else 1.0 for row in group]
            rows += group
        damaged = {number: picture for number, picture in damaged.items() if picture is not None}
        packed = pack(
            [[self._tokens(row) for row in group] for group in groups],
            self.image_token_id,
            [(number, self._damaged(groups[number])) for number in damaged],
        )
        pictures += damaged.values()
        image_inputs = dict(self.processor.image_processor(pictures, return_tensors="pt")) if pictures else {}
        if isinstance(sizes := image_inputs.get("image_sizes"), torch.Tensor):
            image_inputs["image_sizes"] = sizes.tolist()
        batch = {
            "packed": packed,
            "image_inputs": image_inputs,
            "weights": torch.tensor(weights),
            "rows": rows,
            "bad_images": bad,
        }
        if self.damage is not None:
            batch["undamaged"] = undamaged
        if self.reference_logps is not None and all("place" in row for row in rows):
            batch["reference"], known = self.reference_logps.at([row["place"] for row in rows]).known()
            batch["weights"] = batch["weights"] * known
        return batch

    def _damaged(self, group: list[dict[str, Any]]) -> list[int]:
        """Which pairs of a group are run under a damaged image too."""
        if self.damage is None or group[0]["image"] is None:
            return []
        return [i for i, row in enumerate(group) if "epoch" in row and not row.get("padding")]

    def _with_image(self, groups: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        """The groups, and the stand-in's where the recipe needs an image and they have none."""
        if self.always_with_image and all(group[0]["image"] is None for group in groups):
            return [*groups, [self._stand_in(groups[0][0])]]
        return groups

    def _num_tokens(self, groups: list[list[dict[str, Any]]]) -> int:
        total = 0
        for group in self._with_image(groups):
            pairs = [self._tokens(row) for row in group]
            total += packed_length(pairs)
            if indices := self._damaged(group):
                total += packed_length(chosen_alone([pairs[i] for i in indices]))
        return total

    def _stand_in(self, row: dict[str, Any]) -> dict[str, Any]:
        """A pair of one token each under the smallest picture, without weight; its other fields are `row`'s."""
        geometry = processor_geometry(self.processor)
        side = geometry.image_size
        answer = row["chosen_ids"][:1]
        return {
            **row,
            "prompt_ids": [*row["prompt_ids"][:1], self.image_token_id],
            "chosen_ids": answer,
            "rejected_ids": answer,
            "num_image_tokens": geometry.num_image_tokens(side, side),
            "image": images.grey_like(side, side),
            "image_hash": "",
            "width": side,
            "height": side,
            "padding": True,
        }

    def _tokens(self, row: dict[str, Any]) -> TokenPair:
        rejected = None if self.without_rejected and "epoch" in row else row["rejected_ids"]
        return TokenPair(full_prompt_ids(row, self.image_token_id), row["chosen_ids"], rejected)

    def _load(self, row: dict[str, Any]):
        from ..data.image_store import load_image  # needs pyarrow and datasets, which the step itself does not

        try:
            picture = load_image(row["image"])
            if picture.size != (row["width"], row["height"]):  # other than counted: a file that was changed since
                raise images.ImageError(
                    "it is {}x{} now, and was {}x{} when the data was read".format(
                        *picture.size, row["width"], row["height"]
                    )
                )
            return picture, ""
        except (images.ImageError, OSError) as err:
            return images.grey_like(row["width"], row["height"]), str(err)

    def _group(self, features: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        if not self.group_by_image:
            return [[row] for row in features]
        # the image shown, which for `ScoredRows` with another image is not the row's own
        keys = [row.get("shown_hash", row["image_hash"]) if row["image"] is not None else "" for row in features]
        runs = image_runs(keys, range(len(features)), self.max_pairs_per_image)
        return [[features[index] for index in run] for run in runs]
