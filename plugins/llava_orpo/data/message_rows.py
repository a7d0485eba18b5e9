"""Pairs written as messages: TRL's conversational layout and ms-swift's, turned into question, chosen and rejected.

    trl_conversational   `images`, and `prompt`, `chosen`, `rejected` as lists of messages: trl-lib/rlaif-v and
                         HuggingFaceH4/rlaif-v_formatted (made by examples/datasets/rlaif-v.py of huggingface/trl)
    ms_swift             `messages` whose last one is the chosen answer, `rejected_response`, `images`, and
                         `rejected_images` (docs/source_en/Customization/Custom-dataset.md of modelscope/ms-swift)

A message is {role, content}; content is a text or a list of {"type": "text", "text": …} and {"type": "image"}. From
JSON files such columns come as JSON texts (see `json_rows`). What a pair of this project cannot be (several questions,
a system message, several images) is a bad row with that reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from . import image_store, rows
from .mm_plugin import PLACEHOLDER, without_placeholder

VERSION = 1  # part of the cache key: raise it when a row gives other texts
MARKED = "_marked"  # column: whether the texts say that there is an image
IMAGES = "images"
REJECTED_IMAGES = "rejected_images"
MESSAGES = {
    "trl_conversational": ("prompt", "chosen", "rejected"),
    "ms_swift": ("messages", "rejected_response", "rejected_messages", REJECTED_IMAGES),
}
PLAIN_TEXTS = {"trl_conversational": (), "ms_swift": ("rejected_response",)}  # columns that hold no messages
FEATURES = {name: Value("large_string") for name in ("question", "chosen", "rejected", rows.UNREADABLE)}


def as_texts(dataset: Dataset, formatting: str, image_column: str, num_proc: int | None = None) -> Dataset:
    """The dataset with `question`, `chosen`, `rejected`, `rows.UNREADABLE` and `MARKED` in place of its messages.

    image_column is left out; its images are read only where there are rejected images to compare them with.
    """
    present = [name for name in MESSAGES[formatting] if name in dataset.column_names]
    read = [*present, *[name for name in (rows.UNREADABLE,) if name in dataset.column_names]]
    if REJECTED_IMAGES in present and image_column in dataset.column_names:
        for name in (REJECTED_IMAGES, image_column):
            dataset = image_store.undecoded(dataset, name)
        read.append(image_column)
    read = read or dataset.column_names[:1]
    converted = dataset.select_columns(read).map(
        convert,
        batched=True,
        batch_size=256,
        remove_columns=read,
        features=Features({**FEATURES, MARKED: Value("bool")}),
        fn_kwargs={"formatting": formatting, "image_column": image_column, "version": VERSION},
        num_proc=num_proc if num_proc and len(dataset) > 4096 else None,
        desc="Reading messages",
    )
    taken = {*read, *converted.column_names, image_column}
    rest = [name for name in dataset.column_names if name not in taken]
    return concatenate_datasets([dataset.select_columns(rest), converted], axis=1) if rest else converted


def convert(batch: dict[str, list[Any]], formatting: str, image_column: str, version: int) -> dict[str, list[Any]]:
    """The texts of a batch of rows, with the reason in `rows.UNREADABLE` for a row that has none. For `map`."""
    out: dict[str, list[Any]] = {name: [] for name in (*FEATURES, MARKED)}
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            if row.get(rows.UNREADABLE):
                raise rows.RowError(row[rows.UNREADABLE])
            question, chosen, rejected, marked = READERS[formatting](row, image_column)
            for name, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
                if rows.SURROGATE.search(text):
                    raise rows.RowError(f"`{name}` holds half a character (a lone surrogate)")
            found = (question, chosen, rejected, None, marked)
        except rows.RowError as error:
            found = (None, None, None, str(error), False)
        for name, value in zip(out, found, strict=True):
            out[name].append(value)
    return out


def _trl(row: Mapping[str, Any], image_column: str) -> tuple[str, str, str, bool]:
    question, marks = _question(_messages(row, "prompt"))
    if marks > 1:
        raise rows.RowError(image_store.TOO_MANY.format(marks))
    return question, _answer(row, "chosen"), _answer(row, "rejected"), bool(marks)


def _ms_swift(row: Mapping[str, Any], image_column: str) -> tuple[str, str, str, bool]:
    *asked, last = _messages(row, "messages")
    question, marks = _question(asked)
    chosen = _text_of_answer(last, "messages")
    rejected = row.get("rejected_response")
    if rejected is None and row.get("rejected_messages") is not None:
        *asked_again, last = _messages(row, "rejected_messages")
        if _question(asked_again) != (question, marks):
            raise rows.RowError("`rejected_messages` ask another question than `messages`")
        rejected = _text_of_answer(last, "rejected_messages")
    if not isinstance(rejected, str):
        kind = type(rejected).__name__
        raise rows.RowError("`rejected_response` is " + ("missing" if rejected is None else f"not text but {kind}"))
    other = _images(row.get(REJECTED_IMAGES))
    if other and other != _images(row.get(image_column)):
        raise rows.RowError("`rejected_images` differ from `images`: both answers of a pair are about one image")
    if PLACEHOLDER in chosen or PLACEHOLDER in rejected:
        raise rows.RowError(f"{PLACEHOLDER} in an answer: an image can only come before the question")
    marks += question.count(PLACEHOLDER)
    if marks > 1:
        raise rows.RowError(image_store.TOO_MANY.format(marks))
    return without_placeholder(question), chosen, rejected, bool(marks)


READERS = {"trl_conversational": _trl, "ms_swift": _ms_swift}


def _messages(row: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    messages = rows.parse_json(row.get(name))
    if messages is None:
        raise rows.RowError(f"`{name}` is missing")
    if not (isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages)):
        raise rows.RowError(f"`{name}` is not a list of messages")
    return messages


def _question(messages: list[Mapping[str, Any]]) -> tuple[str, int]:
    """(text, number of image parts) of the one user message that a prompt must be."""
    roles = [message.get("role") for message in messages]
    if "system" in roles:
        raise rows.RowError("a system message: LLaVA-1.6's prompts have none")
    if roles != ["user"]:
        raise rows.RowError("not one question with two answers (multi-turn pairs are not supported)")
    return _content(messages[0], "the question")


def _answer(row: Mapping[str, Any], name: str) -> str:
    messages = _messages(row, name)
    if len(messages) != 1:
        raise rows.RowError(f"`{name}` is not one message (multi-turn pairs are not supported)")
    return _text_of_answer(messages[0], name)


def _text_of_answer(message: Mapping[str, Any], name: str) -> str:
    if message.get("role") != "assistant":
        raise rows.RowError(f"`{name}` does not end with a message of the assistant")
    text, images = _content(message, f"`{name}`")
    if images:
        raise rows.RowError(f"an image in `{name}`: an image can only come before the question")
    return text


def _content(message: Mapping[str, Any], name: str) -> tuple[str, int]:
    """(the text parts joined, as the checkpoints' chat templates do; number of image parts) of a message."""
    content = message.get("content")
    if isinstance(content, str):
        return content, 0
    if not (isinstance(content, list) and all(isinstance(part, Mapping) for part in content)):
        raise rows.RowError(f"the content of {name} is neither text nor a list of parts")
    texts, images = [], 0
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image":
            images += 1
        else:
            raise rows.RowError(f"the content of {name} has a part of type {part.get('type')!r} that cannot be read")
    return "".join(texts), images


def _images(value: Any) -> list[Any]:
    """The images of a cell, each as its bytes or its path."""
    value = rows.parse_json(value)
    found = value if isinstance(value, list) else [] if value in (None, "") else [value]
    return [
        (image["bytes"] if image.get("bytes") is not None else image.get("path")) if isinstance(image, dict) else image
        for image in found
    ]
