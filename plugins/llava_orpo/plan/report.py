"""What a recipe costs: traces put together with the data's sizes and the GPUs' data sheets, as a result and as tables.

Tensors and FLOPs come from `trace`. Arithmetic on its parts are only: what DDP, ZeRO and FSDP add or divide among
ranks, the assumed reserve, and hours from FLOPs at a stated utilization.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .gpus import Gpu
from .recomputed import Recomputed
from .sizes import Data, as_run, assumed, group_tokens, largest
from .trace import PairSize, Setting, Traced, trace

RESERVE = 1.5e9  # assumed: CUDA context, allocator rounding and fragmentation, temporaries inside kernels
UTILIZATION = 0.4
UNCHANGED = {"disable_gradient_checkpointing": False, "recompute": "auto"}  # what some keys are when they are left out
REMEDIES = (
    {"disable_gradient_checkpointing": False},
    {"recompute": "auto"},
    {"per_device_train_batch_size": 1},
    {"quantization_bit": 4},
    {"anyres_max_tiles": 2},
)


def engines(traced: Traced, ranks: int, quantized: bool) -> dict[str, float | None]:
    """Bytes at the peak on each of `ranks` GPUs by engine, the reserve included; None where it does not apply.

    On one GPU: the trace. DDP adds its buckets, as large as the gradients. ZeRO-2 divides gradients and optimizer,
    ZeRO-3 and FSDP the weights too, but hold one whole layer, and its prefetched successor, at a time.
    """
    whole = traced.peak + RESERVE
    grown = max(0, traced.trainable - traced.gradients)  # gradients that the trace saw arise within the step
    out: dict[str, float | None] = {"one GPU": whole, "DDP": None, "ZeRO-2": None, "ZeRO-3 / FSDP": None}
    if ranks > 1:
        saved = 1 - 1 / ranks
        shared = (traced.optimizer + traced.gradients + grown) * saved
        out["DDP"] = whole + traced.trainable
        out["ZeRO-2"] = whole - shared
        if not quantized:  # 4-bit weights are not divided
            weights = (traced.frozen + traced.trainable) * saved
            out["ZeRO-3 / FSDP"] = whole - shared - weights + 2 * traced.largest_layer
    return out


def need_of(traced: Traced, ranks: int, quantized: bool, engine: str | None = None) -> float:
    """Bytes at the peak on each of `ranks` GPUs, the reserve included; engine: of `engines`, else DDP or one GPU."""
    found = engines(traced, ranks, quantized)
    return found.get(engine or "DDP") or found["DDP"] or found["one GPU"]


def engine_of(recipe: Mapping[str, Any]) -> str | None:
    """Which of `engines` the recipe's own keys start on several GPUs; None: none that shards, so DDP."""
    if recipe.get("fsdp"):
        return "ZeRO-3 / FSDP"
    config = recipe.get("deepspeed") or {}
    if not isinstance(config, Mapping):
        with suppress(OSError, ValueError):  # what cannot be read is refused before a training
            config = json.loads(Path(config).read_text(encoding="utf-8"))
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, Mapping) else None
    return {2: "ZeRO-2", 3: "ZeRO-3 / FSDP"}.get(stage)


