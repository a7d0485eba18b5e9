"""Named GPUs: memory and dense bf16 rate, from the makers' data sheets. Nothing here was measured by this project."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .. import keys
from ..errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """memory in bytes, as the driver reports it; rate in dense bf16 FLOP/s with fp32 accumulation."""

    name: str
    memory: int
    rate: float
    source: str


def _gpu(name: str, mebibytes: int, tflops: float, source: str) -> Gpu:
    return Gpu(name, mebibytes * 2**20, tflops * 1e12, source)


GPUS = {
    "rtx3090": _gpu("RTX 3090", 24576, 71, "NVIDIA Ampere GA102 whitepaper"),
    "rtx4090": _gpu("RTX 4090", 24564, 165.2, "NVIDIA Ada GPU architecture whitepaper"),
    "l4": _gpu("L4", 23034, 121, "NVIDIA L4 data sheet (half of the rate with sparsity)"),
    "a10g": _gpu("A10G", 23028, 70, "AWS G5 documentation"),
    "a6000": _gpu("RTX A6000", 49140, 154.8, "NVIDIA RTX A6000 data sheet (half of the rate with sparsity)"),
    "l40s": _gpu("L40S", 46068, 362, "NVIDIA L40S data sheet"),
    "a100-40": _gpu("A100 40 GB", 40960, 312, "NVIDIA A100 data sheet"),
    "a100-80": _gpu("A100 80 GB", 81920, 312, "NVIDIA A100 data sheet"),
    "h100": _gpu("H100 SXM", 81559, 989.4, "NVIDIA H100 data sheet (half of the rate with sparsity)"),
    "h200": _gpu("H200", 143771, 989.4, "NVIDIA H200 data sheet (half of the rate with sparsity)"),
}
_CARDS = {  # how drivers write a card's name, as words in order
    "rtx3090": ("RTX", "3090"),
    "rtx4090": ("RTX", "4090"),
    "l4": ("L4",),
    "a10g": ("A10G",),
    "a6000": ("RTX", "A6000"),
    "l40s": ("L40S",),
    "a100-40": ("A100",),
    "a100-80": ("A100",),
    "h100": ("H100",),
    "h200": ("H200",),
}
_OTHER = {"TI", "SUPER", "LAPTOP", "D", "MAX", "NVL", "MIG"}  # words of cards with another rate than their namesakes
SHOWN = ("rtx4090", "a100-80", "h100")


def of_card(name: str, memory: int) -> Gpu | None:
    """The entry of a card by its driver's name and its memory in bytes; None for a card that is not in the table."""
    words = re.findall(r"[A-Z0-9]+", name.upper())
    if _OTHER & set(words) or ("H100" in words and "PCIE" in words):
        return None
    for key, card in _CARDS.items():
        found = [word for word in words if word in card]
        if found == list(card) and abs(GPUS[key].memory - memory) < 0.1 * memory:
            return GPUS[key]
    return None


def named(names: str | None) -> list[Gpu]:
    """The GPUs of `a,b`, or a usual choice. Raises UsageError naming the nearest name that is known."""
    chosen = [name.strip() for name in names.split(",")] if names else list(SHOWN)
    problems = []
    for name in chosen:
        if name not in GPUS:
            near = keys.nearest(name, GPUS)
            problems.append(
                f"gpu={name} is not known; " + (f"did you mean {near}?" if near else f"use one of {', '.join(GPUS)}.")
            )
    if problems:
        raise UsageError(*problems)
    return [GPUS[name] for name in chosen]
