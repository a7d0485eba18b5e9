"""The tiny LLaVA-NeXT: tokenizer, processor, model and its training."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaTokenizer,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    MistralConfig,
)

from ..checkpoint.published import published_name
from ..data.conversation import CONVERSATIONS
from ..export.original_files import chat_template
from . import cooccur, training, world

IMAGE_SIZE, PATCH_SIZE = 56, 14
# The published five grids, in units of one tile.
PINPOINTS = [[IMAGE_SIZE * h, IMAGE_SIZE * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
SETTINGS_FILE = "tiny_llava.json"


@dataclass(frozen=True)
class World:
    """What a model is taught about: its scenes, its turns (see `training.write_turn`), the code of both."""

    random_scene: Callable[[random.Random], world.Scene]
    write_turn: Callable[..., tuple[str, str]]
    modules: tuple[ModuleType, ...]


WORLDS = {
    "shapes": World(world.random_scene, training.write_turn, (world, training)),
    "cooccur": World(cooccur.random_scene, cooccur.write_turn, (world, training, cooccur)),
}


def make_tokenizer(seed: int, turns: int = 6000, about: World = WORLDS["shapes"]) -> LlamaTokenizer:
    """Trains a BPE tokenizer of the Llama kind: ▁ for spaces, byte fallback, BOS in front, no merge across words.

    As in the published checkpoint, <image> and <pad> are special tokens behind the trained vocabulary, and every text
    between special tokens, the newline after <image> included, gets a ▁ in front (`legacy`).
    """
    rng = random.Random(f"tokenizer/{seed}")
    corpus = ["[INST] [/INST]"]
    for _ in range(turns):
        question, answer = about.write_turn(about.random_scene(rng), rng, 0.0, detailed=rng.random() < 0.1)
        corpus += [
            question,
            f" {answer}",
        ]  # a question follows the image's newline, an answer follows a space
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never"), tokenizers.pre_tokenizers.Punctuation()]
    )
    printable = [c for c in string.printable if c.isprintable() and c != " "] + ["▁"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1024, special_tokens=specials, initial_alphabet=printable, show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer = LlamaTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(m) for m in learned["merges"]],
        legacy=True,
        add_bos_token=True,
        padding_side="left",
    )
    # LlamaTokenizer's own legacy setting leaves out the ▁ before a text that starts with a space; the published
    # tokenizer.json does not. transformers and vLLM read that file of a llava_next folder.
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    tokenizer.init_kwargs["legacy"] = True  # written to tokenizer_config.json, as published
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.model_max_length = 4096
    return tokenizer


def make_processor(tokenizer: LlamaTokenizer) -> LlavaNextProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = LlavaNextImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_grid_pinpoints=PINPOINTS)
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(CONVERSATIONS["llava_v16_mistral"]),
    )


def make_model(tokenizer: LlamaTokenizer) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with random weights (torch's global seed). LM sizes are multiples of 128, for 4-bit quantizers."""
    vocabulary = -(-len(tokenizer) // 64) * 64
    text = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
        hidden_act="quick_gelu",
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model


def save(model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, out: Path, made: dict) -> None:
    """Writes the folder beside `out`, then renames it."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(part)
    model.generation_config.save_pretrained(part)
    processor.save_pretrained(part)
    tensors = {published_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    (part / SETTINGS_FILE).write_text(json.dumps(made, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on besides this code: pictures drawn, steps of each phase, share of false answers.

    habit_rate: as hallucination, in the last phase. world: a name of WORLDS.
    """

    images: int
    sight_steps: int
    steps: int
    hallucination: float
    habit_steps: int
    seed: int
    world: str = "shapes"
    habit_rate: float = training.HABIT_RATE


def settings(recipe: Recipe) -> dict:
    """What the weights depend on: the recipe, this code and the libraries."""
    code = hashlib.sha256()
    for module in WORLDS[recipe.world].modules:
        code.update(Path(module.__file__).read_bytes())
    code.update(Path(__file__).read_bytes())
    libraries = {lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers)}
    return {**dataclasses.asdict(recipe), "libraries": libraries, "code": code.hexdigest()}


def make(out: Path, **recipe) -> str:
    """Makes the folder unless it is there and complete; returns a line that says so. recipe: see `Recipe`."""
    torch.set_num_threads(1)  # the same sums, so the same weights, whatever the number of cores
    wanted = Recipe(**recipe)
    made = settings(wanted)
    if (out / SETTINGS_FILE).exists() and json.loads((out / SETTINGS_FILE).read_text()) == made:
        return f"{out}: already there"
    sight = out.with_name(out.name + ".sight")
    model, processor = build(wanted, sight)
    save(model.eval(), processor, out, made)
    shutil.rmtree(sight, ignore_errors=True)
    return f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters"


def build(recipe: Recipe, sight: Path) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """The trained model and its processor. sight: folder that keeps the first phase's result for the second."""
    torch.manual_seed(recipe.seed)
    about = WORLDS[recipe.world]
    tokenizer = make_tokenizer(recipe.seed, about=about)
    processor, model = make_processor(tokenizer), make_model(tokenizer)
    if recipe.sight_steps == recipe.steps == 0:
        return model, processor
    pictures = training.draw_pictures(processor, recipe.images, recipe.seed)
    made = settings(recipe)
    if (sight / SETTINGS_FILE).exists() and json.loads((sight / SETTINGS_FILE).read_text()) == made:
        model.model.vision_tower.load_state_dict(load_file(sight / "vision.safetensors"))
        print(f"vision tower: reused from {sight}")
    else:
        training.train_sight(model, pictures, recipe.sight_steps, recipe.seed)
        sight.mkdir(parents=True, exist_ok=True)
        save_file(model.model.vision_tower.state_dict(), sight / "vision.safetensors")
        (sight / SETTINGS_FILE).write_text(json.dumps(made))
    if about.random_scene is not world.random_scene:  # the tower learned from scenes without a prior
        pictures = training.draw_pictures(processor, recipe.images, recipe.seed, about.random_scene)
    for steps, rate, habits in (
        (recipe.steps, recipe.hallucination, False),
        (recipe.habit_steps, recipe.habit_rate, True),
    ):
        training.train_instructions(
            model, processor, pictures, steps, recipe.seed, rate, habits=habits, write=about.write_turn
        )
    return model, processor
