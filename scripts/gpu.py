"""Measures the step on this machine's NVIDIA card (24 GB or more); `bash scripts/gpu.sh` starts it.

    bash scripts/gpu.sh                # stages 1 to 3 in ten minutes, then stage 4
    bash scripts/gpu.sh --dry-run      # every stage on the smallest model on a CPU: does it run
    bash scripts/gpu.sh --core         # in the python at hand, with torch, transformers and peft alone

    1  correctness: loss and every gradient against a plain forward, fp32 and bf16, each attention backend; kernels
    2  the true 7B shapes with random weights: seconds a pair, peak memory, FLOP utilization, predicted peak; both steps
    3  host synchronizations, waiting for data, tokens per second
    4  20 steps through llamafactory-cli with recipes/llava16_orpo_qlora.yaml on a random 7B, resumed once

Nothing is downloaded. Stage 4 writes 15 GB to --work and removes them. Every result is in the JSON file as soon as it
is known; then `python benchmarks/make_tables.py` puts it into docs/benchmarks.md. With --stages, what the file has of
other stages stays, if card and versions are the same. The exit code is 1 if anything failed (tracebacks are in --work);
a setting that does not fit the card's memory is a result.
"""

from __future__ import annotations

import os
from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import flags, run

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
WORK = Path("outputs") / "gpu"


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="the smallest model on a CPU; nothing is a measurement")
    parser.add_argument("--core", action="store_true", help="without LLaMA-Factory, though it may be installed")
    parser.add_argument("--stages", default="1,2,3,4", help="which of them, such as 2,3 (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for stages 1 to 3; what is left is left out")
    parser.add_argument("--out", type=Path, help="folder of the JSON (benchmarks/results; outputs/gpu in a dry run)")
    parser.add_argument("--work", type=Path, default=WORK, help=f"where stage 4 needs 21 GB (default {WORK})")
    args = parser.parse_args(argv)
    stages = args.stages.split(",")
    if not set(stages) <= {"1", "2", "3", "4"}:
        raise UsageError(f"--stages {args.stages}: name stages from 1 to 4 with commas, such as 1,2.")
    if args.minutes <= 0:
        raise UsageError("--minutes must be more than 0.")
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")  # read when LLaMA-Factory is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    from llava_orpo.gpu.machine import Machine
    from llava_orpo.gpu.run import run as run_stages

    machine = Machine.of(args.dry_run, args.core, args.minutes)
    out = args.out or (WORK if args.dry_run else RESULTS)
    return run_stages(machine, out, args.work, {int(stage) for stage in stages}, args.minutes)


if __name__ == "__main__":
    run(main)
