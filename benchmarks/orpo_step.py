"""One ORPO training step (forward and backward): the stock step against the shared prefix, in turn.

    python benchmarks/orpo_step.py --geometry mid                       # 1 pair per image
    python benchmarks/orpo_step.py --geometry mid --pairs-per-image 4   # and 4 on one image, group_pairs_by_image
    python benchmarks/orpo_step.py --geometry slice7b --repeats 2       # the 7B's widths, 2 of its 32 layers; 20 GB
    python benchmarks/orpo_step.py --geometry mid --recompute           # with gradient checkpointing

Both sides have the same weights, token ids and pixels (640x480 photographs, 336-pixel anyres), fp32, and LoRA on
decoder and projector (rank 64 at the 7B's width, 8 for mid), without gradient checkpointing and optimizer step.
LLaMA-Factory takes several pairs of an image one after the other (batch 1 with gradient accumulation): on a CPU that is
as fast as a batch and takes the least memory. Times are medians of runs in turn, A B A B. Peak memory is the process's
high-water mark above what it held after loading, each side in a process of its own.
Writes results/step_<geometry>_<pairs>.json.

--recompute: both sides with gradient checkpointing, which is LLaMA-Factory's default and what a recipe gets: its step
against ours with `recompute` all, half of the decoder layers, and none. Writes
results/recompute_<geometry>_<pairs>.json.
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
RECOMPUTE = ("stock", "all", "half", "none")  # LLaMA-Factory with checkpointing; ours by its `recompute`


def batches(side: str, trainer, pairs: int) -> list[dict]:
    """The micro-batches of one step: `pairs` single pairs for LLaMA-Factory, one packed row for ours."""
    indices = [[i] for i in range(pairs)] if side.endswith("stock") else [list(range(pairs))]
    return [setting.collate(trainer, picked) for picked in indices]


def build(side: str, geometry: str, folder: Path, pairs: int):
    """The trainer of one of `SIDES`, without checkpointing, or of `RECOMPUTE` as "recompute-<side>"."""
    grouped = {"group_pairs_by_image": True, "max_pairs_per_image": pairs} if pairs > 1 else {}
    side, _, recompute = side.partition("-")
    if not recompute:
        return setting.build(side, geometry, folder, **(grouped if side == "ours" else {}))
    keys = {"disable_gradient_checkpointing": False}
    if recompute == "stock":
        return setting.build("stock", geometry, folder, **keys)
    half = setting.GEOMETRIES[geometry].text[2] // 2
    return setting.build(
        "ours", geometry, folder, recompute=half if recompute == "half" else recompute, **keys, **grouped
    )


def lm_tokens(side: str, micro: list[dict]) -> int:
    """Positions the language model runs on in a step."""
    return sum(b["packed"].num_tokens if side == "ours" else b["input_ids"].numel() for b in micro)


def step_memory(side: str, geometry: str, folder: Path, pairs: int) -> dict[str, int]:
    """Peak memory of two micro-batches of one side, gradients included; runs in a process of its own."""
    trainer = build(side, geometry, folder, pairs)
    batch = batches(side, trainer, pairs)[0]  # LLaMA-Factory's peak is that of any micro-batch
    with measure.peak_memory() as memory:
        for _ in range(2):
            setting.forward_backward(trainer, batch)
    return memory


def compare(geometry: str, pairs: int, repeats: int, folder: Path) -> dict:
    """Measures everything but memory, both sides in this process."""
    setting.write_rows(folder, 1, pairs)
    trainers = {side: build(side, geometry, folder, pairs) for side in SIDES}
    setting.share_weights(trainers["stock"].model, trainers["ours"].model)
    micro = {side: batches(side, trainer, pairs) for side, trainer in trainers.items()}

    result: dict = {"geometry": geometry, "pairs_per_image": pairs, "repeats": repeats, "sides": {}}
    losses, found = {}, {}
    for side, trainer in trainers.items():  # the first pass warms up, counts FLOPs and gives the gradients
        share = 1 / len(micro[side])

        def one_pass(side=side, trainer=trainer, share=share):
            losses[side] = sum(share * setting.forward_backward(trainer, batch, share) for batch in micro[side])

        flops = measure.count_flops(one_pass)
        found[side] = setting.gradients(trainer)
        result["sides"][side] = {"flops": flops, "lm_tokens": lm_tokens(side, micro[side]), "loss": losses[side]}
    result["image_tokens"] = micro["ours"][0]["packed"].num_image_tokens
    result["response_tokens"] = list(micro["ours"][0]["packed"].response_lengths)
    result["largest_relative_gradient_difference"] = setting.largest_difference(found["ours"], found["stock"])
    del found

    def run(side: str, repeat: int) -> None:
        setting.forward_backward(trainers[side], micro[side][repeat % len(micro[side])])
        trainers[side].model.zero_grad(set_to_none=True)

    rates: list[float] = []
    calls = {side: lambda repeat, side=side: run(side, repeat) for side in SIDES}
    calls["gemm"] = lambda repeat: rates.append(measure.gemm_rate())
    seconds = measure.in_turn(calls, repeats)
    result["profile"] = measure.profile(lambda: run("ours", 0))
    result["gemm_flops_per_second"] = measure.median(rates)
    for side in SIDES:
        entry = result["sides"][side]
        entry["seconds_of_each_micro_batch"] = seconds[side]
        entry["seconds_per_step"] = measure.median(seconds[side]) * len(micro[side])
        entry["pairs_per_second"] = pairs / entry["seconds_per_step"]
        achieved = entry["flops"]["total"] / entry["seconds_per_step"]
        entry["share_of_gemm_rate"] = achieved / result["gemm_flops_per_second"]
    return result


def compare_recompute(geometry: str, pairs: int, repeats: int, folder: Path) -> dict:
    """Measures everything but memory of `RECOMPUTE`, in this process; gradients against LLaMA-Factory's."""
    setting.write_rows(folder, 1, pairs)
    trainers = {side: build(f"recompute-{side}", geometry, folder, pairs) for side in RECOMPUTE}
    micro = {side: batches(side, trainer, pairs) for side, trainer in trainers.items()}
    result: dict = {"geometry": geometry, "pairs_per_image": pairs, "repeats": repeats, "sides": {}}
    expected: dict = {}
    for side, trainer in trainers.items():
        if side != "stock":
            setting.share_weights(trainers["stock"].model, trainer.model)
        share = 1 / len(micro[side])

        def one_pass(side=side, trainer=trainer, share=share):
            for batch in micro[side]:
                setting.forward_backward(trainer, batch, share)

        if side == "stock":
            setting.share_weights(trainer.model, trainer.model)  # LoRA's B becomes nonzero
        flops = measure.count_flops(one_pass)["total"]
        found = setting.gradients(trainer)
        expected = expected or found
        result["sides"][side] = {"flops": flops, "gradient_difference": setting.largest_difference(found, expected)}

    def run(side: str, repeat: int) -> None:
        setting.forward_backward(trainers[side], micro[side][repeat % len(micro[side])])
        trainers[side].model.zero_grad(set_to_none=True)

    seconds = measure.in_turn({side: lambda repeat, side=side: run(side, repeat) for side in RECOMPUTE}, repeats)
    for side in RECOMPUTE:
        entry = result["sides"][side]
        entry["seconds_of_each_micro_batch"] = seconds[side]
        entry["seconds_per_step"] = measure.median(seconds[side]) * len(micro[side])
    return result


