"""A model made ready for the shared-prefix step, and the one forward that scores a batch with it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from . import attention
from .packing import PackedBatch, response_logps
from .vision_tower import skip_unread_vision_layers


class PackedLogps(NamedTuple):
    """One forward over a batch of R responses with K tokens.

    packed   the batch on the model's device
    logits   (1, K, V) at `packed.logits_to_keep`
    sums     (R,) fp32, summed log-prob of each response in nats, in the order of `PackedBatch`
    lengths  (R,) int64, tokens per response
    """

    packed: PackedBatch
    logits: torch.Tensor
    sums: torch.Tensor
    lengths: torch.Tensor


def prepare(model, device: torch.device | str, backend: str = "auto", cudnn_attention: bool = False) -> str:
    """Gives the model shared-prefix attention and keeps its 4-bit layers trainable; returns a line for the log.

    cudnn_attention: see `attention.choose_cudnn`; it holds for the whole process, the vision tower too.
    Raises ValueError for a backend or a model that cannot be served (see `attention.enable`).
    """
    chosen, reason = attention.choose_backend(device, backend)
    attention.enable(model, chosen)
    keep_four_bit_trainable(model)
    return f"Shared-prefix attention: {chosen} ({reason}). {attention.choose_cudnn(device, cudnn_attention)}".rstrip()


def packed_logps(model, batch: dict[str, Any], device: torch.device, skip_unread: bool = True) -> PackedLogps:
    """Scores every response of a batch of `SharedPrefixCollator`, with gradients unless the caller turns them off.

    skip_unread: leave out the vision layers that LLaVA does not read; only for a frozen vision tower.
    """
    packed = batch["packed"].to(device)
    image_inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch["image_inputs"].items()
    }
    with skip_unread_vision_layers(attention.unwrap(model)) if skip_unread else nullcontext():
        logits = attention.packed_forward(model, packed, **image_inputs)
    sums, lengths = response_logps(logits, packed)
    return PackedLogps(packed, logits, sums, lengths)


def keep_four_bit_trainable(model) -> None:
    """Turns off bitsandbytes' inference kernels for AVX512-BF16 CPUs (0.50.2: nn.Linear4bit).

    Their first forward in eval mode repacks the weights for good; training after an evaluation would then run without
    gradients for the layers before, with only a warning. The attribute has no effect on CUDA layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
