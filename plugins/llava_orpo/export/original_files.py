"""The small files of a LLaVA-1.6 checkpoint in either layout: config, tokenizer and image settings, chat template.

Everything here turns text into text: dicts of file name -> content.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint.files import COPIED_FILES, CheckpointError, read_json
from ..checkpoint.published import read_config
from ..data.conversation import CONVERSATIONS, Conversation
from .original_tokenizer import TOKENIZER_MODEL, tokenizer_config, tokenizer_json

SIDECAR = "converted_from.json"
ORIGINAL_TYPES = ("llava", "llava_llama", "llava_mistral")
OF_LLAVA_16 = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
}
NEEDED_KEYS = (
    "image_grid_pinpoints",
    "mm_vision_select_feature",
    "mm_vision_select_layer",
    "mm_vision_tower",
    "vocab_size",
)
# Keys of the LLM that both layouts know.
TEXT_KEYS = (
    "_name_or_path",
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
)
CLIP_L_336 = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
SELECT_STRATEGY = {"patch": "default", "cls_patch": "full"}  # LLaVA's name -> transformers'
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def read_small_files(folder: Path) -> dict[str, str]:
    """config.json and the other small text files of a checkpoint folder (either layout)."""
    names = ("config.json", *(name for name in COPIED_FILES if name != TOKENIZER_MODEL))
    return {name: (folder / name).read_text(encoding="utf-8") for name in names if (folder / name).is_file()}


def read_original_config(folder: Path) -> dict:
    """config.json of an original LLaVA-1.6 folder. Raises CheckpointError if it is of another model."""
    config = read_json(folder / "config.json")
    kind, where = config.get("model_type"), folder / "config.json"
    if kind not in ORIGINAL_TYPES:
        raise CheckpointError(f"{where} is of model type {kind!r}, neither llava_next nor LLaVA's.")
    for key, value in OF_LLAVA_16.items():
        found = config.get(key)
        if found != value:
            raise CheckpointError(f"{where} is not of LLaVA-1.6: {key} is {found!r}, not {value!r}.")
    absent = [key for key in NEEDED_KEYS if key not in config]
    if absent:
        raise CheckpointError(f"{where} lacks {', '.join(absent)}; download it again.")
    return config


def vision_config(original: dict, vision_tower: Path | None) -> dict:
    """The config of the CLIP vision tower: from its folder if one is given, else that of ViT-L/14 at 336 px."""
    named = Path(original["mm_vision_tower"])
    folder = vision_tower or (named if named.is_dir() else None)
    if folder is None:
        return dict(CLIP_L_336)
    config = read_json(folder / "config.json")
    config = config.get("vision_config", config)
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return kept | {"model_type": "clip_vision_model"}


def next_config(original: dict, vision: dict, image_token: int, vocab_size: int) -> dict:
    """config.json of the llava_next model, with the keys that llava-hf/llava-v1.6-*-hf have."""
    kind = "mistral" if "mistral" in original["model_type"] else "llama"
    text = {key: original[key] for key in TEXT_KEYS if key in original}
    text["architectures"] = [f"{kind.capitalize()}ForCausalLM"]
    text |= {"model_type": kind, "vocab_size": vocab_size}
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": original["image_grid_pinpoints"],
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "image_token_index": image_token,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": original.get("tie_word_embeddings", False),
        "torch_dtype": original.get("torch_dtype", "float16"),
        "use_image_newline_parameter": True,
        "vision_config": vision,
        "vision_feature_layer": original["mm_vision_select_layer"],
        "vision_feature_select_strategy": SELECT_STRATEGY[original["mm_vision_select_feature"]],
    }


def original_config(config: dict) -> dict:
    """config.json of the original layout for a llava_next one (the published files leave defaults out)."""
    from transformers import LlavaNextConfig

    given = config["text_config"]
    filled = LlavaNextConfig.from_dict(config).text_config.to_dict()
    rope = filled["rope_parameters"]
    if rope["rope_type"] != "default":
        raise CheckpointError(f"RoPE of type {rope['rope_type']!r} is in no original LLaVA-1.6 checkpoint.")
    filled |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    text = {key: given.get(key, filled.get(key)) for key in TEXT_KEYS if key in given or key in filled}
    vocabulary = config["image_token_index"]
    if (text.get("pad_token_id") or 0) >= vocabulary:  # <pad> is one of the rows that are dropped
        del text["pad_token_id"]
    kind = given["model_type"]
    if kind not in ("llama", "mistral"):
        raise CheckpointError(f"An LLM of type {kind!r} is in no original LLaVA-1.6 checkpoint.")
    strategy = config.get("vision_feature_select_strategy", "default")
    feature = next(name for name, value in SELECT_STRATEGY.items() if value == strategy)
    return text | {
        "architectures": [f"Llava{kind.capitalize()}ForCausalLM"],
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": feature,
        "mm_vision_select_layer": config.get("vision_feature_layer", -2),
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": f"llava_{kind}",
        "torch_dtype": config.get("dtype", config.get("torch_dtype")),
        "unfreeze_mm_vision_tower": True,  # LLaVA then reads the tower from this checkpoint, not from CLIP's
        "use_mm_proj": True,
        "vocab_size": vocabulary,
    }


def family(original: dict) -> Conversation:
    """The conversation format of a checkpoint: by its LLM, and for the 34b by its vocabulary of 64,000."""
    if "mistral" in original["model_type"]:
        return CONVERSATIONS["llava_v16_mistral"]
    return CONVERSATIONS["llava_v16_34b" if original["vocab_size"] == 64000 else "llava_v16_vicuna"]


TEMPLATE = """\
{%- macro text(m) -%}
    {%- if m['content'] is string -%}
        {{- m['content'] -}}
    {%- else -%}
        {%- for part in m['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for m in messages -%}
    {%- if m['role'] == 'system' -%}
        {{- SYSTEM0 + text(m) + SYSTEM1 -}}
    {%- elif m['role'] == 'user' -%}
        {{- USER0 -}}
        {%- if m['content'] is not string -%}
            {%- for part in m['content'] if part['type'] == 'image' -%}{{- IMAGE -}}{%- endfor -%}
        {%- endif -%}
        {{- text(m) + USER1 -}}
    {%- elif loop.last -%}
        {{- GENERATION + RESPONSE0 + text(m) + RESPONSE1 -}}
    {%- else -%}
        {{- ANSWERED0 + text(m) + ANSWERED1 -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- GENERATION -}}{%- endif -%}"""


def chat_template(conversation: Conversation) -> str:
    """Jinja chat template that renders a conversation format, for messages with text or a list of parts."""
    template = TEMPLATE
    for part in ("system", "user", "answered", "response"):
        for end, literal in enumerate(getattr(conversation, part)):
            template = template.replace(f"{part.upper()}{end}", json.dumps(literal))
    template = template.replace("GENERATION", json.dumps(conversation.generation))
    return template.replace("IMAGE", json.dumps(conversation.image))


def image_settings(config: dict) -> dict[str, dict]:
    """preprocessor_config.json and processor_config.json for a llava_next config."""
    side = config["vision_config"]["image_size"]
    preprocessor = {
        "aspect_ratio_setting": "anyres",
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "image_mean": CLIP_MEAN,
        "image_processor_type": "LlavaNextImageProcessor",
        "image_std": CLIP_STD,
        "processor_class": "LlavaNextProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    return {"preprocessor_config.json": preprocessor, "processor_config.json": processor}


def make_next_files(folder: Path, original: dict, vision_tower: Path | None) -> dict[str, str]:
    """The small files of the llava_next folder for an original one."""
    tokenizer, image_token = tokenizer_config(folder, original)
    used = max(original["vocab_size"] + 2, 1 + max(map(int, tokenizer["added_tokens_decoder"])))
    config = next_config(original, vision_config(original, vision_tower), image_token, -(-used // 64) * 64)
    files = {"config.json": config, "tokenizer_config.json": tokenizer, **image_settings(config)}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
    texts["tokenizer.json"] = tokenizer_json(folder, tokenizer)
    texts["chat_template.jinja"] = chat_template(family(original))
    if (folder / "generation_config.json").is_file():
        texts["generation_config.json"] = (folder / "generation_config.json").read_text(encoding="utf-8")
    return texts


def make_original_files(folder: Path) -> dict[str, str]:
    """The small files of the original folder for a llava_next one; the tokenizer keeps the added tokens."""
    files = {"config.json": json.dumps(original_config(read_config(folder)), indent=2) + "\n"}
    kept = ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    if not (folder / TOKENIZER_MODEL).is_file():
        kept.append("tokenizer.json")
    return files | {name: text for name, text in read_small_files(folder).items() if name in kept}
