"""The tokenizer in which no text can be a special token (see `Conversation`)."""

from __future__ import annotations

import functools
import json
import secrets
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .conversation import Conversation


@dataclass(frozen=True)
class PrivateTokenizer:
    """A copy of a tokenizer, and of a conversation, with every special token under a private name.

    Attributes:
        whole: tokenizes what starts with the text's beginning, as the tokenizer itself does.
        response: tokenizes what follows a prompt: no BOS, no word-start mark added in front.
        conversation: the texts around each message.
        joined_to_the_end: the characters that some piece of the vocabulary has right after the last character of a
            prompt; None when the tokenizer does more than this analysis covers, and nothing may be tokenized apart.
            BPE joins two characters only in a piece that has them side by side: if no piece has the two characters at
            the cut, nothing is joined across it, and both sides get the same ids as they would alone.
    """

    whole: object
    response: object
    conversation: Conversation
    joined_to_the_end: frozenset[str] | None

    def begins_apart(self, response: str) -> bool:
        """Whether a response text may be tokenized without its prompt."""
        return self.joined_to_the_end is not None and response[0] not in self.joined_to_the_end


@functools.lru_cache(maxsize=16)
def private_tokenizer(conversation: Conversation, tokenizer, _size: int):
    """`PrivateTokenizer` of a tokenizer. _size is len(tokenizer): tokens added later make a new copy."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(f"template {conversation.name} needs a BPE tokenizer, this one is {model['type']}")
    added = {token["content"] for token in spec["added_tokens"]}
    if missing := [token for token in conversation.special_tokens if token not in added]:
        raise UserError(f"the tokenizer lacks {missing}, which {conversation.name} needs: another checkpoint's?")
    # 128 random bits between Unicode noncharacters: no text contains this, and the ids do not depend on it.
    secret, names = secrets.token_hex(16), {}
    for token in spec["added_tokens"]:
        content = token["content"]
        if token["special"] or content in conversation.special_tokens:
            token["content"] = names[content] = f"\ufdd0{secret}:{token['id']}\ufdd1"
    model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    # A merge that makes "</s>" out of plain characters would turn text into the end token.
    model["merges"] = [m for m in model["merges"] if names.keys().isdisjoint((*m, "".join(m)))]
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    spec["truncation"] = spec["padding"] = None  # left behind by earlier tokenizer calls
    private = conversation
    for content in sorted(names, key=len, reverse=True):
        private = replace(
            private,
            generation=private.generation.replace(content, names[content]),
            image=private.image.replace(content, names[content]),
            **{
                part: tuple(text.replace(content, names[content]) for text in getattr(private, part))
                for part in ("system", "user", "answered", "response")
            },
        )
    build = type(tokenizer.backend_tokenizer).from_str
    whole, response = build(json.dumps(spec)), build(json.dumps(_without_word_start(spec)))
    prefix_only = whole.encode("a").ids[-1:] == whole.encode("a", add_special_tokens=False).ids[-1:]
    joined = _joined_after(spec, (private.user[1] + private.generation)[-1]) if prefix_only else None
    return PrivateTokenizer(whole, response, private, joined)


def _normalizers(spec: dict) -> list[dict]:
    first = spec["normalizer"]
    return [] if first is None else first["normalizers"] if first["type"] == "Sequence" else [first]


def _without_word_start(spec: dict) -> dict:
    """A tokenizer's description that puts no word-start mark before the first character."""
    kept = [part for part in _normalizers(spec) if part["type"] != "Prepend"]
    spec = {**spec, "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None}
    if (spec["pre_tokenizer"] or {}).get("type") == "Metaspace":
        spec["pre_tokenizer"] = {**spec["pre_tokenizer"], "prepend_scheme": "never"}
    return spec


def _joined_after(spec: dict, last: str) -> frozenset[str] | None:
    """The characters of a text that some piece has right after `last`; None if the vocabulary alone cannot tell."""
    model, splitter = spec["model"], spec["pre_tokenizer"]
    space = {"String": " "}
    plain = (
        all(
            n["type"] == "Prepend" or (n["type"], n.get("pattern"), n.get("content")) == ("Replace", space, "▁")
            for n in _normalizers(spec)
        )
        and (splitter is None or (splitter["type"], splitter.get("replacement")) == ("Metaspace", "▁"))
        and not any(
            model.get(k) for k in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        )
        and not any(piece.startswith("<0x") for merge in model["merges"] for piece in merge)  # bytes of unknown letters
        and all(token["content"].startswith("\ufdd0") for token in spec["added_tokens"])  # none can occur in a text
        and not any(token[k] for token in spec["added_tokens"] for k in ("lstrip", "rstrip", "single_word"))
        and last in model["vocab"]
    )
    if not plain:
        return None
    found = {b for piece in model["vocab"] for a, b in pairwise(piece) if a == last}
    return frozenset(found | {" "} if "▁" in found else found)
