"""Tokenizer files of a LLaVA-1.6 checkpoint in transformers format, from the original's SentencePiece model.

tokenizer.json is built here because transformers 5 loads a llava_next folder's tokenizer from that file as it is. What
it would build from tokenizer.model gives other ids: the word-start mark is missing, and (in 5.5.4) merges are in the
order of the vocabulary instead of their scores, which splits runs of spaces differently.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from ..checkpoint.files import CheckpointError, read_json

TOKENIZER_MODEL = "tokenizer.model"
FLAGS = ("lstrip", "normalized", "rstrip", "single_word")


def tokenizer_config(folder: Path, original: dict) -> tuple[dict, int]:
    """tokenizer_config.json with <image> as the first token after the vocabulary, and its id.

    This is as in the published checkpoints; the Mistral one gets <pad> too. Other settings stay the original's, except
    `legacy`, which says what `tokenizer_json` does.
    """
    if not (folder / TOKENIZER_MODEL).is_file():
        raise CheckpointError(f"{folder} has no tokenizer.model; give a llava-hf folder as --files-from.")
    config = read_json(folder / "tokenizer_config.json")
    if (folder / "special_tokens_map.json").is_file():
        config = read_json(folder / "special_tokens_map.json") | config
    decoder = config.setdefault("added_tokens_decoder", {})
    if (folder / "added_tokens.json").is_file():
        for token, number in read_json(folder / "added_tokens.json").items():
            decoder.setdefault(str(number), _special(token))
    image = max([original["vocab_size"] - 1, *map(int, decoder)]) + 1
    decoder[str(image)] = _special("<image>")
    if "mistral" in original["model_type"]:
        decoder[str(image + 1)] = _special("<pad>")
        config["pad_token"] = "<pad>"
    config |= {
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "legacy": True,
        "processor_class": "LlavaNextProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    return config, image


def _special(token: str) -> dict:
    return {"content": token, **dict.fromkeys(FLAGS, False), "special": True}


def tokenizer_json(folder: Path, config: dict) -> str:
    """tokenizer.json for tokenizer.model and a tokenizer_config.json.

    Gives SentencePiece's own ids. Each text between special tokens is encoded by itself, with a word-start mark in
    front, as LLaVA's tokenizer_image_token does around <image> whatever the original's `legacy` says (Vicuna's says
    false); the published tokenizer.json files do the same. Raises CheckpointError if an added token cannot have the
    id tokenizer_config.json says.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / TOKENIZER_MODEL))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    unknown = pieces.id_to_piece(pieces.unk_id())
    model = models.BPE(vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    start = [pieces.id_to_piece(pieces.bos_id())] if config.get("add_bos_token", True) else []
    end = [pieces.id_to_piece(pieces.eos_id())] if config.get("add_eos_token", False) else []
    single = [*(f"{token}:0" for token in start), "$A:0", *(f"{token}:0" for token in end)]
    second = [part.replace(":0", ":1").replace("$A", "$B") for part in single]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=single + second, special_tokens=[(t, vocabulary[t]) for t in {*start, *end}]
    )
    added = {i: _special(pieces.id_to_piece(i)) for i in range(len(pieces)) if pieces.is_control(i)}
    added |= {pieces.unk_id(): _special(unknown)}
    added |= {int(i): token for i, token in config["added_tokens_decoder"].items()}
    for number, token in sorted(added.items()):
        flags = {flag: token.get(flag, False) for flag in FLAGS}
        tokenizer.add_tokens([AddedToken(token["content"], special=token.get("special", True), **flags)])
        found = tokenizer.token_to_id(token["content"])
        if found != number:
            raise CheckpointError(
                f"{folder}: {token['content']} is token {found} after {TOKENIZER_MODEL}'s {len(pieces)}, not "
                f"{number}; give a llava-hf folder as --files-from."
            )
    return tokenizer.to_str(pretty=True)


def _merges(pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """All pairs of pieces that join into a third, best score first: the order in which SentencePiece joins."""
    normal = {
        pieces.id_to_piece(i): pieces.get_score(i)
        for i in range(len(pieces))
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
    }
    found = [
        (score, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    found.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in found]
