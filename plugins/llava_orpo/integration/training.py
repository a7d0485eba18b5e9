"""Training: hands the running recipe's state to `training.workflow`. See `swaps.SWAPS`."""

from __future__ import annotations

import functools

from ..training import workflow
from .run import current


def run_dpo(original):
    """Replaces llamafactory.train.tuner.run_dpo."""

    @functools.wraps(original)
    def run_dpo(*args, **kwargs):
        return workflow.run_dpo(current(), *args, **kwargs)

    return run_dpo
