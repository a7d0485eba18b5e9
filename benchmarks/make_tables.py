"""Writes docs/benchmarks.md, docs/scaling.md and the costs in docs/losses.md from benchmarks/results/*.json.

    python benchmarks/make_tables.py

Every number on that page comes from a result file, and each table is followed by the command, the machine and the load
of its run.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import data_side
import eval_speed
import losses
import measure
import merge
import orpo_step
import peers
import setting
import starts
import storage

from llava_orpo.gpu import models, record, speed
from llava_orpo.plan import report

PAGE = setting.ROOT / "docs" / "benchmarks.md"
SCALING = setting.ROOT / "docs" / "scaling.md"
LOSSES = setting.ROOT / "docs" / "losses.md"
COSTS = "<!-- costs: written by benchmarks/make_tables.py -->"  # before and after the table
INTRODUCTION = """# Benchmarks

`python benchmarks/make_tables.py` writes this page from `benchmarks/results/*.json`. Both sides run in turn in one
process, or one after the other in one run, on the same rows; the ratio counts, not the seconds of a CPU. What was
measured on a GPU stands under that heading, with the card's name; the table below it is computed and says so.

Models are random, with LLaVA-1.6's geometry at full size (336-pixel tiles, five grids, 32,064 pieces); only widths and
depths differ. `mid`: LM 512 wide, 8 layers; vision 256 wide, 6 layers. `slice7b`: the 7B's true widths, 2 of its 32
decoder layers, 3 of its 24 vision layers. Photographs are 640x480: 2,340 image tokens.
"""
STEP = """## One training step

Forward and backward in fp32, LoRA on decoder and projector (rank 64 at the 7B's width, in proportion below: 8 for
`mid`), no gradient checkpointing. The stock `CustomDPOTrainer` and collator run against the shared prefix with the same
weights, token ids and pixels, and the gradients are compared.
Memory is the process's peak above what it held after loading.

How to read the ratios: *FLOPs* is what the speed-up would be if both sides ran equally efficiently; *attention + head*
and *linear layers* are the same for these parts alone, so they are the limits toward which the speed-up moves when one
or the other dominates; at great width the linear layers do. The last decoder layer runs only on the rows whose output
is read. This saves 1/8 of the decoder in `mid` and **half of it in `slice7b`, which has only two layers**; in the real
7B it saves 1/32. So read `slice7b` as a check of efficiency at true widths, and the computed table below for the 7B.
"""
RECOMPUTE = """### With gradient checkpointing

What a recipe gets by default: LLaMA-Factory recomputes every decoder layer in the backward pass. Against that step ours
with `recompute` all, half of the layers, and none, in one run. With four pairs the machine was very busy: those speeds
are noise, and the FLOP ratio, the limit at equal efficiency, is the firmer number.
`recompute: auto` takes the least that the GPU's memory allows (computed below: none of the 7B's 32 layers on 80 GB).
"""
RECOMPUTE_TARGETS = {("mid", 1): 5.4, ("mid", 4): 16.0}  # (geometry, pairs per image) -> least speed-up without any
GPU = """## Measured on GPUs

