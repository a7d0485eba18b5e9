"""Evaluation: our preference hook against LLaMA-Factory's stock `trainer.evaluate` on the same held-out pairs.

    python benchmarks/eval_speed.py                  # geometry mid, 8 pairs, batches of 2

Both sides have the same weights, token ids and pixels, and run in turn (A B A B). Times are medians and include
collating, which runs without dataloader workers. Ours also writes its files (per-pair scores, examples with images).
Peak memory is measured as in orpo_step.py, each side in a process of its own. Writes results/eval_<geometry>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import setting

SIDES = ("stock", "ours")


def build(side: str, args, folder: Path):
    """A trainer with the rows as its evaluation set."""
    keys = {"group_pairs_by_image": True} if side == "ours" and args.pairs_per_image > 1 else {}
    return setting.build(
        side,
        args.geometry,
        folder,
        eval_dataset="rows",
        eval_strategy="epoch",
        disable_tqdm=True,
        per_device_eval_batch_size=args.batch,
        **keys,
    )


def write_rows(args, folder: Path) -> None:
    setting.write_rows(folder, args.pairs // args.pairs_per_image, args.pairs_per_image)


def memory(side: str, args, folder: Path) -> dict[str, int]:
    """Peak memory of one evaluation; runs in a process of its own."""
    trainer = build(side, args, folder)
    with measure.peak_memory() as found:
        trainer.evaluate()
    return found


def compare(args, folder: Path) -> dict:
    write_rows(args, folder)
    trainers = {side: build(side, args, folder) for side in SIDES}
    setting.share_weights(trainers["stock"].model, trainers["ours"].model)
    losses = {side: trainer.evaluate()["eval_loss"] for side, trainer in trainers.items()}
    seconds = measure.in_turn({s: lambda _, t=t: t.evaluate() for s, t in trainers.items()}, args.repeats)
    sides = {}
    for side in SIDES:
        middle = measure.median(seconds[side])
        sides[side] = {"seconds": seconds[side], "pairs_per_second": args.pairs / middle, "eval_loss": losses[side]}
    return {
        "geometry": args.geometry,
        "pairs": args.pairs,
        "pairs_per_image": args.pairs_per_image,
        "batch": args.batch,
        "sides": sides,
    }


def ratios(sides: dict[str, dict]) -> dict[str, float]:
    """Above 1 ours is faster, or takes less memory."""
    out = {"speed": sides["ours"]["pairs_per_second"] / sides["stock"]["pairs_per_second"]}
    if "memory" in sides["stock"]:
        out["memory"] = sides["stock"]["memory"]["over_load"] / sides["ours"]["memory"]["over_load"]
    return out


def show(result: dict) -> str:
    """The table of a run."""
    sides, found = result["sides"], result["ratios"]
    rows = [["pairs per second", *(sides[s]["pairs_per_second"] for s in SIDES), found["speed"]]]
    if "memory" in found:
        rows.append(["peak memory, GB", *(sides[s]["memory"]["over_load"] / 1e9 for s in SIDES), found["memory"]])
    head = [f"{result['geometry']}, {result['pairs']} pairs, batch {result['batch']}", "LLaMA-Factory", "ours", "ratio"]
    return measure.table(head, rows)


def main() -> None:
    parser = measure.parser(__doc__, smoke="smallest model, one repeat: does it run")
    parser.add_argument("--geometry", choices=setting.GEOMETRIES, default="mid")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--pairs-per-image", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.geometry, args.pairs, args.repeats = "smoke", 2, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.memory_of:
            write_rows(args, folder)
            print(json.dumps(memory(args.memory_of, args, folder)))
            return
        result = compare(args, folder)
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result["sides"][side]["memory"] = json.loads(done.stdout.splitlines()[-1])
    result["ratios"] = ratios(result["sides"])
    path = measure.save(f"eval_{args.geometry}", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
