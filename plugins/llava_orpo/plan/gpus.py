"""Named GPUs: memory and dense bf16 rate, from the makers' data sheets. Nothing here was measured by this project."""

from __future__ import annotations

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
SHOWN = ("rtx4090", "a100-80", "h100")


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
