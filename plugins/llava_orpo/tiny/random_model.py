"""A LLaVA-NeXT with random weights and the real geometry."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mistral_common
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
)

from ..checkpoint.published import published_names
from ..data.conversation import CONVERSATIONS
from ..export.original_files import chat_template
from ..export.original_tokenizer import TOKENIZER_MODEL, tokenizer_json

PATCH = 14


@dataclass(frozen=True)
class Geometry:
    """Widths and depths; tile is in pixels.

    text = (hidden, intermediate, layers, heads, key-value heads), vision = (hidden, intermediate, layers, heads).
    """

    text: tuple[int, int, int, int, int]
    vision: tuple[int, int, int, int]
    tile: int = 336

    @property
    def pinpoints(self) -> list[list[int]]:
        """The published five grids, (height, width) in pixels."""
        return [[self.tile * h, self.tile * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


GEOMETRIES = {
    "tiny": Geometry((128, 384, 2, 4, 2), (64, 128, 3, 2)),
    "mid": Geometry((512, 1408, 8, 8, 4), (256, 1024, 6, 4)),
    "slice7b": Geometry((4096, 14336, 2, 32, 8), (1024, 4096, 3, 16)),
}


def config(geometry: Geometry) -> LlavaNextConfig:
    """A llava_next config of this geometry with everything else as published."""
    hidden, inner, layers, heads, kv_heads = geometry.text
    v_hidden, v_inner, v_layers, v_heads = geometry.vision
    return LlavaNextConfig(
        text_config=MistralConfig(
            vocab_size=32064,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=32768,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            sliding_window=None,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=32001,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=v_hidden,
            intermediate_size=v_inner,
            num_hidden_layers=v_layers,
            num_attention_heads=v_heads,
            image_size=geometry.tile,
            patch_size=PATCH,
            projection_dim=768,
        ),
        image_grid_pinpoints=geometry.pinpoints,
        image_token_index=32000,
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def tokenizer(folder: Path):
    """The real 32,000-piece Mistral v1 tokenizer with <image> = 32000 and <pad> = 32001, written as tokenizer.json.

    It is of the published checkpoint's kind (`legacy`): every text between special tokens gets a word-start mark, so
    28705 stands before and after the image. transformers 5 loads a llava_next tokenizer from tokenizer.json alone; what
    it would make of tokenizer.model lacks the mark.
    """
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "LlavaNextProcessor",
        "legacy": True,
        "added_tokens_decoder": {str(i): {"content": name, **flags} for i, name in names.items()},
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    with tempfile.TemporaryDirectory() as plain:
        pieces = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
        shutil.copy(pieces, Path(plain) / TOKENIZER_MODEL)
        (folder / "tokenizer.json").write_text(tokenizer_json(Path(plain), settings), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def write(geometry: Geometry, out: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes the folder (published tensor names, processor, chat template) and returns it."""
    torch.manual_seed(seed)
    settings = config(geometry)
    model = LlavaNextForConditionalGeneration(settings).to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    settings.dtype = dtype
    settings.architectures = ["LlavaNextForConditionalGeneration"]
    settings.save_pretrained(out)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": geometry.tile},
            crop_size={"height": geometry.tile, "width": geometry.tile},
            image_grid_pinpoints=geometry.pinpoints,
        ),
        tokenizer=tokenizer(out),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=chat_template(CONVERSATIONS["llava_v16_mistral"]),
        num_additional_image_tokens=1,
    )
    with tempfile.TemporaryDirectory() as folder:  # it would rewrite the tokenizer's files too
        processor.save_pretrained(folder)
        for name in ("processor_config.json", "chat_template.jinja"):
            shutil.copy(Path(folder) / name, out / name)
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001})
    )
    state = model.state_dict()
    tensors = {name: state[key].contiguous() for name, key in published_names(state).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
