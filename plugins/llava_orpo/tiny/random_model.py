"""A LLaVA-NeXT with random weights and the real geometry."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import mistral_common
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from ..checkpoint.files import write_shards
from ..checkpoint.published import published_names
from ..data.conversation import CONVERSATIONS
from ..export.original_files import chat_template
from ..export.original_tokenizer import TOKENIZER_MODEL, tokenizer_json
from .shapes import GEOMETRIES as GEOMETRIES
from .shapes import PATCH, Geometry, config, draw

SHARD_GB = 2.0


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
    model = LlavaNextForConditionalGeneration(config(geometry)).to(dtype)
    write_files(geometry, out, dtype)
    state = model.state_dict()
    tensors = {name: state[key].contiguous() for name, key in published_names(state).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def tensor_sizes(geometry: Geometry, dtype: torch.dtype) -> dict[str, tuple[torch.Size, int]]:
    """{published name: (shape, bytes)} of a model of this geometry; nothing is allocated."""
    with torch.device("meta"):
        state = LlavaNextForConditionalGeneration(config(geometry)).state_dict()
    names = published_names(state).items()
    return {name: (state[key].shape, state[key].numel() * dtype.itemsize) for name, key in names}


def write_sharded(
    geometry: Geometry, out: Path, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Path:
    """As `write`, for a model that is larger than the memory: shards of 2 GB, tensor by tensor drawn on `device`.

    Other weights than those of `write`: normal with deviation 0.02, norms 1, biases 0.
    """
    sizes = tensor_sizes(geometry, dtype)
    generator = torch.Generator(device).manual_seed(seed)

    def fetch(name: str) -> torch.Tensor:
        return draw(name, torch.empty(sizes[name][0], dtype=dtype, device=device), generator).cpu()

    write_files(geometry, out, dtype)
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, _) in sizes.items()}
    write_shards(out, planned, fetch, SHARD_GB, "random weights")
    return out


def write_files(geometry: Geometry, out: Path, dtype: torch.dtype) -> None:
    """Everything of the folder but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    settings = config(geometry)
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
