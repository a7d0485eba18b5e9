"""Stage 1: loss and every gradient of the packed step against a plain forward of two whole sequences per pair.

The reference is transformers' own model in fp32 without TF32. What is allowed:

fp32  loss 1e-5 relative, each gradient 1e-4: both sides compute the same sums, of some thousand terms of 6e-8 rounding
      each, in another order and with other kernels. A mask that lets one answer see the other is off by 0.5.
bf16  as autocast trains. Rounding differs between the two sides, so neither is the truth: the packed step may be no
      further from the fp32 reference than 1.5 times as far as the plain forward under bf16 itself (all gradients as one
      vector), and in no single tensor further than 3 times the plain forward's worst; the loss 1e-3 relative.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..step import attention
from ..step.model import keep_four_bit_trainable
from ..tiny.shapes import Geometry, config
from . import models
from .machine import SMALLEST, Machine
from .record import FAILED, Entry, LeftOut, Record, Unmeasured

TITLE = "1 correctness"
# The 7B's head width of 128 and its grouped heads, few layers: kernels are chosen by these.
GEOMETRY = Geometry((512, 1024, 3, 4, 2), (64, 128, 3, 2), tile=56)
FP32_LOSS, FP32_GRADIENT = 1e-5, 1e-4
BF16_LOSS, BF16_ALL, BF16_WORST = 1e-3, 1.5, 3.0
SCALE = 3.0  # 0.02 of a normal start leaves attention nearly uniform: a wrong mask would hardly show
KERNELS = ("scaled_dot_product", "flash", "fmha", "mem_eff", "cudnn", "flex")
NEW_SHAPES = tuple(range(2_411, 2_651, 30))  # tokens, none a multiple of another's block


@dataclass(frozen=True)
class Case:
    """dtype: of autocast, fp32 means none. grouped: pairs of one image share its tokens."""

    dtype: str
    backend: str
    grouped: bool
    recompute: str

    def __str__(self) -> str:
        grouped = "grouped" if self.grouped else "single"
        return f"{self.dtype}, {self.backend}, {grouped}, recompute {self.recompute}"


CASES = [
    Case(*parts)
    for parts in itertools.product(("fp32", "bf16"), attention.BACKENDS, (False, True), reversed(models.RECOMPUTE))
]


@dataclass(frozen=True)
class Result:
    """Of one forward and backward: the loss, and each gradient by its parameter's name, in fp64 on the CPU."""

    loss: float
    gradients: dict[str, torch.Tensor]


