"""Stage 2: seconds a pair and peak memory of both steps at the true 7B shapes, beside what the plan predicts.

Every cell runs micro-batches of a training that accumulates: LoRA's gradients and two Adam moments per trained weight
are alive. LLaMA-Factory's side is its own `get_batch_loss_metrics`; where it is not installed, a plain forward of two
whole sequences per pair stands in (lighter: it keeps log-probs of answer positions alone). Recomputation of both sides
is transformers' own gradient checkpointing of each decoder layer, or under `auto` of as many as `recompute: auto` takes
from the plan for this card's free memory.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32

from ..plan import gpus
from ..plan.trace import Setting, Tracker, trace
from ..tiny.shapes import Geometry, config
from ..upstream import import_llamafactory
from . import models
from .machine import Machine, installed
from .record import Entry, LeftOut, Record, free_memory

TITLE = "2 seconds a pair and peak memory"
OURS, STOCK = "shared prefix", "LLaMA-Factory"
PAIRS = (1, 4)  # of one image; LLaMA-Factory takes them as one padded batch
REPEATS = 3
PREDICTED_FILE = Path(__file__).parents[3] / "benchmarks" / "results" / "plan_7b.json"
PREDICTED_ROWS = {  # of that file; NF4
    (OURS, 1, "all"): "recipe",
    (OURS, 4, "all"): "shared prefix, 4, on",
    (OURS, 1, "none"): "shared prefix, 1, off",
    (OURS, 4, "none"): "shared prefix, 4, off",
    (STOCK, 1, "all"): "LLaMA-Factory, 1, on",
    (STOCK, 1, "none"): "LLaMA-Factory, 1, off",
}


@dataclass(frozen=True)
class Cell:
    """weights: "nf4" or "bf16". side: `OURS` or `STOCK`. pairs: on one image. recompute: of `RECOMPUTE`."""

    weights: str
    pairs: int
    recompute: str
    side: str

    def __str__(self) -> str:
        return f"{self.weights}, {self.side}, {self.pairs} per image, recompute {self.recompute}"


AUTO = "auto"
RECOMPUTE = ("all", AUTO, "none")
# What a reader asks first comes first: the time may be up before the end.
CELLS = [
    Cell(weights, pairs, recompute, side)
    for weights, pairs, recompute, side in itertools.product(models.WEIGHTS, PAIRS, RECOMPUTE, (OURS, STOCK))
    if recompute in models.RECOMPUTE or side == OURS
]


@dataclass
class Trainee:
    """A model on the device that is trained, with gradients and Adam's moments allocated."""

    model: Any
    optimizer: torch.optim.Optimizer
    weights: str

    def trained(self) -> list[torch.nn.Parameter]:
        return self.optimizer.param_groups[0]["params"]


def trainee(machine: Machine, weights: str) -> Trainee:
    """The model with these weights, kept on the device until another one is asked for. Raises LeftOut."""
    held = machine.shared.get("trainee")
    if held is not None and held.weights == weights:
        return held
    del held
    machine.shared.pop("trainee", None)
    free_memory()
    if weights == "nf4" and not installed("bitsandbytes"):
        raise LeftOut("bitsandbytes is not installed")
    machine.in_time()
    model = models.random_model(machine.geometry, machine.device, torch.bfloat16, nf4=weights == "nf4")
    model = models.with_lora(model)
    model.forward = convert_outputs_to_fp32(model.forward)  # as accelerate wraps a model under mixed precision
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    machine.shared["trainee"] = made = Trainee(model, optimizer, weights)
    return made


def batch_for(machine: Machine, pairs: int) -> models.Batch:
    """Pairs on one 640x480 photograph, of the lengths that the plan assumes."""
    settings = config(machine.geometry)
    return models.batch_of([[models.photo(settings)] * pairs], settings, machine.device)


def side_loss(machine: Machine, model, side: str) -> Callable[..., torch.Tensor]:
    """Readies the model for a side and returns its loss."""
    if side == OURS:
        return models.enable_ours(model, machine.device)
    return models.enable_other(model, models.stock_loss if machine.full else models.plain_loss)


