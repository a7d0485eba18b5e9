"""Stage 4: a training through `llamafactory-cli` with the headline recipe on a random model, stopped and resumed once.

The model is written as sharded safetensors, 7B parameters in bf16 and 15 GB, into a folder that is removed at the end;
there has to be room for it. The data are photo pairs. What the run changes of the recipe is `changes`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import progress
from .machine import Machine, installed
from .record import Entry, LeftOut, Record, free_memory

TITLE = "4 training through llamafactory-cli"
ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "llava16_orpo_qlora.yaml"
STEPS, DRY_STEPS = 20, 4  # the first half before the stop
PHOTO = (640, 480)
ROOM = 6e9  # bytes beside the model: two checkpoints of LoRA and its moments, the adapter, the data
Runner = Callable[[list[str], Path], tuple[int, str]]  # (words behind llamafactory-cli, log) -> (exit code, output)


def command_line(words: list[str], log: Path) -> tuple[int, str]:
    """Runs `llamafactory-cli` of this environment; on a terminal its newest line is shown."""
    program = Path(sys.executable).parent / "llamafactory-cli"
    shown = [0.0]

    def show(follower: progress.Follower) -> None:
        if time.monotonic() - shown[0] > (1.0 if sys.stderr.isatty() else 20.0):
            shown[0] = time.monotonic()
            end = "\r\x1b[K" if sys.stderr.isatty() else ""
            text = f"{end}  {follower.seconds:.0f} s  {follower.line[:90]}"
            print(text, end="" if end else "\n", file=sys.stderr, flush=True)

    code = progress.run([str(program), *words], log, show)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return code, log.read_text(encoding="utf-8", errors="replace")


def changes(machine: Machine, folder: Path, steps: int) -> dict[str, Any]:
    """The recipe's keys that are other here. The rate is constant, so that a training of half the steps is its half."""
    half = (DRY_STEPS if machine.dry_run else STEPS) // 2
    out: dict[str, Any] = {
        "model_name_or_path": folder / "model",
        "dataset_dir": folder,
        "dataset": "photographs",
        "eval_dataset": "null",
        "eval_strategy": "no",
        "output_dir": folder / "out",
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "save_steps": half,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "report_to": "none",
        "plot_loss": "false",
        "preprocessing_num_workers": 1,
    }
    if machine.dry_run:
        out |= {"use_cpu": "true", "bf16": "false", "lora_rank": 4, "dataloader_num_workers": 0}
    return out


