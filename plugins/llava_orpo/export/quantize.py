"""Quantization of the language model's blocks with llm-compressor."""

from __future__ import annotations

import argparse
import gc
import os
import re
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from ..checkpoint.files import CheckpointError, check_disk, check_output, fresh_folder, processor_files
from ..checkpoint.published import check_folder, load_checked, read_config
from ..progress import waiting
from . import calibration
from .quantized_folder import check_reload, hidden_states, is_quantized, packed_state, weight_scheme, write_folder

LAYER = r"re:.*layers\.\d+\."
AWQ_MAPPINGS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    # llm-compressor leaves this one out where heads share keys and values (Mistral), because the widths differ.
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)


def quantize(args: argparse.Namespace) -> None:
    """Quantizes `args.model` into `args.out` (the flags of scripts/quantize.py).

    Raises CheckpointError and DataError; whatever can be refused is refused before anything is loaded.
    """
    table = check_model(args.model, args.group_size)
    if args.out.resolve() == args.model.resolve():
        raise CheckpointError(f"{args.out} is the model's own folder; write the result somewhere else.")
    check_output(args.out, args.overwrite)
    source = calibration.find_source(args.data, args.dataset_dir)
    size = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_disk(args.out.parent, size)  # an upper bound
    pairs, passed = calibration.choose_pairs(source, args.samples, args.heldout_fraction)
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
        write_folder(partial, state, args.model, weight_scheme(args.method, args.group_size))
        del model, decoder, state
        gc.collect()
        check_reload(partial, samples[0], expected)
    report(args, table, size)


def check_model(folder: Path, group_size: int) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """The tensor table of a folder that can be quantized. Raises CheckpointError, naming the reason, for any other."""
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
            f"{folder}: layers with {', '.join(map(str, odd))} inputs cannot be cut into groups of "
            f"{group_size}; {remedy}."
        )
    return table


def quantize_decoder(decoder, samples: list[dict], method: str, group_size: int, folder: Path) -> None:
    """Quantizes every linear layer of a text decoder in place with llm-compressor, block after block.

    samples: keyword arguments of the decoder, one dict per sample. GPTQ is symmetric with static activation
    order (no g_idx is stored); AWQ has zero points, as its authors' W4A16 has.
    """
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")  # and its line of error per layer
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
    # oneshot reads config.json there, to see that the model is not quantized yet.
    decoder.config._name_or_path = str(folder)
    # AWQ pins its samples for an accelerator even where there is none, and torch then fails.
    pinning = mock.patch.object(IntermediatesCache, "pin_memory", lambda *_: None)
    compressing = mock.patch.object(GPTQModifier, "compress_module_list", _shown(GPTQModifier.compress_module_list))
    with nullcontext() if torch.accelerator.is_available() else pinning, compressing:
        oneshot(
            model=decoder,
            recipe=recipe,
            dataset=DataLoader(samples, batch_size=None),
            pipeline="sequential",
            num_calibration_samples=len(samples),
        )


def _shown(compress):
    """Shows GPTQ's work after each block, which takes minutes on a CPU and is silent by itself."""

    def compress_module_list(*args, **kwargs):
        with waiting("compressing the block's layers"):
            return compress(*args, **kwargs)

    return compress_module_list


def _layer(name: str) -> str:
    return LAYER + re.escape(name) + "$"


def report(args: argparse.Namespace, table: dict, size: int) -> None:
    """Prints the sizes on disk, before and after."""
    new = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    layers = [shape for name, (_, shape, _) in table.items() if is_quantized(name)]
    share = sum(rows * columns for rows, columns in layers) / sum(
        torch.Size(shape).numel() for _, shape, _ in table.values()
    )
    print(
        f"{args.out}: {args.method.upper()} W4A16, groups of {args.group_size}, {len(layers)} layers "
        f"({share:.0%} of the weights)"
    )
    print(f"  weights on disk {size / 1e6:.2f} MB -> {new / 1e6:.2f} MB ({new / size:.0%})")