class Bench:
    """The model, the batches, and the plain results, each computed once."""

    def __init__(self, device: torch.device):
        self.device = device
        geometry = GEOMETRY if device.type == "cuda" else SMALLEST
        self.settings = config(geometry)
        self.model = models.random_model(geometry, device, torch.float32)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(SCALE)
                parameter.requires_grad_("vision_tower" not in name)
        self.model.train()
        keep_four_bit_trainable(self.model)
        self._plain: dict[tuple[str, bool], Result] = {}

    def batch(self, grouped: bool) -> models.Batch:
        """Answers of unequal lengths on two images; grouped: three pairs on the first."""
        wide = models.photo(self.settings, 120, 80, question=9, chosen=31, rejected=17)
        more = [
            models.photo(self.settings, 120, 80, question=q, chosen=c, rejected=r)
            for q, c, r in ((4, 5, 40), (13, 22, 1))
        ]
        tall = models.photo(self.settings, 70, 150, question=12, chosen=14, rejected=29)
        return models.batch_of([[wide, *more], [tall]] if grouped else [[wide], [tall]], self.settings, self.device)

    def packed(self, case: Case, backward: bool = True) -> Result:
        """The packed step. backward False: the loss alone."""
        attention.enable(self.model, case.backend)
        models.set_recompute(self.model, case.recompute)
        return self._run(models.our_loss, case.dtype, case.grouped, backward)

    def plain(self, dtype: str, grouped: bool) -> Result:
        """The plain forward of two whole sequences per pair."""
        if (dtype, grouped) not in self._plain:
            attention.disable(self.model)
            models.set_recompute(self.model, "none")
            self._plain[dtype, grouped] = self._run(models.plain_loss, dtype, grouped)
        return self._plain[dtype, grouped]

    def _run(self, loss_of: Callable[..., torch.Tensor], dtype: str, grouped: bool, backward: bool = True) -> Result:
        self.model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward), models.autocast(self.device, _DTYPES[dtype]):
            loss = loss_of(self.model, self.batch(grouped), self.device)
        if backward:
            loss.backward()
        named = self.model.named_parameters()
        found = {name: p.grad.double().cpu() for name, p in named if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return Result(loss.item(), found)


_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


def distance(found: Result, truth: Result) -> tuple[float, float, float]:
    """(loss, all gradients as one vector, the worst single gradient), each relative to `truth`.

    A tensor whose norm is under a thousandth of the largest one is measured against that thousandth: rounding reaches
    it from its neighbours. Raises ValueError when not the same parameters have gradients.
    """
    if found.gradients.keys() != truth.gradients.keys():
        other = sorted(found.gradients.keys() ^ truth.gradients.keys())
        raise ValueError(f"gradients of different parameters: {other[:5]}")
    if not truth.gradients:
        raise ValueError("no parameter has a gradient")
    errors = {name: (found.gradients[name] - g).norm().item() for name, g in truth.gradients.items()}
    norms = {name: g.norm().item() for name, g in truth.gradients.items()}
    floor = 1e-3 * max(norms.values())
    total = sum(e * e for e in errors.values()) ** 0.5 / sum(n * n for n in norms.values()) ** 0.5
    worst = max(error / max(norms[name], floor) for name, error in errors.items())
    return abs(found.loss - truth.loss) / abs(truth.loss), total, worst


def check(bench: Bench, case: Case) -> Entry:
    """One case, as an entry: ok, or failed with the limit that it exceeds."""
    truth = bench.plain("fp32", case.grouped)
    backward = case.backend != "flex" or bench.device.type == "cuda"
    if not backward:
        return _forward_alone(bench, case, truth)
    found = bench.packed(case)
    if fault := refused(case):
        return Entry(str(case), FAILED, {}, fault)
    loss, total, worst = distance(found, truth)
    figures: dict[str, tuple[Any, str]] = {
        "loss difference": (loss, "relative"),
        "gradient difference": (total, "relative"),
        "worst tensor": (worst, "relative"),
    }
    if case.dtype == "fp32":
        limits = (FP32_LOSS, FP32_GRADIENT, FP32_GRADIENT)
    else:
        plain = distance(bench.plain("bf16", case.grouped), truth)
        figures["plain bf16's own"] = (plain[1], "relative")
        limits = (max(BF16_WORST * plain[0], BF16_LOSS), BF16_ALL * plain[1], BF16_WORST * plain[2])
    names = ("loss", "all gradients", "worst tensor")
    over = [
        f"{name} {value:.2g}, allowed {limit:.2g}"
        for name, value, limit in zip(names, (loss, total, worst), limits, strict=True)
        if not value <= limit  # NaN too
    ]
    return Entry(str(case), FAILED if over else "ok", figures, "; ".join(over))


def refused(case: Case) -> str:
    """Why FlexAttention, which the case is about, was not used: then its figures are SDPA's. Else ""."""
    fault = attention.flex_fault() if case.backend == "flex" else ""
    return f"FlexAttention was not used, SDPA served: {fault}" if fault else ""


def check_in_time(machine: Machine, bench: Bench, case: Case) -> Entry:
    """`check`, or LeftOut once the time is up."""
    machine.in_time()
    return check(bench, case)


def _forward_alone(bench: Bench, case: Case, truth: Result) -> Entry:
    if case.recompute != "none":
        raise Unmeasured("FlexAttention has no backward on a CPU")
    found = bench.packed(case, backward=False).loss
    if fault := refused(case):
        return Entry(str(case), FAILED, {}, fault)
    loss = abs(found - truth.loss) / abs(truth.loss)
    limit = FP32_LOSS if case.dtype == "fp32" else BF16_LOSS
    note = "forward alone: FlexAttention has no backward on a CPU"
    return Entry(str(case), "ok" if loss <= limit else FAILED, {"loss difference": (loss, "relative")}, note)


def kernels(bench: Bench, case: Case) -> dict[str, tuple[Any, str]]:
    """{operator or kernel of attention: calls} in one step, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    bench.packed(case)  # compiled and planned before it is recorded
    if fault := refused(case):
        raise LeftOut(fault)
    with torch.profiler.profile(activities=activities) as recorded:
        bench.packed(case)
    counts: Counter[str] = Counter()
    for event in recorded.key_averages():
        is_choice = event.key == "aten::scaled_dot_product_attention" or "autograd" in event.key.lower()
        if any(word in event.key.lower() for word in KERNELS) and not is_choice:
            counts[event.key[:70]] += event.count
    if not counts:
        raise ValueError("the profiler saw no attention kernel")
    return {name: (count, "calls") for name, count in counts.items()}


def cudnn_attention(device: torch.device, allowed: bool) -> None:
    """Lets SDPA choose cuDNN's kernel, or not."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def new_shapes(machine: Machine, allowed: bool) -> dict[str, tuple[Any, str]]:
    """Milliseconds of causal attention at the 7B's heads, forward and backward, at lengths seen first and again.

    A kernel that plans for each shape shows as a first time far above the second.
    """
    machine.on_cuda("attention at new shapes")
    cudnn_attention(machine.device, allowed)
    options = {"device": machine.device, "dtype": torch.bfloat16, "requires_grad": True}

    def attend(tokens: int) -> None:
        q, k, v = (torch.randn(1, 32, tokens, 128, **options) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    attend(2_400)
    # other lengths for each setting, so that none was seen before
    lengths = [tokens + (7 if allowed else 0) for tokens in NEW_SHAPES]
    first, again = ([machine.seconds(lambda n=n: attend(n)) * 1e3 for n in lengths] for _ in range(2))
    return {"first time, mean": (sum(first) / len(first), "ms"), "again, mean": (sum(again) / len(again), "ms")}


def run(machine: Machine, record: Record) -> None:
    """All cases, then the kernels that were chosen with cuDNN's attention on and off."""
    with full_precision():
        bench = Bench(machine.device)
        for case in CASES:
            record.attempt(str(case), lambda case=case: check_in_time(machine, bench, case))
        allowed_before = torch.backends.cuda.cudnn_sdp_enabled()
        try:
            for allowed in (True, False):
                word = "cuDNN on" if allowed else "cuDNN off"
                cudnn_attention(machine.device, allowed)
                for dtype, backend in itertools.product(("fp32", "bf16"), attention.BACKENDS):
                    case = Case(dtype, backend, True, "none")
                    if machine.device.type != "cuda" and (backend == "flex" or not allowed):
                        continue  # a CPU has one choice
                    record.attempt(f"kernels, {dtype}, {backend}, {word}", lambda case=case: kernels(bench, case))
                record.attempt(f"attention at new shapes, {word}", lambda allowed=allowed: new_shapes(machine, allowed))
        finally:
            cudnn_attention(machine.device, allowed_before)


class full_precision:
    """Inside, fp32 products on the card are fp32 and not TF32."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
