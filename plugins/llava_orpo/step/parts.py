"""Batches that are too long for one forward: made of parts, which are batches themselves.

A batch of `SharedPrefixCollator` that is longer than `max_tokens` holds

    parts       the batches that it is cut into, in its order; see the collator for what each holds
    rows, weights, bad_images, undamaged   those of all parts; nothing else

Loss and metrics are sums over pairs, so that forward and backward of the parts, one after the other, give the gradient
of the whole. This module needs only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

LISTED = ("bad_images", "undamaged")  # pairs of a batch, by their index in its rows


def whole_of(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The batch that is made of these."""
    rows: list[dict[str, Any]] = []
    listed: dict[str, list] = {key: [] for key in LISTED if key in parts[0]}
    for part in parts:
        for key, found in listed.items():
            found += [(len(rows) + index, reason) for index, reason in part[key]]
        rows += part["rows"]
    weights = torch.cat([part["weights"] for part in parts])
    # weights first: what transformers takes for the batch size is that of the first tensor
    return {"weights": weights, "rows": rows, **listed, "parts": list(parts)}


def parts_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The batches that are run for `batch`: itself where it is not cut."""
    return batch.get("parts", [batch])


def filled_up(batch: dict[str, Any], count: int) -> dict[str, Any]:
    """`batch` in `count` parts or more: its last one, without weight, follows as often as parts are missing.

    For engines that gather parameters in every forward, where all processes must run as many.
    """
    parts = parts_of(batch)
    if len(parts) >= count:
        return batch
    last = parts[-1]
    emptied = {key: [] for key in ("rows", *LISTED) if key in last}
    filler = {**last, "weights": torch.zeros_like(last["weights"]), **emptied, "filler": True}
    whole = {key: batch[key] for key in ("weights", "rows", *LISTED) if key in batch}
    return {**whole, "parts": [*parts, *[filler] * (count - len(parts))]}


def num_tokens(batch: dict[str, Any]) -> int:
    """The tokens that are run for `batch`, in all its parts."""
    return sum(part["packed"].num_tokens for part in parts_of(batch))


def response_tokens(batch: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the chosen and of the rejected responses of `batch`."""
    counted = [part["packed"].response_tokens for part in parts_of(batch) if not part.get("filler")]
    return sum(chosen for chosen, _ in counted), sum(rejected for _, rejected in counted)


def chosen_first(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(2n,) for the whole batch from (2n_i,) of each part, chosen first in both."""
    halves = [part.chunk(2) for part in values]
    return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
