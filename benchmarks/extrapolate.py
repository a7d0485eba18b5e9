"""The real 7B on 24 GB and 80 GB GPUs, COMPUTED from FLOP and byte counts. Nothing here was run on a GPU.

    python benchmarks/extrapolate.py

FLOPs come from formulas that are checked in this run against torch's FLOP counter (`step_flops` against
`orpo_step.py`'s own counting, both sides). Bytes that autograd keeps per token are counted on one decoder layer of the
true width (bf16, LoRA). Everything else is an assumption, listed in `ASSUMPTIONS` and in the table's caption.
Writes results/extrapolation.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import measure
import orpo_step
import setting
import torch

REAL_7B = setting.random_llava.Geometry((4096, 14336, 32, 32, 8), (1024, 4096, 24, 16))
VOCABULARY = 32064
RANK = setting.lora_rank(REAL_7B)
GPUS = {"24 GB (RTX 4090)": (24e9, 165e12), "80 GB (A100)": (80e9, 312e12)}  # bytes, dense bf16 FLOP/s
MFU = 0.4
RESERVED = 1.5e9
EPOCH = 83132
ASSUMPTIONS = {
    "arithmetic": f"{MFU:.0%} of the GPU's dense bf16 rate in both steps; NF4 dequantization and optimizer not counted",
    "attention": "causal FlashAttention for LLaMA-Factory too (no padding computed), as its best case",
    "weights": "decoder layers NF4 with double quantization (4.127 bits), everything else bf16, on both sides",
    "trainable": "LoRA rank 64 on all linear layers and the projector: fp32 weights, gradients, two Adam moments",
    "logits": "LLaMA-Factory 16 bytes an entry (fp32 logits, log-softmax, a gradient of each), ours 6 (bf16, backward)",
    "reserve": f"{RESERVED / 1e9:.1f} GB for the CUDA context and fragmentation",
    "photo": "640x480: 2,340 image tokens in 5 tiles; 32 prompt tokens, 80 chosen, 65 rejected tokens",
}


@dataclass(frozen=True)
class Work:
    """One training step: prompt with image, the two responses of each pair, and how they are run."""

    side: str
    pairs: int = 1
    image: int = 2340
    head: int = 6
    question: int = 26
    chosen: int = 80
    rejected: int = 65
    tiles: int = 5
    pad_to: int = 1
    masked: bool = False  # LLaMA-Factory under SDPA: a padding mask, so the causal half is computed too

    @property
    def longest(self) -> int:
        length = self.image + self.head + self.question + max(self.chosen, self.rejected)
        return -(-length // self.pad_to) * self.pad_to

    @property
    def root(self) -> int:
        return self.image + self.head + (self.question if self.pairs == 1 else 0)

    @property
    def tail(self) -> int:
        return self.pairs * (self.chosen + self.rejected) + (0 if self.pairs == 1 else self.pairs * self.question)

    @property
    def lm_tokens(self) -> int:
        """Positions the language model runs on."""
        return 2 * self.pairs * self.longest if self.side == "stock" else self.root + self.tail

    @property
    def read_rows(self) -> int:
        """Positions the last layer runs on (ours): all response tokens but the last, and each prompt's last token."""
        return self.pairs * (self.chosen + self.rejected - 1)

    @property
    def head_rows(self) -> int:
        """Positions that meet the LM head."""
        return self.lm_tokens if self.side == "stock" else self.pairs * (self.chosen + self.rejected)


