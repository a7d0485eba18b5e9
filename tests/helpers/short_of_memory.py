"""`helpers.ranks` on processes that believe to be GPUs of different size: `python -m helpers.short_of_memory …`.

The first has room for everything; the second for one recomputed layer, and runs out of memory on its first try.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from helpers.ranks import train
from llava_orpo.training import recompute


def pretend() -> None:
    """Replaces the two places where a GPU's memory shows: what there is, and the failure of a forward."""
    second, fits, tries = os.environ["RANK"] == "1", recompute.FewestLayers._fits, []
    planned = recompute.FewestLayers._planned

    def fails_first(self, batch):
        tries.append(batch)
        return fits(self, batch) and not (second and len(tries) == 1)

    def by_size(self, limit, layers):
        return planned(self, int(self.traces().need(1)) + 1 if second else limit, layers)

    recompute.memory_limit = lambda device: int(1e12)
    recompute.FewestLayers._fits, recompute.FewestLayers._planned = fails_first, by_size


if __name__ == "__main__":
    pretend()
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one)
    torch.distributed.destroy_process_group()
