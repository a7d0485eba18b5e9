"""Lets accelerate 1.11 shard on CPUs, which it offers for accelerators only; torch's FSDP itself works on a CPU.

`python -m helpers.cpu_fsdp recipes.json` is `helpers.ranks` with that change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel, _state_dict_utils

from helpers.ranks import train


def allow() -> None:
    """Replaces two initializers (the state's for the choice of FSDP, FSDP1's for the device) and FSDP1's offloading.

    To move whole parameters to the CPU before they are saved is a view of them on a CPU, which FSDP1 then frees: the
    first process would write freed memory.
    """
    start, wrap = state.AcceleratorState.__init__, FullyShardedDataParallel.__init__
    unshard = _state_dict_utils._enter_unshard_params_ctx

    def started(self, *args, fsdp_plugin=None, **more):
        start(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    def wrapped(self, *args, **more):
        wrap(self, *args, **{**more, "device_id": torch.device("cpu")})  # not cpu:0, which FSDP1 takes for another

    def unsharded(*args, **more):
        unshard(*args, **{**more, "offload_to_cpu": False})

    _state_dict_utils._enter_unshard_params_ctx = unsharded
    state.AcceleratorState.__init__, FullyShardedDataParallel.__init__ = started, wrapped


if __name__ == "__main__":
    allow()
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one)