`bash scripts/gpu.sh` measures the step on one NVIDIA card of 24 GB or more: whether loss and gradients are right on it
and which kernels run; seconds a pair, peak memory and FLOP utilization at the true 7B shapes with random weights, with
what the plan predicts of them; host synchronizations and waiting for data; 20 steps through `llamafactory-cli`. It
downloads nothing, takes ten minutes for all but the last, and writes `benchmarks/results/gpu-<card>.json`. With
`--core` it needs torch, transformers and peft alone; `--dry-run` goes through all of it on a CPU.
"""
GPU_READING = """On the H200 a step of one pair takes as long as one of four pairs on an image (0.34 and 0.35 s, NF4,
`recompute: none`), and the card does a quarter of the FLOPs it could: one pair does not fill it. The likely reason is
the host, which starts thousands of small kernels per step; no profile was made. So the ratio of the FLOPs is not
reached: take more pairs per micro-batch on such a card (`per_device_train_batch_size`, `group_pairs_by_image`).
cuDNN's attention took 129 ms for each shape it had not seen before and 1.0 ms for one it had, which is why it is off.
"""
UNMEASURED = "Not yet measured: run `bash scripts/gpu.sh`.\n"
TARGETS = {  # (geometry, pairs per image) -> least speed-up, least memory ratio, least share of GEMM rate asked for
    ("mid", 1): (4.0, 2.0, 0.6),
    ("mid", 4): (10.0, None, 0.6),
    ("slice7b", 1): (2.2, None, None),
    ("slice7b", 4): (6.0, None, None),
}


def load(folder: Path, pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def source(result: dict) -> str:
    """The line under a table: command, machine, load."""
    m = result["machine"]
    return f"`{result['command']}` on {m['cpu']}, {m['threads']} of {m['cores']} cores, load {m['load']}, {m['time']}."


def step_table(results: list[dict]) -> str:
    """All step results, one row per result."""
    rows = []
    for result in results:
        stock, ours = (result["sides"][side] for side in orpo_step.SIDES)
        found = result["ratios"]
        rows.append(
            [
                result["geometry"],
                result["pairs_per_image"],
                stock["seconds_per_step"],
                ours["seconds_per_step"],
                f"{found['speed']:.2f}x",
                f"{found['memory']:.2f}x" if "memory" in found else "-",
                f"{ours['share_of_gemm_rate']:.0%}",
                f"{found['flops']:.2f}",
                f"{found['flops_attention_and_head']:.2f}",
                f"{found['flops_linear']:.2f}",
                f"{result['largest_relative_gradient_difference']:.0e}",
            ]
        )
    head = [
        "model",
        "pairs/image",
        "LLaMA-Factory, s",
        "ours, s",
        "speed",
        "memory",
        "of GEMM rate",
        "FLOPs",
        "attention + head",
        "linear layers",
        "gradient diff.",
    ]
    return measure.table(head, rows)


def targets(results: list[dict]) -> str:
    """Which targets were met, and by how much the others were missed."""
    lines = []
    for result in results:
        asked = TARGETS.get((result["geometry"], result["pairs_per_image"]))
        if asked is None:
            continue
        share = result["sides"]["ours"]["share_of_gemm_rate"]
        found = (result["ratios"]["speed"], result["ratios"].get("memory"), share)
        for name, wanted, value in zip(("speed", "memory", "share of GEMM rate"), asked, found, strict=True):
            if wanted is not None and value is not None:
                verdict = "met" if value >= wanted else f"missed by {1 - value / wanted:.1%}"
                if name == "speed" and value < wanted:  # what equal efficiency on both sides gives
                    verdict += f"; the FLOP ratio is {result['ratios']['flops']:.2f}"
                lines.append([result["geometry"], result["pairs_per_image"], name, wanted, f"{value:.3g}", verdict])
    return measure.table(["model", "pairs/image", "target", "at least", "measured", ""], lines)


def recompute_table(results: list[dict]) -> str:
    """All results with checkpointing, and how far the speed without recomputation is from what was asked for."""
    rows = []
    for result in results:
        for row, side in zip(orpo_step.recompute_rows(result), result["ratios"], strict=True):
            wanted = RECOMPUTE_TARGETS.get((result["geometry"], result["pairs_per_image"])) if side == "none" else None
            speed = result["ratios"][side]["speed"]
            missed = (
                f"{wanted:g}x: " + ("met" if speed >= wanted else f"missed by {1 - speed / wanted:.1%}")
                if wanted
                else ""
            )
            rows.append([*row, missed])
    return measure.table([*orpo_step.RECOMPUTE_HEAD, "asked"], rows)


def profiles(results: list[dict]) -> str:
    """Where the time of our step goes: share of the CPU time by operator."""
    lines = [
        f"- `{result['geometry']}`, {result['pairs_per_image']} pair(s) per image: "
        + ", ".join(f"{name} {share:.0%}" for name, share in result["profile"].items())
        for result in results
    ]
    title = "Where the time of our step goes (torch.profiler, self time of the largest operators):"
    return "\n".join([title, "", *lines])


def gpu_tables(result: dict) -> str:
    """One GPU's results: a table per stage, every figure with its unit, and under what versions it ran."""
    card, versions = result["card"], result["versions"]
    memory = f", {card['memory']['value'] / 1e9:.1f} GB" if card["memory"] else ""
    parts = [f"### {card['name']}{memory}\n"]
    if compared := gpu_ratios(result):
        parts.append(compared + "\n")
    for title, stage in result["stages"].items():
        rows = []
        for entry in stage["entries"]:
            figures = ", ".join(f"{name} {record.cell(figure)}" for name, figure in entry["figures"].items())
            rows.append([entry["what"], entry["state"], "; ".join(filter(None, (figures, entry["note"])))])
        if stage["error"]:
            rows.append(["the stage", stage["state"], stage["error"]])
        parts.append(measure.table([title, "", "result"], rows) + "\n")
    installed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    runs = dict.fromkeys(f"`{stage['command']}`, {stage['time']}" for stage in result["stages"].values())
    return "\n".join([*parts, f"{'; '.join(runs)}; {installed}.\n"])