def step_flops(geometry, work: Work, checkpointing: bool = False) -> dict[str, float]:
    """FLOPs of forward and backward by part, as `measure.count_flops` gives them.

    LoRA is on every linear layer of the decoder and on the projector; frozen weights get no weight gradient; the vision
    tower runs forward only.
    """
    hidden, inner, layers, heads, kv_heads = geometry.text
    v_hidden, v_inner, v_layers, _ = geometry.vision
    kv = hidden // heads * kv_heads
    patches = (geometry.tile // 14) ** 2
    images = 2 * work.pairs if work.side == "stock" else 1
    forwards = 2 if checkpointing else 1
    rank = setting.lora_rank(geometry)
    whole, trimmed = (layers, 0) if work.side == "stock" else (layers - 1, 1)

    def linear(n_in: int, n_out: int, rows: float) -> float:
        frozen, lora = 2 * n_in * n_out * rows, 2 * rank * (n_in + n_out) * rows
        return (forwards + 1) * frozen + (forwards + 2) * lora

    shapes = [(hidden, hidden), (hidden, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]  # q o gate up down
    per_row = sum(linear(a, b, 1) for a, b in shapes)
    keys_per_row = 2 * linear(hidden, kv, 1)
    rest = whole * work.lm_tokens * (per_row + keys_per_row)
    if trimmed:  # keys and values of the positions that are read are made and not used: forward only
        unused = forwards * 4 * (hidden * kv + rank * (hidden + kv)) * work.read_rows
        rest += work.read_rows * per_row + work.lm_tokens * keys_per_row + unused
    features = images * work.tiles * patches
    lora = 2 * rank * features
    rest += 2 * v_hidden * hidden * features + lora * (v_hidden + hidden) + lora * (v_hidden + 2 * hidden)
    rest += 2 * 2 * hidden * hidden * features + 3 * lora * 2 * hidden

    if work.side == "stock":
        square = work.longest**2 if work.masked else work.longest * (work.longest + 1) // 2
        seen = 2 * work.pairs * square * layers
    else:
        seen = (work.root * (work.root + 1) // 2 + work.tail * (work.root + work.tail)) * (layers - 1)
        seen += work.read_rows * work.lm_tokens
    attention = (4 * forwards + 10) * hidden * seen
    lm_head = 4 * hidden * VOCABULARY * work.head_rows

    run = v_layers if work.side == "stock" else v_layers - 1
    tile_rows = images * work.tiles * (patches + 1)
    vision = run * 2 * (4 * v_hidden**2 + 2 * v_hidden * v_inner) * tile_rows
    vision += run * 4 * v_hidden * tile_rows * (patches + 1)
    vision += 2 * 3 * 14 * 14 * v_hidden * images * work.tiles * patches
    total = attention + lm_head + vision + rest
    return {"attention": attention, "lm_head": lm_head, "vision": vision, "rest": rest, "total": total}


def check(geometry: str, pairs: int) -> dict[str, float]:
    """The formula's FLOPs over the counted ones, per side, for a step that really runs."""
    out = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting.write_rows(folder, 1, pairs)
        for side in orpo_step.SIDES:
            trainer = orpo_step.build(side, geometry, folder, pairs)
            micro = orpo_step.batches(side, trainer, pairs)
            counted = sum(measure.count_flops(partial(setting.forward_backward, trainer, b))["total"] for b in micro)
            computed = sum(step_flops(setting.GEOMETRIES[geometry], work)["total"] for work in works_of(side, micro))
            out[f"{geometry}, {pairs} pairs, {side}"] = computed / counted
    return out


def works_of(side: str, micro: list[dict]) -> list[Work]:
    """The work of real batches, lengths averaged over the pairs of a group."""
    if side == "stock":
        works = []
        for batch in micro:
            image = int((batch["input_ids"][0] == 32000).sum())
            rest = batch["input_ids"].shape[1] - image
            tiles = batch["pixel_values"].shape[1]
            works.append(Work("stock", 1, image, 0, 0, rest, 0, tiles, masked=True))
        return works
    packed = micro[0]["packed"]
    n, (root, tail) = packed.n_pairs, packed.layout.groups[0]
    lengths = packed.response_lengths
    chosen, rejected = sum(lengths[:n]) / n, sum(lengths[n:]) / n
    question = 0 if n == 1 else tail / n - chosen - rejected
    tiles = micro[0]["image_inputs"]["pixel_values"].shape[1]
    return [Work("ours", n, root, 0, question, chosen, rejected, tiles)]


def kept_bytes_per_token(tokens: int = 128, small: bool = False) -> float:
    """Bytes autograd keeps per token for the backward of one decoder layer of the 7B, bf16, LoRA on its layers."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import MistralConfig
    from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRotaryEmbedding

    hidden, inner, _, heads, kv_heads = (256, 896, 1, 2, 1) if small else REAL_7B.text
    config = MistralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        sliding_window=None,
        attn_implementation="sdpa",
    )
    layer = torch.nn.ModuleList([MistralDecoderLayer(config, 0)]).bfloat16()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layer = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=128, target_modules=targets), layer)
    states = torch.randn(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    positions = MistralRotaryEmbedding(config)(states, torch.arange(tokens)[None])
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights and tokens in x.shape:  # not the LoRA weights' bf16 copies
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        out = layer[0](states, position_embeddings=positions)
    assert out.requires_grad
    return sum(kept.values()) / tokens


def memory(work: Work, checkpointing: bool, kept: float) -> dict[str, float]:
    """Bytes on the GPU by part, at the peak of a step (LLaMA-Factory: one pair at a time)."""
    hidden, inner, layers, heads, kv_heads = REAL_7B.text
    v_hidden, v_inner, v_layers, _ = REAL_7B.vision
    kv = hidden // heads * kv_heads
    decoder = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    others = 2 * VOCABULARY * hidden + v_layers * (4 * v_hidden**2 + 2 * v_hidden * v_inner)
    others += v_hidden * hidden + hidden * hidden
    adapted = layers * (2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner)) + v_hidden + 3 * hidden
    one = Work(work.side, 1) if work.side == "stock" else work
    rows = one.lm_tokens
    states = 2 * hidden * rows
    activations = layers * states + kept * rows if checkpointing else layers * kept * rows
    return {
        "weights": decoder * 4.127 / 8 + others * 2,
        "trainable": RANK * adapted * 16,
        "activations": activations,
        "logits": one.head_rows * VOCABULARY * (16 if work.side == "stock" else 6),
        "reserve": RESERVED,
    }


def table_rows(kept: float) -> list[dict]:
    rows = []
    for checkpointing in (True, False):
        for work in (Work("stock", 1), Work("ours", 1), Work("ours", 4)):
            flops = step_flops(REAL_7B, work, checkpointing)["total"] / work.pairs
            parts = memory(work, checkpointing, kept)
            total = sum(parts.values())
            row = {
                "side": work.side,
                "pairs_per_image": work.pairs,
                "checkpointing": checkpointing,
                "tflop_per_pair": flops / 1e12,
                "bytes": parts,
                "total_bytes": total,
                "gpus": {},
            }
            for name, (size, rate) in GPUS.items():
                seconds = flops / (rate * MFU)
                row["gpus"][name] = {
                    "fits": total <= size,
                    "seconds_per_pair": seconds,
                    "hours_per_epoch": EPOCH * seconds / 3600,
                }
            rows.append(row)
    return rows


def show(result: dict) -> str:
    """The table, with the assumptions under it."""
    names = {"stock": "LLaMA-Factory", "ours": "shared prefix"}
    lines = []
    for row in result["rows"]:
        cells = [
            names[row["side"]],
            row["pairs_per_image"],
            "on" if row["checkpointing"] else "off",
            row["tflop_per_pair"],
            row["total_bytes"] / 1e9,
        ]
        for gpu in row["gpus"].values():
            cells.append(f"{gpu['hours_per_epoch']:.0f} h" if gpu["fits"] else "does not fit")
        lines.append(cells)
    head = ["computed, not run", "pairs/image", "checkpointing", "TFLOP/pair", "GB", *GPUS]
    notes = [f"- {key}: {text}" for key, text in result["assumptions"].items()]
    checks = ", ".join(f"{name}: {ratio:.3f}" for name, ratio in result["formula_over_counter"].items())
    return "\n".join(
        [
            measure.table(head, lines),
            "",
            f"Hours are for one epoch of {EPOCH:,} pairs. Assumptions:",
            "",
            *notes,
            f"- FLOP formula over torch's counter: {checks}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="tiny", help="geometry on which the formulas are checked")
    parser.add_argument("--smoke", action="store_true", help="check on the smallest model: does it run")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default: benchmarks/results)")
    args = parser.parse_args()
    geometry = "smoke" if args.smoke else args.geometry
    checks = {**check(geometry, 1), **check(geometry, 4)}
    kept = kept_bytes_per_token(small=args.smoke)
    result = {
        "assumptions": ASSUMPTIONS,
        "formula_over_counter": checks,
        "kept_bytes_per_token_and_layer": kept,
        "rows": table_rows(kept),
    }
    path = measure.save("extrapolation", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