def recompute_ratios(result: dict) -> dict[str, dict[str, float]]:
    """{all, half, none: LLaMA-Factory's figure with checkpointing over ours}; above 1 ours is better."""
    stock = result["sides"]["stock"]
    out = {}
    for side in RECOMPUTE[1:]:
        ours = result["sides"][side]
        out[side] = {
            "speed": stock["seconds_per_step"] / ours["seconds_per_step"],
            "flops": stock["flops"] / ours["flops"],
        }
        if "memory" in stock:
            out[side]["memory"] = stock["memory"]["over_load"] / ours["memory"]["over_load"]
    return out


def recompute_rows(result: dict) -> list[list]:
    """The rows of one run: model, pairs per image, recompute, ratios."""
    rows = []
    for side, found in result["ratios"].items():
        difference = result["sides"][side]["gradient_difference"]
        memory = f"{found['memory']:.2f}x" if "memory" in found else "-"
        row = [
            result["geometry"],
            result["pairs_per_image"],
            side,
            f"{found['speed']:.2f}x",
            memory,
            f"{found['flops']:.2f}",
        ]
        rows.append([*row, f"{difference:.0e}"])
    return rows


RECOMPUTE_HEAD = ["model", "pairs/image", "recompute", "speed", "memory", "FLOPs", "gradient diff."]


