"""What llama.cpp's GGUF files of a LLaVA-1.6 must hold: vocabulary, chat template, image settings, tensor names.

Facts about llama.cpp are those of the sources in llama-cpp-python 0.3.36. Nothing here imports its packages.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import CheckpointError, read_json
from ..data.conversation import Conversation
from .original_files import chat_template

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
ADDED_SCORE = -1000.0  # llama.cpp's own value for tokens that no merge makes
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_VISION_LAYER = re.compile(r"vision_tower\.vision_model\.encoder\.layers\.(\d+)\.")
PROJECTOR_NAMES = {  # clip.cpp's TN_LLAVA_PROJ and TN_IMAGE_NEWLINE
    "multi_modal_projector.linear_1.weight": "mm.0.weight",
    "multi_modal_projector.linear_1.bias": "mm.0.bias",
    "multi_modal_projector.linear_2.weight": "mm.2.weight",
    "multi_modal_projector.linear_2.bias": "mm.2.bias",
    "image_newline": "v.image_newline",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp's SentencePiece-like one, by token id.

    Attributes:
        tokens, scores, types: one entry for each id of the tokenizer; the embedding's further rows are padding.
        adds_bos: whether a prompt starts with BOS.
        space_prefix: whether each text between special tokens gets a word-start mark in front.
        joined_otherwise: pieces that llama.cpp can also join from other parts than the tokenizer's merges name. Where
            there are some, unusual texts may be split differently; a vocabulary that SentencePiece made has none.
    """

    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    adds_bos: bool
    space_prefix: bool
    joined_otherwise: tuple[str, ...]


def vocabulary(spec: dict[str, Any], rows: int, where: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json (as a dict) for an embedding of `rows` rows.

    llama.cpp joins the two neighbours whose piece has the best score first, so a piece's score is the rank of the first
    merge that makes it, negated. (Its own converter gives every piece of a tokenizer.json the same score, and texts are
    split wrongly.) Raises CheckpointError for a tokenizer that is not of this kind.
    """
    model = spec["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(
            f"{where}: a {model['type']} tokenizer without byte fallback; LLaVA-1.6's are of BPE with it."
        )
    added = {token["id"]: token for token in spec["added_tokens"]}
    by_id = {i: piece for piece, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if sorted(by_id) != list(range(len(by_id))):
        raise CheckpointError(f"{where}: the token ids have gaps.")
    if len(by_id) > rows:
        raise CheckpointError(f"{where}: {len(by_id)} tokens, but the model has {rows} embedding rows.")
    ranks: dict[str, int] = {}
    listed: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(left + right, rank)
        listed[left + right] = listed.get(left + right, 0) + 1
    pieces = {piece for piece, i in model["vocab"].items() if i not in added and not _BYTE.fullmatch(piece)}
    otherwise = [
        piece
        for piece in sorted(pieces)
        if sum(piece[:cut] in pieces and piece[cut:] in pieces for cut in range(1, len(piece))) != listed.get(piece, 0)
    ]
    unknown = model.get("unk_token") or "<unk>"
    tokens, scores, types = [], [], []
    for i in range(len(by_id)):
        piece = by_id[i]
        tokens.append(piece)
        scores.append(
            float(-ranks[piece]) if piece in ranks and i not in added else ADDED_SCORE if i in added else -1e6
        )
        if piece == unknown:
            types.append(UNKNOWN)
        elif i in added:
            types.append(CONTROL if added[i]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if _BYTE.fullmatch(piece) else NORMAL)
    single = (spec.get("post_processor") or {}).get("single") or [{}]
    return Vocabulary(
        tuple(tokens), tuple(scores), tuple(types), "SpecialToken" in single[0], _space_prefix(spec), tuple(otherwise)
    )


def _space_prefix(spec: dict[str, Any]) -> bool:
    first = spec.get("normalizer") or {}
    parts = first.get("normalizers", [first])
    metaspace = (spec.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"
    return metaspace or any(part.get("type") == "Prepend" for part in parts)


def llama_cpp_template(conversation: Conversation) -> str:
    """The chat template of a conversation for llama-server, with the line end that LLaVA has behind an image.

    llama-server adds BOS itself where the vocabulary says so. It joins a message with an image to one text, in
    which a marker, <__media_…__>, stands for the image (common/chat.cpp, to_json_oaicompat).
    """
    template = chat_template(conversation)
    text, after = "{{- m['content'] -}}", json.dumps("__>" + conversation.image.removeprefix("<image>"))
    if template.count(text) != 1:
        raise ValueError("the chat template does not write the content of a message in one place")
    marked = (
        "{%- if m['content'].startswith('<__media_') -%}{%- set parts = m['content'].split('__>', 1) -%}"
        f"{{{{- parts[0] + {after} + parts[1] -}}}}{{%- else -%}}{text}{{%- endif -%}}"
    )
    return template.replace(text, marked)


def feature_layer(config: dict[str, Any]) -> int:
    """How many of the vision tower's layers run: vision_feature_layer counted from the input's embeddings, 0 to n."""
    layer, layers = config.get("vision_feature_layer", -2), config["vision_config"]["num_hidden_layers"]
    if not isinstance(layer, int):
        raise CheckpointError(f"vision_feature_layer is {layer}; LLaVA-1.6 takes its features from one layer.")
    return layer if layer >= 0 else layers + 1 + layer


def grid_pinpoints(config: dict[str, Any]) -> list[int]:
    """The grid as llama.cpp wants it: width, height, width, height, …; transformers names the height first.

    The order of the resolutions stays: of two that fit equally well, both take the first.
    """
    return [side for height, width in config["image_grid_pinpoints"] for side in (width, height)]


def image_settings(config: dict[str, Any]) -> dict[str, Any]:
    """clip.vision.*: what decides the features. Layers behind them are not in the file (`is_used`).

    Without feature_layer clip.cpp runs one layer fewer than block_count.
    """
    layer = feature_layer(config)
    return {"block_count": layer, "feature_layer": [layer], "image_grid_pinpoints": grid_pinpoints(config)}


def is_used(name: str, config: dict[str, Any]) -> bool:
    """Whether llama.cpp may see a vision tensor (published name): not the layers after the features, not their norm.

    clip.cpp applies post_layernorm to the features if the file holds it; transformers does not.
    """
    layer = _VISION_LAYER.match(name)
    return not ((layer and int(layer[1]) >= feature_layer(config)) or ".post_layernorm." in name)


def read_model(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, tokenizer.json) of a merged folder. Raises CheckpointError, in one line, for any other."""
    from ..checkpoint.published import read_merged

    config, _ = read_merged(folder, "GGUF")
    feature_layer(config)
    return config, read_json(folder / "tokenizer.json")
