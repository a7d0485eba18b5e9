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

        The need falls along a line, and where recomputing one layer is the peak it stays flat. So the chord between a
        count that needs too much and one that fits is not below the need, and where it meets the limit fits as well:
        a few traces are enough.
        """
        if self.need(0) <= limit:
            return 0
        if self.need(self.layers) > limit:
            return None
        less, enough = 0, self.layers  # recomputing `less` layers needs too much memory
        while enough - less > 1:
            slope = (self.need(less) - self.need(enough)) / (enough - less)
            guess = less + math.ceil((self.need(less) - limit) / slope)
            guess = min(max(guess, less + 1), enough - 1)
            if self.need(guess) <= limit:
                enough = guess
            else:
                less = guess
        return enough
