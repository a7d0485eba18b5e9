"""How few decoder layers must be recomputed for a batch to fit a GPU (`recompute: auto`), by tracing the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from .trace import PairSize, Setting, Traced, trace


class Recomputed:
    """Traces of one batch by the number of recomputed decoder layers, each made when it is first asked for.

    need: bytes that a GPU must have for a trace (`report.engines`).
    """

    def __init__(
        self, config, setting: Setting, groups: Sequence[Sequence[PairSize]], need: Callable[[Traced], float]
    ) -> None:
        self.config, self.setting, self.groups = config, setting, groups
        self.layers = config.get_text_config().num_hidden_layers
        self._need, self._traced = need, {}

    def at(self, count: int) -> Traced:
        """The trace with the first `count` layers recomputed."""
        if count not in self._traced:
            setting = replace(self.setting, checkpointing=True, recompute=count)
            self._traced[count] = trace(self.config, setting, self.groups)
        return self._traced[count]

    def need(self, count: int) -> float:
        """Bytes that a GPU must have with the first `count` layers recomputed."""
        return self._need(self.at(count))

    def fewest(self, limit: float) -> int | None:
        """The smallest count whose need is at most `limit` bytes; None if even all layers recomputed need more.

        Each layer saves the same until recomputing one layer is the peak. So the saving of the first is the most that
        each can save: no smaller count than it says can be enough, and where that count is enough it is the answer.
        """
        if self.need(0) <= limit:
            return 0
        saved = self.need(0) - self.need(1)
        least = math.ceil((self.need(0) - limit) / saved) if saved > 0 else self.layers
        if least < self.layers and self.need(least) <= limit:
            return least
        if self.need(self.layers) > limit:
            return None
        less, enough = min(least, self.layers - 1), self.layers
        while enough - less > 1:
            middle = (less + enough) // 2
            if self.need(middle) <= limit:
                enough = middle
            else:
                less = middle
        return enough
