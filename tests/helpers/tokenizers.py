"""Real tokenizers for the tests, built offline.

mistral-common ships the SentencePiece model of Mistral-7B v0.1/v0.2 (`data/tokenizer.model.v1`, 32,000
pieces). Each builder writes it beside a `tokenizer_config.json` as the LLaVA-1.6 checkpoints have one and
loads the folder with AutoTokenizer, so the tests meet the same backend a user does.

Three kinds differ in where they put a word-start mark: KINDS says which.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from pathlib import Path

import mistral_common
from transformers import AutoTokenizer, LlamaTokenizer

from llava_orpo.export.original_tokenizer import tokenizer_json

# published: as the published checkpoints' tokenizer.json (`legacy: true`): a mark before every text between special
#     tokens.
# remade: what transformers 5 makes of tokenizer.model with `legacy: true`: the same, but no mark before a text that
#     starts with a space.
# first: what it makes of `legacy: false`: a mark at the start of the whole text only.
KINDS = ("published", "remade", "first")
SENTENCEPIECE = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def write_tokenizer(
    folder: str | Path, added: list[str], *, bos="<s>", eos="</s>", pad="<pad>", legacy=True, json_too=False
):
    """Write a tokenizer folder: Mistral v1 pieces 0..31999, then `added` as special tokens from 32000 on.

    With `json_too` there are a tokenizer.json, made as for a converted checkpoint, and a config.json that says
    llava_next: transformers then takes the tokenizer from tokenizer.json alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SENTENCEPIECE, folder / "tokenizer.model")
    contents = {0: "<unk>", 1: "<s>", 2: "</s>"} | {32000 + i: token for i, token in enumerate(added)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    decoder = {str(i): dict(flags, content=c) for i, c in contents.items()}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": "<unk>",
        "pad_token": pad,
        "legacy": legacy,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        "extra_special_tokens": {"image_token": "<image>"},
        "padding_side": "left",
        "processor_class": "LlavaNextProcessor",
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    if json_too:
        (folder / "tokenizer.json").write_text(tokenizer_json(folder, config))
        (folder / "config.json").write_text('{"model_type": "llava_next"}')
    return folder


def _load(added: list[str], kind: str, **tokens: str):
    legacy, json_too = kind != "first", kind == "published"
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(folder, added, legacy=legacy, json_too=json_too, **tokens)
        return AutoTokenizer.from_pretrained(folder)


@functools.lru_cache
def mistral_v1(kind: str = "published"):
    """The tokenizer of llava-v1.6-mistral-7b: <image> is 32000, <pad> is 32001."""
    return _load(["<image>", "<pad>"], kind)


@functools.lru_cache
def chatml(kind: str = "published"):
    """Same pieces with the control tokens of llava-v1.6-34b: <|im_end|> ends a turn and is the EOS token."""
    return _load(["<image>", "<pad>", "<|im_start|>", "<|im_end|>"], kind, eos="<|im_end|>")


@functools.lru_cache
def joining_bpe():
    """A small byte-fallback BPE whose pieces join what the formats keep apart.

    Pieces cross the end of each prompt ("]▁", "\\n\\n", ":▁T"), and the letters of "</s>" and "<image>" merge
    into the very pieces of those tokens, as merges made from a vocabulary alone can.
    """
    letters = sorted(set("▁\n[]<>/:|_ abcdefghimnostTSINUERAqy.?"))
    joins = [
        "]▁",
        "]▁T",
        "\n\n",
        "t\n",
        ":▁",
        ":▁T",
        "▁T",
        "▁▁",
        "th",
        "▁th",
        "</",
        "s>",
        "</s>",
        "im",
        "<im",
        "ag",
        "<imag",
        "e>",
        "<image>",
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    pieces += [join for join in joins if join not in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(j[:i], j[i:]) for j in joins for i in range(1, len(j)) if j[:i] in vocab and j[i:] in vocab]
    extra = {"image_token": "<image>", "start_token": "<|im_start|>", "end_token": "<|im_end|>"}
    return LlamaTokenizer(vocab=vocab, merges=merges, pad_token="<pad>", extra_special_tokens=extra)


def decode_prompt(conversation, tokenizer, prompt_ids) -> str:
    """The text that `encode_prompt`'s ids were made from, special tokens and BOS written out.

    A legacy tokenizer puts a word-start mark behind every special token, and decoding makes a space of it that
    no text had ("<image> \\n"). Decoding what stands between the special tokens by itself drops the mark, as the
    tokenizer drops it at the start of a text. The published checkpoints' tokenizers are of this kind.
    """
    marked = tokenizer.tokenize(conversation.special_tokens[0] + "a")[1].startswith("▁")
    if not marked:
        return tokenizer.decode(prompt_ids)
    special, text, start = set(tokenizer.added_tokens_decoder), "", 0
    for end, number in enumerate([*prompt_ids, None]):
        if number is None or number in special:
            text += tokenizer.decode(prompt_ids[start:end])
            text += "" if number is None else tokenizer.convert_ids_to_tokens(number)
            start = end + 1
    return text
