"""Optimizer steps with a non-finite loss or gradient: skipped on all processes, listed, and limited in a row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import json_line

ANOMALIES = "anomalies.jsonl"


class Anomalies:
    """The pairs of the running optimizer step with their losses, which stay on the device unless they are asked for.

    limit: as many bad steps in a row stop the training.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self._batches: list[tuple[list[dict[str, Any]], torch.Tensor]] = []

    def begin_step(self) -> None:
        self._batches = []

    def note(self, rows: list[dict[str, Any]], losses: torch.Tensor) -> None:
        """Keeps the pairs of a micro-batch and their losses, (n,)."""
        self._batches.append((rows, losses.detach()))

    def any_loss(self, device: torch.device) -> torch.Tensor:
        """Whether a loss of the step is not finite, as a number on the device."""
        bad = [(~torch.isfinite(losses)).any() for _, losses in self._batches]
        return torch.stack(bad).any().to(device, torch.float32) if bad else torch.zeros((), device=device)

    def pairs(self) -> list[dict[str, Any]]:
        """The pairs of this process: those whose loss is not finite, or all of them if every loss is finite."""
        found = []
        for rows, losses in self._batches:
            for row, loss in zip(rows, losses.float().tolist(), strict=False):
                entry = {"dataset": row["dataset"], "pair_id": row["pair_id"]}
                found.append({**entry, "loss": loss if math.isfinite(loss) else str(loss)})
        bad = [entry for entry in found if isinstance(entry["loss"], str)]
        return bad or found

    def skipped(self, output_dir: str, step: int, parts: list[list[dict[str, Any]]] | None, checkpoint: str) -> None:
        """Counts a skipped step, lists it, and raises UserError at the limit.

        parts: the pairs of every process, where this process writes; checkpoint: the end of the error's sentence.
        """
        self.in_a_row += 1
        path = Path(output_dir) / ANOMALIES
        if parts is not None:
            pairs = [pair for part in parts for pair in part]
            bad = [pair for pair in pairs if isinstance(pair["loss"], str)]
            reason = "non-finite loss" if bad else "non-finite gradient"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(json_line({"step": step, "reason": reason, "pairs": bad or pairs}))
        if self.in_a_row >= self.limit:
            raise UserError(
                f"{self.in_a_row} optimizer steps in a row had a non-finite loss or gradient (max_anomalies: "
                f"{self.limit}); their pairs are in {path}. Lower learning_rate "
                f"or leave those pairs out; {checkpoint}."
            )