def micro_batch(machine: Machine, model, loss_of: Callable[..., torch.Tensor], batch: models.Batch) -> torch.Tensor:
    """Forward and backward under bf16 autocast, as one of two micro-batches; returns the loss, on the device."""
    with models.autocast(machine.device, torch.bfloat16):
        loss = loss_of(model, batch, machine.device)
    (loss / 2).backward()
    return loss.detach()


def measure(machine: Machine, cell: Cell, predictions: Predictions) -> Entry:
    """One cell. Running out of memory is for the caller to catch: the card does not hold it."""
    predicted, note = predictions.of(cell)
    if cell.recompute == AUTO and "layers" not in predicted:
        raise LeftOut(note)
    held = trainee(machine, cell.weights)
    machine.in_time()
    batch = batch_for(machine, cell.pairs)
    loss_of = side_loss(machine, held.model, cell.side)
    models.set_recompute(held.model, predicted["layers"] if cell.recompute == AUTO else cell.recompute)

    def step() -> torch.Tensor:
        return micro_batch(machine, held.model, loss_of, batch)

    figures: dict[str, tuple[Any, str]] = {}
    if machine.device.type == "cuda":
        loss = step()
        torch.cuda.reset_peak_memory_stats(machine.device)
        seconds = sorted(machine.seconds(step) for _ in range(REPEATS))[REPEATS // 2]
        peak = torch.cuda.max_memory_allocated(machine.device)
        figures["peak allocated"] = (peak / 1e9, "GB")
        figures["peak reserved"] = (torch.cuda.max_memory_reserved(machine.device) / 1e9, "GB")
    else:
        loss, peak = tracked(held, step)
        seconds = machine.seconds(step)
        figures["peak, storages followed"] = (peak / 1e9, "GB")
    figures = {"time per pair": (seconds / cell.pairs, "s"), **figures, "loss": (loss.item(), "nats")}
    if cell.recompute == AUTO:
        figures["layers recomputed"] = (predicted["layers"], f"of {machine.geometry.text[2]}")
    if predicted.get("peak"):
        figures["predicted peak"] = (predicted["peak"] / 1e9, "GB")
        figures["predicted / measured"] = (predicted["peak"] / peak, "")
    if predicted:
        figures["FLOPs per pair"] = (predicted["flops"] / 1e12, "TFLOP")
        figures |= utilization(machine, predicted["flops"] * cell.pairs / seconds)
    return Entry(name_of(machine, cell), "ok", figures, note)


def name_of(machine: Machine, cell: Cell) -> str:
    """The cell, with what stands in for LLaMA-Factory where that is not installed."""
    return str(cell) if machine.full else str(cell).replace(STOCK, "plain forward")


def tracked(held: Trainee, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(result, bytes of storages alive at the peak) of a step on a CPU, by the plan's tracker."""
    tracker = Tracker()
    for tensor in (*held.model.parameters(), *held.model.buffers()):
        tracker.add(tensor)
        state = getattr(tensor, "quant_state", None)
        for part in () if state is None else (state.absmax, state.offset, getattr(state.state2, "absmax", None)):
            tracker.add(part)
    for state in held.optimizer.state.values():
        for tensor in state.values():
            tracker.add(tensor)
    for parameter in held.trained():
        tracker.add(parameter.grad)
    with tracker:
        loss = step()
    return loss, tracker.peak


def utilization(machine: Machine, rate: float) -> dict[str, tuple[Any, str]]:
    """Model FLOP utilization: the step's FLOPs (recomputed ones count) per second, over the card's dense bf16 rate."""
    if machine.device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(machine.device)
    known = gpus.of_card(found.name, found.total_memory)
    if known is None:
        return {"rate": (rate / 1e12, "TFLOP/s")}
    return {
        "rate": (rate / 1e12, "TFLOP/s"),
        f"utilization of {known.rate / 1e12:g} TFLOP/s": (100 * rate / known.rate, "%"),
    }


# predictions ------------------------------------------------------------------------------------------------------


def predict(geometry: Geometry, cell: Cell, target: str, limit: float | None = None) -> dict[str, float]:
    """{"peak": bytes, "flops": of a pair's step} of a cell by the plan's trace, which needs LLaMA-Factory.

    Under `AUTO` also "layers": how many are recomputed for the step to fit `limit` bytes with the plan's reserve (None:
    for all but one to be kept, as a dry run does). Raises LeftOut where it does not fit.
    """
    import_llamafactory()
    settings = config(geometry)
    rank = min(models.LORA_RANK, geometry.text[0] // 4)
    setting = Setting(
        target=target,
        quantized=cell.weights == "nf4",
        checkpointing=cell.recompute != "none",
        lora_rank=rank,
        lora_targets=(*models.DECODER_LAYERS, *models.PROJECTOR_LAYERS),
        freeze_projector=False,
        shared=cell.side == OURS,
        beta=models.BETA,
    )
    groups = [[models.photo(settings)] * cell.pairs]
    if cell.recompute != AUTO:
        found = trace(settings, setting, groups)
        return {"peak": found.peak, "flops": found.flops / found.pairs}
    from ..plan.recomputed import Recomputed
    from ..plan.report import RESERVE

    traces = Recomputed(settings, setting, groups, lambda traced: traced.peak + RESERVE)
    count = traces.fewest(traces.need(1) if limit is None else limit)
    if count is None:
        raise LeftOut(f"computed: does not fit {limit / 1e9:.1f} GB with all layers recomputed")
    found = traces.at(count)
    return {"peak": found.peak, "flops": found.flops / found.pairs, "layers": count}


def _without_card() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a context of theirs would take memory from what is measured


class Predictions:
    """What the plan says of each cell: traced in processes of their own while the card works, or read from its file."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self._pool: ProcessPoolExecutor | None = None
        self._futures: dict[Cell, Future] = {}
        if machine.full and not machine.dry_run:  # 10 to 30 s each: started now, they are there when they are asked for
            limit = torch.cuda.mem_get_info(machine.device)[0]
            # half of the cores: the card's own process and, in stage 3, dataloader workers need the others
            workers = max(1, min(8, (os.cpu_count() or 2) // 2))
            self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _without_card)
            self._futures = {cell: self._pool.submit(predict, machine.geometry, cell, "cuda", limit) for cell in CELLS}

    def of(self, cell: Cell) -> tuple[dict[str, float], str]:
        """({"peak", "flops"} as far as they are known, why they are not)."""
        if not self._machine.full:
            return self._from_file(cell)
        try:
            if self._machine.dry_run:
                return predict(self._machine.geometry, cell, "cpu"), ""
            return self._futures[cell].result(timeout=120), ""
        except LeftOut as error:
            return {}, str(error)
        except Exception as error:  # the measurement itself is worth having without
            return {}, f"not predicted: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    def _from_file(self, cell: Cell) -> tuple[dict[str, float], str]:
        row = PREDICTED_ROWS.get((cell.side, cell.pairs, cell.recompute))
        if self._machine.dry_run or row is None or not PREDICTED_FILE.is_file():
            return {}, "not predicted without LLaMA-Factory"
        found = json.loads(PREDICTED_FILE.read_text(encoding="utf-8"))["rows"][row]["photo"]
        out = {"flops": found["flops"] / found["pairs"]}
        if cell.weights == "nf4" and cell.side == OURS:
            out["peak"] = found["peak"]
        return out, ""

    def wait(self) -> None:
        """Waits until all are known: the processes that trace would keep the host from launching kernels in time."""
        wait(self._futures.values(), timeout=120)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def run(machine: Machine, record: Record) -> None:
    """All cells in the order of their worth."""
    predictions = machine.shared.get("predictions") or Predictions(machine)
    predictions.wait()
    try:
        for cell in CELLS:
            record.attempt(name_of(machine, cell), lambda cell=cell: measure(machine, cell, predictions))
    finally:
        predictions.close()