def ratios(result: dict) -> dict[str, float]:
    """LLaMA-Factory's figure over ours; above 1 ours is better.

    flops is the limit of the speed-up at equal efficiency. flops_attention_and_head is the same limit for attention and
    the LM head alone, flops_linear for the linear layers of the decoder and the projector alone.
    """
    stock, ours = result["sides"]["stock"], result["sides"]["ours"]
    out = {
        "speed": stock["seconds_per_step"] / ours["seconds_per_step"],
        "lm_tokens": stock["lm_tokens"] / ours["lm_tokens"],
        "flops": stock["flops"]["total"] / ours["flops"]["total"],
        "flops_linear": stock["flops"]["rest"] / ours["flops"]["rest"],
        "flops_attention_and_head": (stock["flops"]["attention"] + stock["flops"]["lm_head"])
        / (ours["flops"]["attention"] + ours["flops"]["lm_head"]),
    }
    if "memory" in stock:
        out["memory"] = stock["memory"]["over_load"] / ours["memory"]["over_load"]
    return out


def memory_of(side: str, args) -> dict[str, int]:
    """`step_memory` in a fresh process."""
    command = [sys.executable, __file__, "--geometry", args.geometry, "--pairs-per-image", str(args.pairs_per_image)]
    done = subprocess.run([*command, "--memory-of", side], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(result: dict) -> str:
    """The table of one run."""
    sides = result["sides"]
    rows = [
        [name, *(pick(sides[side]) for side in SIDES)]
        for name, pick in {
            "seconds per step": lambda s: s["seconds_per_step"],
            "pairs per second": lambda s: s["pairs_per_second"],
            "tokens through the LM": lambda s: s["lm_tokens"],
            "GFLOP per step": lambda s: s["flops"]["total"] / 1e9,
            "share of GEMM rate": lambda s: s["share_of_gemm_rate"],
            **({"peak memory, GB": lambda s: s["memory"]["over_load"] / 1e9} if "memory" in sides["ours"] else {}),
        }.items()
    ]
    head = [f"{result['geometry']}, {result['pairs_per_image']} pair(s) an image", "LLaMA-Factory", "shared prefix"]
    lines = [measure.table(head, rows), ""]
    lines += [f"{name} ratio: {value:.2f}" for name, value in result["ratios"].items()]
    lines.append(f"largest relative gradient difference: {result['largest_relative_gradient_difference']:.1e}")
    lines.append(f"GEMM rate: {result['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s")
    return "\n".join(lines)


def main() -> None:
    parser = measure.parser(__doc__, smoke="smallest model, one repeat: does it run")
    parser.add_argument("--geometry", choices=setting.GEOMETRIES, default="mid")
    parser.add_argument("--pairs-per-image", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory processes out")
    parser.add_argument("--recompute", action="store_true", help="with checkpointing: all, half and none recomputed")
    recomputed = [f"recompute-{side}" for side in RECOMPUTE]
    parser.add_argument("--memory-of", choices=(*SIDES, *recomputed), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.geometry, args.repeats = "smoke", 1
    with tempfile.TemporaryDirectory() as folder:
        if args.memory_of:
            setting.write_rows(Path(folder), 1, args.pairs_per_image)
            print(json.dumps(step_memory(args.memory_of, args.geometry, Path(folder), args.pairs_per_image)))
            return
        sides = dict(zip(RECOMPUTE, recomputed, strict=True)) if args.recompute else {side: side for side in SIDES}
        memory = {} if args.no_memory else {side: memory_of(name, args) for side, name in sides.items()}
        measured = compare_recompute if args.recompute else compare
        result = measured(args.geometry, args.pairs_per_image, args.repeats, Path(folder))
    for side, bytes_of in memory.items():
        result["sides"][side]["memory"] = bytes_of
    if args.recompute:
        result["ratios"] = recompute_ratios(result)
        path = measure.save(f"recompute_{args.geometry}_{args.pairs_per_image}", result, args.out)
        print(f"{measure.table(RECOMPUTE_HEAD, recompute_rows(result))}\n{path}")
        return
    result["ratios"] = ratios(result)
    path = measure.save(f"step_{args.geometry}_{args.pairs_per_image}", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
