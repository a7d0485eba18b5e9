"""Trainings under DeepSpeed and FSDP in two processes on CPUs, for the tests that compare them with one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from helpers.paths import ROOT
from helpers.ranks import train_on_processes

ENGINES = ROOT / "recipes" / "engines"
FSDP = ("fsdp", "fsdp2")
Recipes = Callable[[str, dict], list[dict]]


def train_under_deepspeed(folder: Path, recipes: Recipes) -> None:
    """Trains what `recipes` makes of each of the names zero2 and zero3, and their keys."""
    runs = [run for name in ("zero2", "zero3") for run in recipes(name, {"deepspeed": str(ENGINES / f"{name}.json")})]
    for run in runs:
        del run["use_cpu"]  # DeepSpeed takes its device from DS_ACCELERATOR
    train_on_processes(folder, runs, 2, timeout=1800, DS_ACCELERATOR="cpu")


def fsdp_keys(name: str) -> dict:
    """The keys that start an engine of `FSDP` in a process of `helpers.cpu_fsdp`."""
    config = json.loads((ENGINES / f"{name}.json").read_text())
    config = {**config, "sync_module_states": False, "cpu_ram_efficient_loading": False}  # both need a GPU
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def train_under_fsdp(folder: Path, runs: list[dict], processes: int = 2) -> None:
    train_on_processes(folder, runs, processes, timeout=1800, module="helpers.cpu_fsdp")
