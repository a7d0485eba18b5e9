"""Log-probs of the reference model that were computed before training, as a batch carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .packing import map_tensors


@dataclass(frozen=True, eq=False)
class ReferenceLogps:
    """Summed log-probs in nats of n pairs under the reference model, (n,) fp32 each.

    It is a class, and not a dict, because DeepSpeed casts the tensors of a batch's dicts to 16 bits.

    NaN: not known, because the image could not be decoded.

    damaged: of the chosen answer under the damaged image; None where the loss does not need it.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    damaged: torch.Tensor | None = None

    def at(self, places: Sequence[int]) -> ReferenceLogps:
        """Those of the pairs with these numbers."""
        return map_tensors(self, lambda x: x[torch.tensor(places)])

    def known(self) -> tuple[ReferenceLogps, torch.Tensor]:
        """(these with 0 in place of NaN, (n,) fp32: 0.0 where one is not known)."""
        mark = torch.isfinite(self.chosen).float()
        return map_tensors(self, torch.nan_to_num), mark

    def terms(self) -> dict[str, torch.Tensor]:
        """By the names of `training.objective.log_probs`."""
        found = {"chosen_sum": self.chosen, "rejected_sum": self.rejected, "damaged_sum": self.damaged}
        return {name: values for name, values in found.items() if values is not None}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ReferenceLogps:
        """On `device`, as `PackedBatch.to`."""
        return map_tensors(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ReferenceLogps:
        """Called by `DataLoader(pin_memory=True)`."""
        return map_tensors(self, torch.Tensor.pin_memory)
