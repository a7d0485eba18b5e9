"""Quantize a merged LLaVA-1.6 to 4 bits (GPTQ or AWQ, W4A16), calibrated on preference pairs with their images.

    bash scripts/quantize.sh --model outputs/tiny/merged --method gptq --data demo_train --out outputs/tiny/gptq
    bash scripts/quantize.sh --model outputs/tiny/merged --method awq --data demo_train --out outputs/tiny/awq

Only the linear layers of the language model's blocks are quantized; vision tower, projector, embeddings and LM head
keep their weights to the bit, processor and chat-template files their bytes. The folder is in the compressed-tensors
format under the published llava-hf tensor names. Plain transformers 5.5 and newer with the package compressed-tensors
loads it, so `evals/preference.py … model_name_or_path=outputs/tiny/gptq` measures it like any other model. It is
written beside --out, loaded again, compared with the model in memory, and only then renamed.

llm-compressor 0.14 cannot do this on LlavaNextForConditionalGeneration itself: AWQ's default mappings also match the
vision tower, and its save gives names that do not load again. So it gets the language model alone, a plain text decoder.

Run on CPU with llm-compressor 0.14.0.1. With an accelerator llm-compressor moves one block at a time to it (not run).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "plugins"))  # this environment has no llamafactory, so the package is not installed in it

import calibration  # noqa: E402
from llava_orpo.checkpoint import (  # noqa: E402
    LM_HEAD,
    RECOMPUTED,
    check_folder,
    check_load,
    load_checked,
    published_name,
    read_config,
)
from llava_orpo.checkpoint_files import (  # noqa: E402
    CheckpointError,
    check_disk,
    check_output,
    copy_files,
    fresh_folder,
    processor_files,
    write_shards,
)
from llava_orpo.images import ImageError  # noqa: E402

BLOCK_LINEAR = re.compile(
    r"language_model\.model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
PARAMETER = re.compile(r"\.weight_(?:packed|scale|shape|zero_point)$")
# Patterns, not names: they mean the same modules under every name transformers or vLLM gives them.
IGNORE = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head.*"]
LAYER = r"re:.*layers\.\d+\."
AWQ_MAPPINGS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.v_proj", ("self_attn.o_proj",)),  # llm-compressor leaves it out where heads share keys (Mistral)
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (CheckpointError, calibration.DataError, ImageError, ValueError) as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a merged 16- or 32-bit LLaVA-1.6")
    parser.add_argument("--method", choices=("gptq", "awq"), required=True)
    parser.add_argument("--data", required=True, help="parquet file or folder in RLAIF-V's schema, or a registered name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset-dir", type=Path, default=ROOT / "data_registry", help="where dataset_info.json is")
    parser.add_argument("--samples", type=int, default=128, help="calibration pairs (default 128)")
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --out")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    # Whatever can be refused is refused here, before anything is loaded.
    if args.samples < 1 or args.group_size < 1:
        raise ValueError("--samples and --group-size must be positive.")
    table = check_model(args.model, args.group_size)
    if args.out.resolve() == args.model.resolve():
        raise CheckpointError(f"{args.out} is the model's own folder; write the result somewhere else.")
    check_output(args.out, args.overwrite)
    source = calibration.find_source(args.data, args.dataset_dir)
    size = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_disk(args.out.parent, size)  # an upper bound
    pairs, passed = calibration.choose_pairs(source, args.samples)
    for reason, count in passed.items():
        print(f"  {count} rows passed over: {reason}")

    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model)
    conversation = calibration.checkpoint_conversation(processor, args.model)
    model = load_checked(args.model, dtype="auto").eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.no_grad():
        samples = calibration.embed_pairs(model, processor, conversation, pairs, device)
    tokens = sum(sample["inputs_embeds"].shape[1] for sample in samples)
    print(f"Calibrating on {len(samples)} pairs, {tokens} tokens ({conversation.name})")

    decoder = model.model.language_model
    quantize_decoder(decoder, samples, args.method, args.group_size, args.model)
    expected = hidden_states(decoder, samples[0])
    state = packed_state(model, table)
    with fresh_folder(args.out, sum(tensor.nbytes for tensor in state.values()), args.overwrite) as partial:
        write_folder(partial, state, args)
        del model, decoder, state
        gc.collect()
        check_reload(partial, samples[0], expected)
    report(args, table, size)


def check_model(folder: Path, group_size: int) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Tensor table of a folder that can be quantized. Raises CheckpointError naming what stands against it."""
    config = read_config(folder)
    if "quantization_config" in config:
        raise CheckpointError(f"{folder} is quantized already; give the merged 16-bit model.")
    table = check_folder(folder)
    processor_files(folder)
    widths = {shape[1] for name, (_, shape, _) in table.items() if is_quantized(name)}
    odd = sorted(width for width in widths if width % group_size)
    if odd:
        fits = [size for size in (128, 64, 32) if not any(width % size for width in widths)]
        remedy = f"--group-size {fits[0]}" if fits else "no usual group size fits"
        raise CheckpointError(
            f"{folder}: layers with {', '.join(map(str, odd))} inputs cannot be cut into groups of {group_size}; {remedy}."
        )
    return table


def is_quantized(name: str) -> bool:
    """Whether a tensor (any layout) is the weight of a linear layer in the language model's blocks."""
    return not RECOMPUTED.search(name) and BLOCK_LINEAR.fullmatch(published_name(name)) is not None


