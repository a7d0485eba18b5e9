"""Tiny checkpoint folders, the published 7B's table of tensors, and logits to compare models by."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from helpers.llava import IMAGE_TOKEN, PINPOINTS, SIDE, image_inputs, make_image, num_image_tokens
from helpers.paths import FILES
from helpers.tokenizers import joining_bpe

TABLE = json.loads((FILES / "llava_v16_mistral_7b_tensors.json").read_text())


def published_7b() -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of the published llava-v1.6-mistral-7b-hf."""
    shapes = {}
    for pattern, shape in TABLE["tensors"].items():
        part = next((part for part in TABLE["layers"] if "{" + part + "}" in pattern), None)
        for layer in range(TABLE["layers"].get(part, 1)):
            shapes[pattern.replace("{" + str(part) + "}", str(layer))] = tuple(shape)
    return shapes


def write_base(folder: Path, model) -> Path:
    """A base model's folder but for its weights: config and processor files as transformers writes them."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=joining_bpe(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{{ messages[0]['content'] }}",
    )
    processor.save_pretrained(folder)
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    return folder


def logits(model) -> torch.Tensor:
    """fp32 logits of one image followed by text, (tokens, vocabulary)."""
    image = make_image(50, 31, seed=1)
    inputs = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in image_inputs([image]).items()}
    ids = [1, 20] + [IMAGE_TOKEN] * num_image_tokens(model, image) + list(range(30, 60))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), **inputs, use_cache=False).logits[0].float()


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All safetensors weights of a folder: by its index, or of the one file a small model is written as."""
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else None
    tensors = {}
    for file in sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]:
        with safe_open(folder / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})
    assert weight_map is None or tensors.keys() == weight_map.keys()
    return tensors
