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
from torch.distributed.fsdp import FullyShardedDataParallel, _optim_utils, _state_dict_utils

from helpers.ranks import train


def allow() -> None:
    """Replaces two initializers (the state's for the choice of FSDP, FSDP1's for the device) and FSDP1's offloading.

    What FSDP1 saves it first moves to the CPU. On a CPU that is a view of its own buffers, which it then frees (whole
    parameters) or uses again (both moments of the optimizer would be the second one); without it FSDP1 copies.
    """
    start, wrap = state.AcceleratorState.__init__, FullyShardedDataParallel.__init__
    unshard, unflatten = _state_dict_utils._enter_unshard_params_ctx, _optim_utils._unflatten_orig_param_states

    def started(self, *args, fsdp_plugin=None, **more):
        start(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def wrapped(self, *args, **more):
        wrap(self, *args, **{**more, "device_id": torch.device("cpu")})  # not cpu:0, which FSDP1 takes for another

    def unsharded(*args, **more):
        unshard(*args, **{**more, "offload_to_cpu": False})

    def unflattened(info, states, name, shard, to_save, cpu_offload):
        unflatten(info, states, name, shard, to_save, False)

    _state_dict_utils._enter_unshard_params_ctx = unsharded
    _optim_utils._unflatten_orig_param_states = unflattened
    state.AcceleratorState.__init__, FullyShardedDataParallel.__init__ = started, wrapped


if __name__ == "__main__":
    allow()
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one)
