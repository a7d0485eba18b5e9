"""What touches the inside of transformers 5.5.4, PEFT 0.18 and accelerate 1.11, in one place.

Each function says what it works around. `other_versions` says when another version is installed than these were
written for; tests/test_upstream.py fails once a work-around is no longer needed.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WRITTEN_FOR = {"transformers": "5.5.4", "accelerate": "1.11.0", "peft": "0.18.1"}


def other_versions() -> str:
    """The installed versions that differ from `WRITTEN_FOR`, as one sentence; "" if all are the same."""
    found = {name: importlib.metadata.version(name) for name in WRITTEN_FOR}
    other = [
        f"{name} {found[name]} (written for {wanted})" for name, wanted in WRITTEN_FOR.items() if found[name] != wanted
    ]
    return f"Other versions than this plugin was written for: {', '.join(other)}." if other else ""


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Inside, models are built as without DeepSpeed.

    With a ZeRO-3 configuration alive, transformers 5.5.4 enters `deepspeed.zero.Init` in every `_from_config`
    (modeling_utils.py), which cannot initialize weights on the meta device.
    """
    from transformers.integrations import deepspeed

    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive


def keep_present_layer_names(model: torch.nn.Module) -> None:
    """Takes the names of classes that the model does not have out of `_no_split_modules`, in the model and its parts.

    LlavaNextPreTrainedModel names LlamaDecoderLayer whatever its language model is (modeling_llava_next.py), and both
    PEFT's and accelerate's FSDP wrap policies stop at a name that they do not find.
    """
    present = {type(module).__name__ for module in model.modules()}
    for module in model.modules():
        names = getattr(module, "_no_split_modules", None)
        if names:
            module._no_split_modules = {name for name in names if name in present}


def _same_storage(storage, location: str):
    return storage if re.fullmatch(r"cpu:\d+", location) else None


def load_onto_numbered_cpus() -> None:
    """Lets `torch.load(map_location="cpu:0")` work, which torch 2.11 refuses: a CPU is a CPU.

    In several processes on CPUs transformers' Trainer loads the optimizer onto its device, and that is cpu:0.
    """
    if not any(entry[2] is _same_storage for entry in torch.serialization._package_registry):
        torch.serialization.register_package(40, lambda storage: None, _same_storage)
