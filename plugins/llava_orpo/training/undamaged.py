"""The pairs that a training has without their image term: said at the first of them, and counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from llamafactory.extras import logging

logger = logging.get_logger("llamafactory." + __name__)


class Undamaged:
    """Pairs without a damaged image, as the collator lists them in `undamaged`, each once however often it is drawn."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[str, int], str] = {}

    def note(self, batch: dict[str, Any]) -> None:
        """Counts those of a batch."""
        for index, reason in batch.get("undamaged", ()):
            row = batch["rows"][index]
            if not self._reasons:
                name = row["pair_id"] or f"row {row['place']}"
                logger.warning(f"Pair {name} has no image term, as all such pairs: {reason}.")
            self._reasons[row["dataset"], row["place"]] = reason

    def summarize(self, processes: int) -> dict[str, int]:
        """{reason: pairs of all processes}; logs it where there are any."""
        parts = [self._reasons]
        if processes > 1:
            parts = [None] * processes
            torch.distributed.all_gather_object(parts, self._reasons)
        counts = dict(Counter({key: reason for part in parts for key, reason in part.items()}.values()))
        if counts:
            said = "; ".join(f"{count} pairs, because {reason}" for reason, count in sorted(counts.items()))
            logger.warning_rank0(f"Without an image term: {said}.")
        return counts