def gpu_ratios(result: dict) -> str:
    """Both sides' defaults beside each other: LLaMA-Factory recomputes all layers, `recompute: auto` as few as fit."""
    found = {entry["what"]: entry for stage in result["stages"].values() for entry in stage["entries"]}
    rows = []
    for weights, pairs in itertools.product(models.WEIGHTS, speed.PAIRS):
        stock, ours = (
            found.get(str(speed.Cell(weights, pairs, recompute, side)), {}).get("figures")
            for recompute, side in (("all", speed.STOCK), ("auto", speed.OURS))
        )
        if not (stock and ours):
            continue
        sides = [f"{x['time per pair']['value']:.3f} s, {x['peak allocated']['value']:.1f} GB" for x in (stock, ours)]
        ratios = [stock[name]["value"] / ours[name]["value"] for name in ("time per pair", "FLOPs per pair")]
        rows.append([weights, pairs, *sides, *(f"{ratio:.1f}x" for ratio in ratios)])
    head = ["weights", "pairs/image", "LLaMA-Factory, per pair", "recompute: auto, per pair", "speed", "FLOPs"]
    return measure.table(head, rows) if rows else ""


def gpu_section(folder: Path) -> str:
    """The measured results of every card, or what to run for them. A dry run is no measurement."""
    found = [result for result in load(folder, "gpu-*.json") if not result["dry_run"]]
    return "\n".join([GPU, *([*map(gpu_tables, found), GPU_READING] if found else [UNMEASURED])])


def page(folder: Path) -> str:
    """The whole document; a part whose benchmark was not run is left out."""
    parts = [INTRODUCTION]
    steps = load(folder, "step_*.json")
    if steps:
        parts += [STEP, step_table(steps), "", targets(steps), "", profiles(steps), ""]
        parts += [source(result) + "\n" for result in steps]
    recomputed = load(folder, "recompute_*.json")
    if recomputed:
        parts += [RECOMPUTE, recompute_table(recomputed), ""]
        parts += [source(result) + "\n" for result in recomputed]
    sections = {
        "## The losses of the family": ("losses_*.json", losses.show),
        "## Evaluation": ("eval_*.json", eval_speed.show),
        "## Tokenizing, collating, disk": ("data_side.json", data_side.show),
        "## Images from an Arrow copy and from parquet": ("storage.json", storage.show),
        "## Merging an adapter": ("merge_*.json", merge.show),
        "## From start to first step": ("starts_*.json", starts.show),
        "## Whole runs against other toolkits": ("peers_*.json", peers.show),
    }
    for title, (pattern, show) in sections.items():
        found = load(folder, pattern)
        if found:
            parts.append(title + "\n")
            parts += [f"{show(result)}\n\n{source(result)}\n" for result in found]
    parts.append(gpu_section(folder))
    for planned in load(folder, "plan_7b.json"):
        parts += ["## The real 7B on GPUs: computed, not run\n", report.benchmark_table(planned) + "\n"]
    return "\n".join(parts)


def with_costs(text: str, folder: Path) -> str:
    """docs/losses.md with the costs of the results in a folder."""
    before, _, after = text.split(COSTS)
    return f"{before}{COSTS}\n{losses.costs(load(folder, 'losses_*.json'))}\n{COSTS}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(args.results))
    print(args.out)
    if args.out == PAGE:
        LOSSES.write_text(with_costs(LOSSES.read_text(), args.results))
        print(LOSSES)
    for planned in load(args.results, "plan_7b.json") if args.out == PAGE else ():
        SCALING.write_text(report.scaling_page(planned))
        print(SCALING)


if __name__ == "__main__":
    main()