def quantize_decoder(decoder, samples: list[dict], method: str, group_size: int, folder: Path) -> None:
    """Quantize every linear layer of a text decoder in place with llm-compressor, block after block.

    samples: keyword arguments of the decoder, one dict a sample. GPTQ is symmetric with static activation order (no
    g_idx is stored); AWQ has zero points, as its authors' W4A16 has.
    """
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    groups = {"group_0": {"targets": ["Linear"], "weights": weight_scheme(method, group_size)}}
    if method == "gptq":
        recipe = [GPTQModifier(config_groups=groups, actorder="static")]
    else:
        mappings = [AWQMapping(_layer(smooth), [_layer(name) for name in balance]) for smooth, balance in AWQ_MAPPINGS]
        recipe = [AWQModifier(mappings=mappings), QuantizationModifier(config_groups=groups)]
    decoder.config._name_or_path = str(folder)  # oneshot reads config.json there to see that it is not quantized yet
    # AWQ pins its samples for an accelerator even where there is none, and torch then fails.
    pinning = mock.patch.object(IntermediatesCache, "pin_memory", lambda *_: None)
    with nullcontext() if torch.accelerator.is_available() else pinning:
        oneshot(
            model=decoder, recipe=recipe, dataset=DataLoader(samples, batch_size=None), pipeline="sequential",
            num_calibration_samples=len(samples),
        )  # fmt: skip


def _layer(name: str) -> str:
    return LAYER + re.escape(name) + "$"


def weight_scheme(method: str, group_size: int) -> dict:
    """compressed-tensors' description of the weights: 4-bit integers in groups along the inputs."""
    return {
        "num_bits": 4, "type": "int", "symmetric": method == "gptq", "strategy": "group", "group_size": group_size,
        "dynamic": False,
    }  # fmt: skip


@torch.no_grad()
def hidden_states(decoder, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The decoder's last hidden states on one sample, (T, hidden), fp32 on CPU."""
    return decoder(**sample, use_cache=False).last_hidden_state[0].float().cpu()


def packed_state(model, table: dict) -> dict[str, torch.Tensor]:
    """Published name -> tensor of the quantized model, weights of quantized layers packed eight to an int32.

    Raises CheckpointError unless exactly the layers that should be are packed.
    """
    from compressed_tensors import ModelCompressor

    decoder = model.model.language_model
    ModelCompressor.from_pretrained_model(decoder).compress_model(decoder)
    state = {}
    for name, tensor in model.state_dict().items():
        if RECOMPUTED.search(name):
            continue
        parameter = PARAMETER.search(name)
        if parameter:
            layer = published_name(name[: parameter.start()] + ".weight").removesuffix(".weight")
            state[layer + parameter.group()] = tensor
        else:
            state[published_name(name)] = tensor
    if model.config.tie_word_embeddings:
        state.pop(LM_HEAD, None)
    wanted = {published_name(name) for name in table if is_quantized(name)}
    packed = {name.replace(".weight_packed", ".weight") for name in state if name.endswith(".weight_packed")}
    if packed != wanted:
        raise CheckpointError(f"llm-compressor packed {len(packed)} layers, {len(wanted)} should be: {sorted(packed ^ wanted)[:3]}")
    return dict(sorted(state.items()))


def write_folder(folder: Path, state: dict[str, torch.Tensor], args: argparse.Namespace) -> None:
    """The quantized checkpoint: base config.json with quantization_config, the base's small files, weights."""
    config = json.loads((args.model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weight_scheme(args.method, args.group_size),
                "format": "pack-quantized",
            }
        },
        "ignore": IGNORE,
    }
    copy_files(args.model, processor_files(args.model), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_shards(
        folder, {name: tensor.nbytes for name, tensor in state.items()},
        lambda name: state[name].detach().to("cpu").contiguous(), max_shard_gb=5.0,
    )  # fmt: skip


def check_reload(folder: Path, sample: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """Load the written folder as any user would and compare its decoder with the one it was made from.

    Raises CheckpointError for missing or unexpected tensors, or hidden states that differ by more than 1e-4 (fp32
    weights) or 2e-2 (16-bit) of the largest.
    """
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    check_load(info, folder)
    pixels = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        model(input_ids=pixels[None])  # the first forward of the whole model unpacks the weights
    difference = (hidden_states(model.model.language_model, sample) - expected).abs().max() / expected.abs().max()
    limit = 1e-4 if sample["inputs_embeds"].dtype == torch.float32 else 2e-2
    if not difference <= limit:
        raise CheckpointError(
            f"{folder} does not compute what was quantized: hidden states differ by {difference:.2g} of the largest."
        )
    print(f"Loaded again: nothing missing, hidden states differ by {difference:.1e} of the largest (limit {limit:.0e})")


def report(args: argparse.Namespace, table: dict, size: int) -> None:
    """Sizes on disk, before and after."""
    new = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    layers = [shape for name, (_, shape, _) in table.items() if is_quantized(name)]
    share = sum(rows * columns for rows, columns in layers) / sum(torch.Size(shape).numel() for _, shape, _ in table.values())
    print(f"{args.out}: {args.method.upper()} W4A16, groups of {args.group_size}, {len(layers)} layers ({share:.0%} of the weights)")
    print(f"  weights on disk {size / 1e6:.2f} MB -> {new / 1e6:.2f} MB ({new / size:.0%})")


if __name__ == "__main__":
    sys.exit(main())
