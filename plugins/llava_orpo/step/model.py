"""A model made ready for the shared-prefix step."""

from __future__ import annotations


def keep_four_bit_trainable(model) -> None:
    """Turns off bitsandbytes' inference kernels for AVX512-BF16 CPUs (0.50.2: nn.Linear4bit).

    Their first forward in eval mode repacks the weights for good; training after an evaluation would then run without
    gradients to what comes before, with no more than a warning. CUDA layers do not have the attribute's effect.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
