"""The stages of a GPU run, one after the other; what fails is recorded, and the next goes on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from .. import upstream
from ..errors import UserError
from . import correctness, speed, training, waits
from .machine import Machine
from .record import Record, head, slug

STAGES = (1, 2, 3, 4)


def run(
    machine: Machine,
    out: Path,
    work: Path,
    stages: Collection[int] = STAGES,
    minutes: float = 10.0,
    run_cli: training.Runner = training.command_line,
) -> int:
    """Runs the stages, prints a line per result and writes <out>/gpu-<card>.json; returns the exit code.

    machine: made just before, as its clock runs. work: where stage 4's model is written. Raises UserError without a
    card, unless it is a dry run.
    """
    if not machine.dry_run and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device is visible to torch: check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or try --dry-run."
        )
    found = head(machine.device, machine.dry_run)
    name = "dry-run" if machine.dry_run else slug(found["card"]["name"])
    tracebacks = work / f"failed-{name}.txt"
    tracebacks.unlink(missing_ok=True)
    record = Record(out / f"gpu-{name}.json", found, tracebacks=tracebacks)
    installed = ", ".join(f"{package} {version}" for package, version in found["versions"].items() if version)
    print(f"{found['card']['name']}: {found['label']}\n{installed}")
    if other := upstream.other_versions():
        print(other)
        record.content["other_versions"] = other
    if machine.full and {2, 3, 4} & set(stages):
        upstream.import_llamafactory()
    if 2 in stages:
        machine.shared["predictions"] = speed.Predictions(machine)
    budget = f"stages 1 to 3 end within {minutes:g} minutes"
    if 1 in stages:
        with record.stage(correctness.TITLE, budget):
            correctness.run(machine, record)
    if 2 in stages:
        with record.stage(speed.TITLE):
            speed.run(machine, record)
    if 3 in stages:
        with record.stage(waits.TITLE):
            waits.run(machine, record)
    if 4 in stages:
        with record.stage(training.TITLE, "no limit; about ten minutes more"):
            training.run(machine, record, work, run_cli)
    failures = record.failures
    print(f"\n{failures} failed, see {tracebacks}.  {record.path}" if failures else f"\n{record.path}")
    return 1 if failures else 0
