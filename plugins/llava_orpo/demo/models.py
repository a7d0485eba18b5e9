"""The two models of the demo: answers as a stream, and the score of every token of two candidate answers.

Prompt, image tokens and scores come from the modules that training and `evals/preference.py` use.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from ..checkpoint.adapter import check_adapter
from ..data import images
from ..data.anyres import processor_geometry
from ..data.conversation import expand_image_token
from ..evaluation.generation import answer_batch, batch_inputs
from ..evaluation.session import Session, open_session
from ..recipe import model_label, with_model
from ..step.token_logps import token_logps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_MEGAPIXELS = 50
_DEVICE = threading.Lock()  # one request computes at a time: the adapter is switched on the shared base model


@dataclass(frozen=True)
class Candidate:
    """One of the two models on the page. adapter: whether the session's PEFT adapter is on; None if it has none."""

    label: str
    session: Session
    adapter: bool | None = None
    at_once = 1  # requests: this process computes them itself

    def chosen(self) -> AbstractContextManager:
        """The model as this candidate, while the context lasts. The caller must hold the device's lock."""
        return self.session.model.disable_adapter() if self.adapter is False else nullcontext()

    def stream_answer(self, image: bytes, question: str, max_new_tokens: int) -> Iterator[str]:
        """See `stream_answer`."""
        return stream_answer(self, image, question, max_new_tokens)

    def compare(self, image: bytes, question: str, a: str, b: str) -> Comparison:
        """See `compare`."""
        return compare(self, image, question, a, b)


@dataclass(frozen=True)
class ScoredAnswer:
    """tokens: (text, log-prob in nats, number of tokens) per readable piece, the end token last."""

    tokens: tuple[tuple[str, float, int], ...]
    logp: float
    length: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.logp / self.length


@dataclass(frozen=True)
class Comparison:
    """One model's scores of answers a and b. margin: mean log-prob of a minus that of b; 0 is a tie."""

    a: ScoredAnswer
    b: ScoredAnswer
    margin: float


def load_candidates(recipe: dict, aligned: str, output_dir: str) -> tuple[Candidate, Candidate]:
    """(base, aligned). An adapter folder shares the base's weights; a merged folder is a second model.

    Raises CheckpointError for an adapter of another base, and whatever loading raises.
    """
    base_recipe, aligned_recipe = with_model(recipe, "base"), with_model(recipe, aligned)
    labels = model_label(base_recipe), model_label(aligned_recipe)
    is_adapter = "adapter_name_or_path" in aligned_recipe
    if is_adapter:
        check_adapter(aligned, recipe["model_name_or_path"])
    session = open_session(base_recipe, output_dir, need_rows=False)
    if not is_adapter:
        other = open_session(aligned_recipe, output_dir, need_rows=False)
        return Candidate(labels[0], session), Candidate(labels[1], other)
    model = PeftModel.from_pretrained(session.model, aligned).eval()  # LLaMA-Factory would merge it on a 16-bit base
    session = dataclasses.replace(session, model=model)
    return Candidate(labels[0], session, adapter=False), Candidate(labels[1], session, adapter=True)


def read_image(path: str | Path) -> bytes:
    """The bytes of an uploaded image. Raises images.ImageError for another format or too many pixels."""
    data = Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        raise images.ImageError(f"This is not an image that can be read. Use {', '.join(FORMATS)}.") from None
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise images.ImageError(f"{width}x{height} pixels are too many: the limit is {MAX_MEGAPIXELS} megapixels.")
    return data