def check_room(folder: Path, needed: float) -> None:
    """Raises LeftOut when the folder's disk has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LeftOut(
            f"{needed / 1e9:.0f} GB are needed at {folder}, {free / 1e9:.0f} GB are free: --work names another folder"
        )


def make_model(machine: Machine, folder: Path) -> Entry:
    """Writes the model of random weights."""
    from ..tiny import random_model

    dtype = torch.float32 if machine.dry_run else torch.bfloat16
    size = sum(count for _, count in random_model.tensor_sizes(machine.geometry, dtype).values())
    check_room(folder, size + (ROOM if not machine.dry_run else 0))
    started = time.perf_counter()
    random_model.write_sharded(machine.geometry, folder / "model", dtype, machine.device)
    seconds = time.perf_counter() - started
    shards = len(list((folder / "model").glob("*.safetensors")))
    figures = {"size": (size / 1e9, "GB"), "files": (shards, ""), "written in": (seconds, "s")}
    return Entry("random model on disk", figures=figures)


def make_data(machine: Machine, folder: Path) -> None:
    """Photo pairs, one per image, as many as there are steps."""
    from ..tiny import photo_pairs

    count = DRY_STEPS if machine.dry_run else STEPS
    size = (160, 120) if machine.dry_run else PHOTO
    photo_pairs.write(folder / "photographs.parquet", photo_pairs.rows(count, 1, 68, 55, sizes=[size]))
    info = {"photographs": {"file_name": "photographs.parquet", "formatting": "rlaif_v", "ranking": True}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def train(machine: Machine, folder: Path, steps: int, run_cli: Runner) -> dict[str, tuple[Any, str]]:
    """One command, to `steps` optimizer steps in all. Raises RuntimeError with its last line when it fails."""
    words = ["train", os.path.relpath(RECIPE), *(f"{k}={v}" for k, v in changes(machine, folder, steps).items())]
    started = time.perf_counter()
    code, output = run_cli(words, folder / f"to_step_{steps}.log")
    seconds = time.perf_counter() - started
    if code:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:") or "Error" in line]
        raise RuntimeError(f"llamafactory-cli ended with {code}: {(errors or lines or ['no output'])[-1]}")
    results = json.loads((folder / "out" / "train_results.json").read_text())
    return {"whole command": (seconds, "s"), "training loop": (results["train_runtime"], "s")}


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of trainer_log.jsonl."""
    lines = (folder / "out" / "trainer_log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def examine(folder: Path, steps: int, saved: int) -> Entry:
    """Whether all steps are there, each once, with finite losses, and the second command went on from the checkpoint.

    saved: when the first half's checkpoint was written (st_mtime_ns); a training from the start would write it again.
    """
    entries = log_of(folder)
    seen = [entry["current_steps"] for entry in entries]
    losses = [float(entry["loss"]) for entry in entries]
    problems = []
    if seen != list(range(1, steps + 1)):
        problems.append(f"logged steps {seen}")
    if not losses or not all(map(math.isfinite, losses)):
        problems.append(f"losses {losses}")
    if checkpoint_time(folder, steps // 2) != saved:
        problems.append("the second command did not go on from the checkpoint")
    if not (folder / "out" / "adapter_model.safetensors").is_file():
        problems.append("no adapter was saved")
    waits = [entry["data_wait_fraction"] for entry in entries if "data_wait_fraction" in entry]
    figures = {"steps": (len(seen), ""), "first loss": (losses[0] if losses else math.nan, "nats")}
    figures["last loss"] = (losses[-1] if losses else math.nan, "nats")
    if waits:
        figures["waiting for data, mean"] = (100 * sum(waits) / len(waits), "%")
    return Entry("all steps, resumed once", "failed" if problems else "ok", figures, "; ".join(problems))


def checkpoint_time(folder: Path, step: int) -> int:
    """When the adapter of a checkpoint was written, in ns."""
    return (folder / "out" / f"checkpoint-{step}" / "adapter_model.safetensors").stat().st_mtime_ns


def run(machine: Machine, record: Record, work: Path, run_cli: Runner = command_line) -> None:
    """Writes model and data, trains half of the steps, goes on to all of them. Raises LeftOut."""
    if not machine.full:
        raise LeftOut("LLaMA-Factory is not installed, or --core was given")
    if not installed("bitsandbytes"):
        raise LeftOut("the recipe's 4-bit weights need bitsandbytes")
    machine.shared.clear()
    free_memory()
    steps = DRY_STEPS if machine.dry_run else STEPS
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="random-") as name:
        folder = Path(name).resolve()
        if record.attempt("random model on disk", lambda: make_model(machine, folder)).state != "ok":
            return
        make_data(machine, folder)
        free_memory()
        for until in (steps // 2, steps):
            what = f"to step {until}" + (", resumed" if until == steps else "")
            entry = record.attempt(
                what,
                lambda until=until: _paced(train(machine, folder, until, run_cli), steps // 2),
                shows_itself=run_cli is command_line,
            )
            if entry.state != "ok":
                _keep_log(folder / f"to_step_{until}.log", work)
                return
            if until < steps:
                saved = checkpoint_time(folder, until)
        record.attempt("all steps, resumed once", lambda: examine(folder, steps, saved))


def _paced(figures: dict[str, tuple[Any, str]], steps: int) -> dict[str, tuple[Any, str]]:
    return {**figures, "step": (figures["training loop"][0] / steps, "s")}


def _keep_log(log: Path, folder: Path) -> None:
    if log.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(log, folder / log.name)
