"""Why a server's prompts, answers or log-probs differ from the reference's.

Each possible cause is computed and compared with what was seen. A cause is named only if it explains every observation;
what none explains is shown as it is.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from PIL import Image

from ..data.conversation import CONVERSATIONS, Conversation
from .reference import Row

EXIF_ORIENTATION = 0x0112
MISSING_BOS = "the BOS token is missing: its chat template holds none and the server adds none (scripts/serve.sh does)"
OTHER_PROMPT = "the prompt differs"
SHOWN = 40  # characters


def prompt_variants(conversation: Conversation, tokenizer) -> dict[str, Callable[[str, bool], list[int]]]:
    """{what went wrong: (question, has_image) -> ids with one image placeholder}."""
    bos = tokenizer.bos_token or ""

    def ids(text: str) -> list[int]:
        return tokenizer(text).input_ids

    def bare(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def of(change: Callable[[str], str], encode: Callable[[str], list[int]] = ids, conversation=conversation):
        return lambda question, has_image: encode(change(conversation.render_prompt(question, has_image)))

    variants = {
        MISSING_BOS: of(str, bare),
        "the BOS token is there twice": of(lambda text: bos + text),
        "a blank stands between the BOS token and the prompt": of(lambda text: f"{bos} {text}", bare),
        "the blank between the BOS token and the prompt is missing": of(lambda text: bos + text, bare),
        "the line end after the image is missing": of(lambda text: text.replace("<image>\n", "<image>")),
        "a blank follows the line end after the image": of(lambda text: text.replace("<image>\n", "<image>\n ")),
        "a line end follows the prompt": of(lambda text: text + "\n"),
        "the question stands alone, without a chat template": lambda question, has_image: ids(
            "<image>\n" * has_image + question
        ),
    }
    for other in CONVERSATIONS.values():
        if other.name != conversation.name:
            variants[f"the chat template is that of {other.name}"] = of(str, ids, other)
            variants[f"the chat template is that of {other.name}, and the BOS token is missing"] = of(str, bare, other)
    return variants


def prompt_causes(
    conversation: Conversation,
    tokenizer,
    image_token: int,
    rows: Sequence[Row],
    records: dict[int, dict[str, Any]],
    text_tokens: int | None,
    text_ids: list[int] | None,
) -> list[str]:
    """Why prompts differ, one sentence per cause; [] if all that the server told of them is equal.

    records: the server's answers by position. text_tokens, text_ids: of the first row's question without its image.
    """
    seen = [row for row in rows if row.position in records]
    with_ids = [row for row in seen if records[row.position]["prompt_ids"]]
    counted = [row for row in seen if records[row.position]["prompt_tokens"] is not None]
    if with_ids:
        texts = [(row, _collapsed(records[row.position]["prompt_ids"], image_token)) for row in with_ids]
        text_differs = [(row, got) for row, got in texts if got != row.plain_ids]
        found = _image_counts(
            (records[row.position]["prompt_ids"].count(image_token), row.prompt_ids.count(image_token))
            for row in with_ids
        )
        if text_differs:
            found = [_named(conversation, tokenizer, text_differs) or _shown(tokenizer, *text_differs[0]), *found]
        return found + _special_tokens(tokenizer, [row for row, _ in text_differs])
    off = {row.position: records[row.position]["prompt_tokens"] - len(row.prompt_ids) for row in counted}
    if not any(off.values()):
        return []
    first = rows[0]
    expected = conversation.encode_prompt(tokenizer, first.question, False)
    if text_tokens == len(expected):
        return _image_counts(
            (row.prompt_ids.count(image_token) + off[row.position], row.prompt_ids.count(image_token))
            for row in counted
        )
    fitting = [
        cause
        for cause, variant in prompt_variants(conversation, tokenizer).items()
        if (text_tokens is None or len(variant(first.question, False)) == text_tokens)
        and all(
            len(variant(row.question, row.image is not None)) - len(row.plain_ids) == off[row.position]
            for row in counted
        )
    ]
    if fitting:
        return [" or ".join(fitting) + " (by the counts; the server returns no ids)"]
    shown = ", ".join(f"{change:+d}" for change in sorted(set(off.values())))
    text = "" if text_tokens is None else f"; without an image {text_tokens - len(expected):+d}"
    return [f"prompts differ by {shown} tokens{text}: another chat template, or another layout of the image"]


def _collapsed(ids: Sequence[int], image_token: int) -> list[int]:
    """The ids with every run of image tokens as one."""
    return [i for token, run in groupby(ids) for i in ([token] if token == image_token else list(run))]


def _named(conversation: Conversation, tokenizer, different: Sequence[tuple[Row, list[int]]]) -> str:
    for cause, variant in prompt_variants(conversation, tokenizer).items():
        if all(variant(row.question, row.image is not None) == got for row, got in different):
            return cause
    return ""


def _shown(tokenizer, row: Row, got: list[int]) -> str:
    want = row.plain_ids
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    texts = [tokenizer.decode(ids[at:])[:SHOWN] for ids in (got, want)]
    return f"the chat template is another: at token {at} the server reads {texts[0]!r}, training read {texts[1]!r}"


def _image_counts(pairs: Iterable[tuple[int, int]]) -> list[str]:
    pairs = list(pairs)
    other = [(got, want) for got, want in pairs if got != want]
    if not other:
        return []
    got, want = other[0]
    if all(got <= 1 for got, _ in other):
        return [f"the image is not seen: {len(other)} of {len(pairs)} prompts hold no image tokens"]
    return [
        f"{len(other)} of {len(pairs)} images have another number of tokens ({got} instead of {want}, for one): the "
        "image reaches the model in another size, or its tiles, line ends or padding are laid out otherwise"
    ]


def _special_tokens(tokenizer, rows: Sequence[Row]) -> list[str]:
    literal = [token for token in tokenizer.all_special_tokens if any(token in row.question for row in rows)]
    if not literal:
        return []
    return [f"a question holds {', '.join(literal)} as text, which the server reads as a special token"]


def image_cause(data: bytes | None) -> str:
    """What a server may make of an image otherwise than LLaVA, which neither turns it nor fills what is transparent."""
    if data is None:
        return ""
    with Image.open(io.BytesIO(data)) as image:
        if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            return "the image has an EXIF orientation, by which the server may turn it"
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            return "the image is transparent in places, which the server may fill with white"
    return ""


def answer_cause(
    row: Row, record: dict[str, Any], ours: str, prompt_differs: bool, gap: float | None, close: float
) -> str:
    """Why an answer differs from `ours`.

    gap: see `reference.gap_where_they_part`; close: a gap that rounding can turn round.
    """
    if prompt_differs:
        return OTHER_PROMPT
    if record["finish"] == "length" and ours.startswith(record["answer"]):
        return "the server cut them at its limit of tokens"
    if gap is not None and abs(gap) <= close:
        return f"a tie within rounding: where they part, the two tokens are less than {close:g} nats apart"
    return image_cause(row.image) or "the same prompt, but other log-probs: other weights or image features"
