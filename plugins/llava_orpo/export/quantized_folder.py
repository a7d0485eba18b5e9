"""The 4-bit checkpoint that scripts/quantize.py writes: which layers, which names, and whether it loads.

It has the compressed-tensors format ("pack-quantized": eight 4-bit numbers per int32) and published tensor names.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from ..checkpoint.files import CheckpointError, copy_files, processor_files, some, write_shards
from ..checkpoint.published import LM_HEAD, RECOMPUTED, check_load, published_name
from ..progress import waiting

BLOCK_LINEAR = re.compile(
    r"language_model\.model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight"
)
PARAMETER = re.compile(r"\.weight_(?:packed|scale|shape|zero_point)$")
# Patterns, not names: they mean the same modules under every name transformers or vLLM gives them.
IGNORE = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head.*"]


def is_quantized(name: str) -> bool:
    """Whether a tensor (any layout) is the weight of a linear layer in the language model's blocks."""
    return not RECOMPUTED.search(name) and BLOCK_LINEAR.fullmatch(published_name(name)) is not None


def weight_scheme(method: str, group_size: int) -> dict:
    """compressed-tensors' description of the weights: 4-bit integers in groups along the inputs."""
    return {
        "num_bits": 4,
        "type": "int",
        "symmetric": method == "gptq",
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }


@torch.no_grad()
def hidden_states(decoder, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The decoder's last hidden states on one sample, (T, hidden), fp32 on CPU."""
    return decoder(**sample, use_cache=False).last_hidden_state[0].float().cpu()


def packed_state(model, table: dict) -> dict[str, torch.Tensor]:
    """Published name -> tensor of the quantized model, with eight weights of quantized layers packed per int32.

    Raises CheckpointError unless exactly the layers that should be are packed.
    """
    from compressed_tensors import ModelCompressor
    from compressed_tensors.offload import OffloadCache

    decoder = model.model.language_model
    ModelCompressor.from_pretrained_model(decoder).compress_model(decoder)
    with OffloadCache.disable_onloading():  # the tensors where they are kept, not copies on the accelerator
        tensors = model.state_dict()
    state = {}
    for name, tensor in tensors.items():
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
        raise CheckpointError(
            f"llm-compressor packed {len(packed)} layers, {len(wanted)} should be: {some(packed ^ wanted)}"
        )
    return dict(sorted(state.items()))


def write_folder(folder: Path, state: dict[str, torch.Tensor], base: Path, scheme: dict) -> None:
    """Writes the quantized checkpoint: the base's config.json with `scheme` in it, its small files, the weights."""
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme,
                "format": "pack-quantized",
            }
        },
        "ignore": IGNORE,
    }
    copy_files(base, processor_files(base), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_shards(
        folder,
        {name: tensor.to("meta") for name, tensor in state.items()},
        lambda name: state[name].detach().to("cpu").contiguous(),
        max_shard_gb=5.0,
        what="writing the quantized weights",
    )


def check_reload(folder: Path, sample: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """Loads the written folder as any user would and compares its decoder with the one it was made from.

    Raises CheckpointError for missing or unexpected tensors, or hidden states that differ by more than 1e-4
    (fp32 weights) or 2e-2 (16-bit) of the largest.
    """
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    check_load(info, folder)
    with torch.no_grad(), waiting("unpacking and comparing"):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))  # the whole model's first forward unpacks the weights
        found = hidden_states(model.model.language_model, sample)
    difference = (found - expected).abs().max() / expected.abs().max()
    limit = 1e-4 if sample["inputs_embeds"].dtype == torch.float32 else 2e-2
    if not difference <= limit:
        raise CheckpointError(
            f"{folder} does not compute what was quantized: hidden states differ by {difference:.2g} of the largest."
        )
    print(f"Loaded again: nothing missing, hidden states differ by {difference:.1e} of the largest (limit {limit:.0e})")