def batches_of(data: Data, recipe: Mapping[str, Any], config) -> tuple[list, list, dict[str, float]]:
    """(a typical batch, the longest batch, figures of the epoch) as lists of groups of pair sizes."""
    data = as_run(data, recipe)
    size = int(recipe.get("per_device_train_batch_size", 8))
    grouped = recipe.get("group_pairs_by_image", False) and recipe.get("shared_prefix", True)
    max_pairs = int(recipe.get("max_pairs_per_image", 4)) if grouped else None
    if data.assumed:
        together = min(len(data.sizes), size, max_pairs or 1)
        typical = [[data.sizes[0]] * together] * (size // together)
        longest = [[largest(data.sizes[0], config)] * together] * (size // together)
        return typical, longest, {"tokens_per_pair": _tokens(typical) / size, "longest_pair": longest[0][0].tokens}
    every = [batch for batch in data.groups(size, max_pairs)]
    counts = [_tokens(batch) for batch in every]
    full = [batch for batch in every if sum(map(len, batch)) == min(size, len(data.sizes))]
    mean = sum(map(_tokens, full)) / len(full)
    figures = {
        "tokens_per_pair": sum(counts) / data.pairs,
        "tokens_per_pair_not_grouped": sum(s.tokens for s in data.sizes) / data.pairs,
        "longest_pair": max(s.tokens for s in data.sizes),
    }
    for pairs in (2, 4, 8):
        batches = data.groups(max(size, pairs), pairs)
        figures[f"tokens_per_pair_grouped_{pairs}"] = sum(map(_tokens, batches)) / data.pairs
    longest = [[data.sizes[i] for i in run] for run in data.longest(size, max_pairs)]
    return min(full, key=lambda batch: abs(_tokens(batch) - mean)), longest, figures


def _tokens(batch: Sequence[Sequence[PairSize]]) -> int:
    return sum(map(group_tokens, batch))


def plan(
    recipe: Mapping[str, Any],
    config,
    sources: tuple[str, str],
    data: Data,
    gpus: Sequence[Gpu],
    ranks: int = 1,
    utilization: float = UTILIZATION,
    target: str = "cuda",
    try_remedies: bool = True,
) -> dict[str, Any]:
    """The whole result for one recipe, ready for JSON. sources: where config and data sizes come from."""
    setting = Setting.of(recipe, target, config)
    batches = batches_of(data, recipe, config)
    engine = engine_of(recipe)

    def need(traced: Traced) -> float:
        return need_of(traced, ranks, setting.quantized, engine)

    typical, longest, count = _by_layers(config, setting, batches, need)
    usual = _traced(typical, setting, count)
    worst = usual if typical is longest else _traced(longest, setting, count)
    automatic = setting.checkpointing and setting.shared and str(recipe.get("recompute", "auto")) == "auto"
    epochs = float(recipe.get("num_train_epochs", 3.0))
    flops = usual.flops / usual.pairs
    peaks = engines(worst, ranks, setting.quantized)
    out = {
        "label": "computed, not measured",
        "model": sources[0],
        "data": sources[1],
        "pairs": data.pairs,
        "epochs": epochs,
        "histogram_pairs_per_image": None if data.assumed else data.pairs_per_image(),
        **batches[2],
        "batch": usual.pairs,
        "tflop_per_pair": flops / 1e12,
        "longest_batch_tokens": worst.tokens,
        "bytes": {
            "frozen weights": worst.frozen,
            "trainable weights": worst.trainable,
            "gradients": worst.gradients,
            "optimizer": worst.optimizer,
            "activations and batch": worst.activations,
            "reserve (assumed)": RESERVE,
        },
        "trainable_parameters": worst.trainable_parameters,
        "ranks": ranks,
        "engine": next(name for name in (engine, "DDP", "one GPU") if peaks.get(name)),
        "peak_bytes": peaks,
        "utilization": utilization,
        "disk_bytes": disk(recipe, worst),
        "gpus": {},
        "remedies": {},
    }
    needed = need(worst)
    out["layers"] = longest.layers
    for gpu in gpus:
        chosen = longest.fewest(gpu.memory) if automatic and needed <= gpu.memory else count
        peak = needed if chosen == count else longest.need(chosen)
        flops = (usual if chosen == count else typical.at(chosen)).flops / usual.pairs
        hours = flops * data.pairs * epochs / (gpu.rate * utilization) / 3600 / ranks
        fits = {name: None if size is None else size <= gpu.memory for name, size in peaks.items()}
        known = {"memory": gpu.memory, "rate": gpu.rate, "source": gpu.source}
        then = {"recompute": chosen, "peak_bytes": peak, "tflop_per_pair": flops / 1e12, "hours": hours}
        out["gpus"][gpu.name] = {**known, **fits, **then}
    if target == "cuda" and try_remedies and any(needed > gpu.memory for gpu in gpus):
        out["remedies"] = remedies(recipe, config, data, gpus, target, ranks)
    return out


def _by_layers(config, setting: Setting, batches, need) -> tuple[Recomputed, Recomputed, int]:
    """(traces of the typical batch, of the longest one, how many layers the recipe recomputes)."""
    longest = Recomputed(config, setting, batches[1], need)
    typical = longest if batches[0] == batches[1] else Recomputed(config, setting, batches[0], need)
    if not setting.checkpointing:
        return typical, longest, 0
    return typical, longest, longest.layers if setting.recompute is None else setting.recompute


def _traced(batch: Recomputed, setting: Setting, count: int) -> Traced:
    return batch.at(count) if setting.checkpointing else trace(batch.config, setting, batch.groups)


def remedies(
    recipe: Mapping[str, Any], config, data: Data, gpus: Sequence[Gpu], target: str, ranks: int = 1
) -> dict[str, Any]:
    """{GPU: {"keys": keys to change, "peak_bytes": …} or None}, the changes taken in turn until the recipe fits."""
    changed: dict[str, Any] = {}
    out: dict[str, Any] = {gpu.name: None for gpu in gpus}
    for step in REMEDIES:
        (key, value) = next(iter(step.items()))
        if recipe.get(key, UNCHANGED.get(key)) == value:
            continue
        if key == "quantization_bit" and recipe.get("finetuning_type", "lora") != "lora":
            continue  # only LoRA trains beside 4-bit weights
        changed |= step
        tried = {**recipe, **changed}
        if key == "anyres_max_tiles":
            from ..data.anyres import AnyresGeometry

            config = type(config).from_dict(config.to_dict())
            limited = AnyresGeometry.from_config(config).limited(value)
            config.image_grid_pinpoints = [list(point) for point in limited.grid_pinpoints]
            if not data.assumed:
                break  # the data has to be read again with the new tiles
            data = assumed(config, len(data.sizes))
        setting = Setting.of(tried, target, config)
        traced = trace(config, setting, batches_of(data, tried, config)[1])
        peak = need_of(traced, ranks, setting.quantized, engine_of(tried))
        for gpu in gpus:
            if out[gpu.name] is None and peak <= gpu.memory:
                out[gpu.name] = {"keys": dict(changed), "peak_bytes": peak}
        if all(out.values()):
            break
    return out


def disk(recipe: Mapping[str, Any], traced: Traced) -> dict[str, float]:
    """Bytes that a training writes: checkpoints (weights and two moments of what is trained) and the result."""
    kept = int(recipe.get("save_total_limit") or 0)
    each = traced.trainable + traced.optimizer
    return {"each checkpoint": each, "checkpoints kept": each * (kept or 1), "result": traced.trainable}


def table(rows: Sequence[Sequence[Any]], head: Sequence[str]) -> str:
    """A Markdown table with padded columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def gb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f}" if count >= 1e8 else f"{count / 1e9:.3f}"


def show(result: Mapping[str, Any]) -> str:
    """A result of `plan` as text."""
    lines = [
        "Computed by tracing the step without weights; nothing here was measured.",
        f"model: {result['model']}",
        f"data:  {result['data']}",
        "",
    ]
    rows = [
        ["tokens per pair", f"{result['tokens_per_pair']:,.0f} (longest {result['longest_pair']:,})"],
        ["TFLOP per pair", f"{result['tflop_per_pair']:.4g}"],
        ["trainable parameters", f"{result['trainable_parameters']:,}"],
        ["longest batch", f"{result['batch']} pairs, {result['longest_batch_tokens']:,} tokens"],
        *[[f"GB, {name}", gb(size)] for name, size in result["bytes"].items()],
        *[
            [f"GB per GPU, {name}" + (f" on {result['ranks']}" if name != "one GPU" else ""), gb(peak)]
            for name, peak in result["peak_bytes"].items()
            if peak is not None
        ],
        *[[f"GB of disk, {name}", gb(size)] for name, size in result["disk_bytes"].items()],
    ]
    lines += [table(rows, ["computed", ""]), ""]
    if result["histogram_pairs_per_image"]:
        histogram = result["histogram_pairs_per_image"].items()
        lines += [table([[k, f"{n:,}"] for k, n in histogram], ["pairs per image", "images"]), ""]
        alone = result["tokens_per_pair_not_grouped"]
        for pairs in (2, 4, 8):
            grouped = result[f"tokens_per_pair_grouped_{pairs}"]
            lines.append(
                f"group_pairs_by_image, max_pairs_per_image {pairs}: {grouped:,.0f} tokens per pair,"
                f" {1 - grouped / alone:.0%} fewer than {alone:,.0f}."
            )
        lines.append("")
    engines_ = [name for name, peak in result["peak_bytes"].items() if peak is not None]
    rows = []
    for name, gpu in result["gpus"].items():
        fits = ["fits" if gpu[engine] else "does not fit" for engine in engines_]
        recompute = f"{gpu['recompute']} of {result['layers']}"
        rows.append([name, gb(gpu["memory"]), *fits, recompute, gb(gpu["peak_bytes"]), f"{gpu['hours']:.3g}"])
    own = f"GB then, {result['engine']}"
    head = ["GPU", "GB", *engines_, "layers recomputed", own, f"hours for {result['epochs']:g} epochs"]
    lines.append(table(rows, head))
    for name, remedy in result["remedies"].items():
        if result["gpus"][name][result["engine"]]:
            continue
        words = " ".join(f"{k}={str(v).lower()}" for k, v in remedy["keys"].items()) if remedy else ""
        lines.append(
            f"{name}: " + (f"{words} fits ({gb(remedy['peak_bytes'])} GB)." if remedy else "nothing tried fits.")
        )
    lines += [
        "",
        f"Hours at {result['utilization']:.0%} of the dense bf16 rate (an assumption); evaluation not counted.",
    ]
    return "\n".join(lines)


VARIANTS = {  # the published recipe under other keys: (keys, pairs of one image, whether the image is the longest)
    "recipe": ({}, 1),
    "8 pairs": ({"per_device_train_batch_size": 8}, 1),
    "8 pairs, 4 per image": ({"per_device_train_batch_size": 8, "group_pairs_by_image": True}, 4),
    "LLaMA-Factory, 1, on": ({"shared_prefix": False}, 1),
    "shared prefix, 4, on": ({"per_device_train_batch_size": 4, "group_pairs_by_image": True}, 4),
    "LLaMA-Factory, 1, off": ({"shared_prefix": False, "disable_gradient_checkpointing": True}, 1),
    "shared prefix, 1, off": ({"disable_gradient_checkpointing": True}, 1),
    "shared prefix, 4, off": (
        {"per_device_train_batch_size": 4, "group_pairs_by_image": True, "disable_gradient_checkpointing": True},
        4,
    ),
}


def variants(recipe: Mapping[str, Any], config, source: str, gpus: Sequence[Gpu], target: str = "cuda") -> dict:
    """{"rows": {name: {"photo": trace, "longest": trace or None}}}: the traces behind docs/scaling.md and the table."""
    out = {}
    for name, (changes, per_image) in VARIANTS.items():
        keys = {**recipe, **changes}
        typical, longest, _ = batches_of(assumed(config, per_image), keys, config)
        setting = Setting.of(keys, target, config)
        out[name] = {"photo": vars(trace(config, setting, typical))}
        if changes.get("shared_prefix", True) and not changes.get("disable_gradient_checkpointing"):
            out[name]["longest"] = vars(trace(config, setting, longest))
    cards = {gpu.name: {"memory": gpu.memory, "rate": gpu.rate, "source": gpu.source} for gpu in gpus}
    data = assumed(config)
    recomputed = {str(per_image): recompute(recipe, config, gpus, per_image, target) for per_image in (1, 4)}
    sources = {"model": source, "data": data.source, "pairs": data.pairs}
    return {**sources, "gpus": cards, "rows": out, "recompute": recomputed}


def recompute(recipe: Mapping[str, Any], config, gpus: Sequence[Gpu], per_image: int, target: str = "cuda") -> dict:
    """What recomputing fewer layers costs and saves, with `per_image` pairs of one image in a batch.

    {"layers": how many there are, "counts": {number recomputed: {"need": bytes for the longest image, the reserve
    included, "flops": of a pair on a photograph}}, "gpus": {name: the number `recompute: auto` takes}}
    """
    keys = {**recipe, "per_device_train_batch_size": per_image, "group_pairs_by_image": per_image > 1}
    typical, longest, _ = batches_of(assumed(config, per_image), keys, config)
    setting = Setting.of(keys, target, config)
    counted, usually = (
        Recomputed(config, setting, groups, lambda t: need_of(t, 1, setting.quantized)) for groups in (longest, typical)
    )
    chosen = {gpu.name: counted.fewest(gpu.memory) for gpu in gpus}
    shown = {counted.layers * quarter // 4 for quarter in range(5)} if per_image == 1 else set()
    counts = sorted(shown | {count for count in chosen.values() if count is not None}, reverse=True)
    return {
        "layers": counted.layers,
        "counts": {
            str(n): {"need": counted.need(n), "flops": usually.at(n).flops / usually.at(n).pairs} for n in counts
        },
        "gpus": chosen,
    }


def benchmark_table(result: Mapping[str, Any]) -> str:
    """The computed table of docs/benchmarks.md from `variants`."""
    rows = []
    names = ["LLaMA-Factory, 1, on", "recipe", "shared prefix, 4, on"]
    names += ["LLaMA-Factory, 1, off", "shared prefix, 1, off", "shared prefix, 4, off"]
    for name in names:
        found = result["rows"][name]["photo"]
        side, pairs, checkpointing = ("shared prefix, 1, on" if name == "recipe" else name).split(", ")
        need, flops = found["peak"] + RESERVE, found["flops"] / found["pairs"]
        hours = [
            f"{flops * result['pairs'] / (gpu['rate'] * UTILIZATION) / 3600:.0f} h"
            if need <= gpu["memory"]
            else "does not fit"
            for gpu in result["gpus"].values()
        ]
        rows.append([side, pairs, checkpointing, f"{flops / 1e12:.1f}", gb(need), *hours])
    for pairs, found in result["recompute"].items():
        cells = []
        for name, gpu in result["gpus"].items():
            count = found["gpus"][name]
            flops = found["counts"][str(count)]["flops"]
            hours = flops * result["pairs"] / (gpu["rate"] * UTILIZATION) / 3600
            cells.append(f"{hours:.0f} h, {count} of {found['layers']}")
        rows.append(["shared prefix", pairs, "auto", "-", "-", *cells])
    head = ["computed, not run", "pairs/image", "checkpointing", "TFLOP/pair", "GB", *result["gpus"]]
    auto = (
        "auto: `recompute: auto`, the default, with the number of decoder layers that it recomputes on that GPU, which "
        "must hold the longest image too."
    )
    return "\n".join([table(rows, head), "", auto, "", *_assumptions(result)])


def _assumptions(result: Mapping[str, Any]) -> list[str]:
    return [
        f"Hours are for one epoch of {result['pairs']:,} pairs. Where the numbers come from:",
        "",
        "- memory and FLOPs: a trace of the real step at the true shapes, on tensors without data "
        "(`plugins/llava_orpo/plan/trace.py`); a causal attention product counts half",
        f"- model: {result['model']}",
        f"- data: {result['data']}",
        f"- assumed: {RESERVE / 1e9:.1f} GB for the CUDA context, fragmentation and kernels' own temporaries; "
        f"{UTILIZATION:.0%} of the dense bf16 rate; LLaMA-Factory's step without padding, as its best case",
        *[
            f"- {name}: {gpu['memory'] / 1e9:.1f} GB, {gpu['rate'] / 1e12:g} TFLOP/s ({gpu['source']})"
            for name, gpu in result["gpus"].items()
        ],
    ]


def scaling_page(result: Mapping[str, Any]) -> str:
    """docs/scaling.md from `variants`."""
    rows = []
    for label, name, which in (
        ("one pair, the longest image", "recipe", "longest"),
        ("eight pairs, not grouped, the longest image", "8 pairs", "longest"),
        ("eight pairs, four per image, the longest image", "8 pairs, 4 per image", "longest"),
        ("one pair on a 640x480 photograph", "recipe", "photo"),
        ("the same, LLaMA-Factory's own step", "LLaMA-Factory, 1, on", "photo"),
        ("one pair, without checkpointing, 640x480", "shared prefix, 1, off", "photo"),
        ("four pairs per image, without checkpointing, 640x480", "shared prefix, 4, off", "photo"),
    ):
        found = result["rows"][name][which]
        kept = found["frozen"] + found["trainable"] + found["gradients"] + found["optimizer"]
        peak = found["peak"]
        rows.append([label, f"{found['tokens']:,}", gb(kept), gb(peak - kept), gb(peak), gb(peak + RESERVE)])
    one = result["rows"]["recipe"]["longest"]
    found = result["recompute"]["1"]
    recomputed = [
        [f"{count} of {found['layers']}", gb(row["need"]), f"{row['flops'] / 1e12:.1f}"]
        for count, row in found["counts"].items()
    ]
    automatic = ", ".join(f"{count} on the {name}" for name, count in found["gpus"].items())
    parts = [
        ["frozen weights (decoder NF4, the rest bf16)", gb(one["frozen"])],
        [f"LoRA, {one['trainable_parameters'] / 1e6:.1f} M parameters in fp32", gb(one["trainable"])],
        ["its gradients", gb(one["gradients"])],
        ["two Adam moments", gb(one["optimizer"])],
        ["alive when the language model starts, beyond these", gb(one["entering"] - _static(one))],
        ["at the peak, beyond these", gb(one["peak"] - _static(one))],
    ]
    return "\n".join(
        [
            "# Memory of the real model (computed, not run)",
            "",
            "`python benchmarks/make_tables.py` writes this page from `benchmarks/results/plan_7b.json`, which",
            "`python scripts/plan.py recipes/llava16_orpo_qlora.yaml variants=true",
            "gpu=rtx4090,a100-80 out=benchmarks/results/plan_7b.json` computes. What was measured on a GPU",
            "is in [benchmarks.md](benchmarks.md#measured-on-gpus).",
            "For your own recipe, data and GPU: `python scripts/plan.py recipe.yaml gpu=rtx4090`.",
            "",
            "For `recipes/llava16_orpo_qlora.yaml`: NF4 with double quantization, LoRA rank 64 on the language model",
            "and the projector, bf16, gradient checkpointing unless said. An image takes up to 2,928 tokens.",
            "GB are 10^9 bytes.",
            "",
            table(rows, ["setting", "tokens", "outlives a step, GB", "step, GB", "sum, GB", "with reserve, GB"]),
            "",
            "One pair on the longest image, in parts:",
            "",
            table(parts, ["what", "GB"]),
            "",
            "One pair by `recompute`, memory for the longest image and FLOPs for a 640x480 photograph. The default,",
            f"`recompute: auto`, recomputes as few layers as the memory of the GPU allows: {automatic}.",
            "",
            table(recomputed, ["decoder layers recomputed", "with reserve, GB", "TFLOP/pair"]),
            "",
            *_assumptions(result)[2:],
            "",
        ]
    )


def _static(found: Mapping[str, Any]) -> int:
    return found["frozen"] + found["trainable"] + found["gradients"] + found["optimizer"]