def encode(session: Session, image: bytes, question: str) -> tuple[list[int], Image.Image]:
    """(prompt ids with every image token, the picture); the image first, as in training."""
    conversation = session.template.conversation
    ids = conversation.encode_prompt(session.tokenizer, question, has_image=True)
    count = processor_geometry(session.processor).num_image_tokens(*images.header_size(image))
    return expand_image_token(ids, session.image_token_id, count), images.decode_rgb(image)


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def stream_answer(candidate: Candidate, image: bytes, question: str, max_new_tokens: int) -> Iterator[str]:
    """Yields the greedy answer as far as it is written, again and again until it is whole.

    Generation runs in a thread of its own and stops when the iterator is closed. Errors are raised here.
    """
    session = candidate.session
    ids, picture = encode(session, image, question)
    room = session.model.config.get_text_config().max_position_embeddings - len(ids)
    if room < 1:
        raise ValueError(f"The question is too long: the prompt has {len(ids)} tokens.")
    streamer = TextIteratorStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed, errors = threading.Event(), []

    def generate() -> None:
        try:
            inputs = batch_inputs(session, [ids], [picture])
            stopping = [_Stop(closed)]
            with _DEVICE, candidate.chosen():
                answer_batch(session, inputs, min(max_new_tokens, room), streamer=streamer, stopping_criteria=stopping)
        except Exception as error:  # handed to the thread that reads the stream
            errors.append(error)
            streamer.end()

    threading.Thread(target=generate, daemon=True).start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text.strip()
    finally:
        closed.set()
    if errors:
        raise errors[0]


def encode_answers(session: Session, image: bytes, question: str, a: str, b: str) -> dict[str, Any]:
    """The pair as a row of `data.pairs.PairProcessor`, with a as the chosen answer and b as the rejected one.

    Raises ValueError for equal answers and for what the recipe's cutoff_len would cut.
    """
    if a == b:
        raise ValueError("The two answers are the same text.")
    conversation = session.template.conversation
    [(prompt_ids, *responses)] = conversation.encode_pairs(session.tokenizer, [question], [a], [b], [True])
    width, height = images.header_size(image)
    count = processor_geometry(session.processor).num_image_tokens(width, height)
    total = len(prompt_ids) - 1 + count + max(map(len, responses))
    if total > (limit := int(session.recipe.get("cutoff_len", 2048))):
        raise ValueError(f"Question, image and answer have {total} tokens; the recipe's cutoff_len is {limit}.")
    return {
        "pair_id": "demo",
        "image": image,
        "image_hash": "demo",
        "width": width,
        "height": height,
        "prompt_ids": prompt_ids,
        "chosen_ids": responses[0],
        "rejected_ids": responses[1],
        "num_image_tokens": count,
    }


def compare(candidate: Candidate, image: bytes, question: str, a: str, b: str) -> Comparison:
    """Scores both answers in one forward behind the shared prompt; the numbers are those of `evals/preference.py`.

    Raises ValueError as `encode_answers`.
    """
    session = candidate.session
    row = encode_answers(session, image, question, a, b)
    batch = session.collator([row])
    if batch["bad_images"]:
        raise images.ImageError(f"The image is damaged: {batch['bad_images'][0][1]}")
    session.model.requires_grad_(False)  # PEFT turns an adapter's gradients on whenever it switches it on
    with _DEVICE, candidate.chosen():
        scored = session.forward(batch)
    logps = token_logps(scored.logits[0], scored.packed.targets).split(scored.packed.response_lengths)
    responses = row["chosen_ids"], row["rejected_ids"]
    answers = [
        ScoredAnswer(tuple(readable(session.tokenizer, ids, values.tolist())), total, len(ids))
        for ids, values, total in zip(responses, logps, scored.sums.double().tolist(), strict=True)
    ]
    return Comparison(*answers, answers[0].mean - answers[1].mean)


def readable(tokenizer, ids: list[int], logps: list[float]) -> Iterator[tuple[str, float, int]]:
    """(text, summed log-prob, number of tokens) per piece; tokens that are only part of a character stay together."""
    done, held, count = "", 0.0, 0
    for position, logp in enumerate(logps, start=1):
        text = tokenizer.decode(ids[:position], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        held, count = held + logp, count + 1
        if text.endswith("\ufffd") and position < len(ids):
            continue
        yield text[len(done) :], held, count
        done, held, count = text, 0.0, 0
