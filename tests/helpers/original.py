"""A tiny random LLaVA-1.6 in the original layout, written without the converter, and the same model in
memory.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from helpers.llava import PINPOINTS, SIDE
from helpers.tokenizers import write_tokenizer

VOCABULARY = 32000


def original_model(kind="mistral", dtype=torch.bfloat16, **text):
    """A LlavaNextForConditionalGeneration with the 32,000 rows an original checkpoint has."""
    text = {"num_hidden_layers": 2, "intermediate_size": 48, **text}
    text_config = {"mistral": MistralConfig, "llama": LlamaConfig}[kind](
        vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **text
    )
    vision_config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
    )
    config = LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=7,
        image_grid_pinpoints=PINPOINTS,
    )
    torch.manual_seed(11)
    model = LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
            parameter.data = parameter.data.to(dtype)  # not the buffers: RoPE's frequencies stay fp32
    return model.eval()


def original_tensors(model) -> dict[str, torch.Tensor]:
    """LLaVA's names: as LlavaLlamaForCausalLM.state_dict() has them (llava/model/llava_arch.py)."""
    names = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.")
        name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
        name = name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
        names[name] = tensor.clone()
    return names


def original_config(model, kind="mistral") -> dict:
    """config.json as liuhaotian/llava-v1.6-* have it."""
    text = model.config.text_config
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "hidden_act")
    return {
        "_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        **{key: getattr(text, key) for key in keys},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "image_aspect_ratio": "anyres",
        "image_crop_resolution": 224,
        "image_grid_pinpoints": PINPOINTS,
        "mm_hidden_size": 16,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_mistral" if kind == "mistral" else "llava",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 4096,
        "torch_dtype": "bfloat16",
        "unfreeze_mm_vision_tower": True,
        "vocab_size": VOCABULARY,
    }


def write_original(folder: Path, model, kind="mistral", shards=3, bins=False, tower=True) -> Path:
    """The folder of an original checkpoint, its CLIP config beside it (the published ones all have
    CLIP-L/14-336).
    """
    write_tokenizer(folder, [], legacy=True, pad="<unk>")
    clip = folder.parent / "clip"
    config = {**original_config(model, kind), "mm_vision_tower": str(clip)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    clip.mkdir(exist_ok=True)
    model.config.vision_config.save_pretrained(clip)
    tensors = original_tensors(model)
    vision = {name: t for name, t in tensors.items() if ".vision_tower." in name}
    save_file(
        {name.removeprefix("model.vision_tower.vision_tower."): t for name, t in vision.items()},
        clip / "model.safetensors",
    )
    if not tower:
        tensors = {name: t for name, t in tensors.items() if name not in vision}
    # Constants of old writers, and an order that mixes the parts.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    stem, suffix = ("pytorch_model", "bin") if bins else ("model", "safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in names[number::shards]}
        weight_map |= dict.fromkeys(part, file)
        torch.save(part, folder / file) if bins else save_file(part, folder / file, metadata={"format": "pt"})
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
