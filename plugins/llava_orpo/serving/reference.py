"""What plain transformers answers to a recipe's held-out rows, and the log-probs it gives their answers, one at a time.

Nothing of the shared-prefix step runs here: `generate` and the model's own forward, without padding, on the prompt ids
that training uses.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import image_store, images
from ..data.conversation import expand_image_token
from ..evaluation.generation import SIDES, answer_batch, batch_inputs
from ..evaluation.resume import fingerprint
from ..evaluation.saved import Saved
from ..evaluation.session import Session
from ..preference import scoring
from ..step.attention import unwrap


@dataclass(frozen=True)
class Row:
    """One held-out pair as the model was trained on it.

    prompt_ids    ids before the answer, the image placeholder repeated for every image token
    plain_ids     the same with one placeholder
    answer_ids    {"chosen": ids, "rejected": ids}, end token included
    answer_texts  {"chosen": text, "rejected": text} of those ids
    image         the original bytes of the image, or None
    """

    position: int
    pair_id: str
    dataset: str
    source: str
    question_type: str
    image_hash: str
    question: str
    prompt_ids: list[int]
    plain_ids: list[int]
    answer_ids: dict[str, list[int]]
    answer_texts: dict[str, str]
    image: bytes | None


def read_rows(session: Session, positions: Sequence[int]) -> tuple[list[Row], dict[int, str]]:
    """(rows, {position: why its image cannot be read})."""
    ids, tokenizer = scoring.unique_ids(session.rows), session.tokenizer
    found, bad = [], {}
    for position in positions:
        row = session.rows[position]
        has_image = row["image"] is not None
        try:
            data = image_store.read_bytes(row["image"]) if has_image else None
            if data is not None:
                images.decode_rgb(data)
        except (images.ImageError, OSError) as error:
            bad[position] = str(error)
            continue
        plain = session.template.conversation.encode_prompt(tokenizer, row["question"], has_image)
        full = expand_image_token(plain, session.image_token_id, row["num_image_tokens"]) if has_image else plain
        answers = {side: list(row[f"{side}_ids"]) for side in SIDES}
        texts = {side: tokenizer.decode(answers[side], skip_special_tokens=True).strip() for side in SIDES}
        named = {key: row[key] for key in ("dataset", "source", "question_type", "image_hash", "question")}
        found.append(
            Row(
                position,
                ids[position],
                **named,
                prompt_ids=full,
                plain_ids=plain,
                answer_ids=answers,
                answer_texts=texts,
                image=data,
            )
        )
    return found, bad


def precision(session: Session) -> str:
    """The dtype that the reference computes in, and where: `float32 on cpu`."""
    weights = next(p.dtype for p in session.model.parameters() if p.is_floating_point())
    return f"{session.autocast or weights} on {session.device.type}".replace("torch.", "")


class Reference:
    """The reference's answers and log-probs, kept in a file: asked again only when model, rows or settings change.

    session: without its model if `whole` says that nothing is left to compute.
    """

    def __init__(self, session: Session, folder: Path, max_new_tokens: int):
        parts = [fingerprint(session), max_new_tokens, importlib.metadata.version("transformers")]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
        self.session, self.max_new_tokens = session, max_new_tokens
        self.saved = Saved(folder / ".parity_reference.jsonl", key)
        self.found = {record["position"]: record for record in self.saved.records}

    def missing(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that were not computed yet."""
        return [row for row in rows if row.position not in self.found]

    def compute(self, rows: Sequence[Row]) -> None:
        """Computes what is missing. Raises as loading an image does."""
        waiting = self.missing(rows)
        if not waiting:
            return
        with self.saved.appending(len(rows), len(rows) - len(waiting), "row", "transformers") as add:
            for row in waiting:
                record = self._record(row)
                add([record])
                self.found[row.position] = record

    def _record(self, row: Row) -> dict[str, Any]:
        started = time.monotonic()
        inputs = batch_inputs(self.session, [row.prompt_ids], pictures(row))
        (text,) = answer_batch(self.session, inputs, self.max_new_tokens)
        seconds = time.monotonic() - started
        return {
            "position": row.position,
            "precision": precision(self.session),
            "answer": text,
            "seconds": seconds,
            "tokens": len(self.session.tokenizer(text, add_special_tokens=False).input_ids) + 1,
            "logps": {side: token_logps(self.session, row, row.answer_ids[side]) for side in SIDES},
        }


def pictures(row: Row) -> list:
    """The row's image as a list for the processor."""
    return [] if row.image is None else [images.decode_rgb(row.image)]


@torch.no_grad()
def token_logps(session: Session, row: Row, answer: Sequence[int]) -> list[float]:
    """The log-prob of every token of `answer` after the row's prompt, in nats, by the model's own forward."""
    return [float(value) for value in _logps(session, row, answer).gather(1, torch.tensor(answer)[:, None])[:, 0]]


def _logps(session: Session, row: Row, answer: Sequence[int]) -> torch.Tensor:
    """(len(answer), vocabulary) fp32 log-probs at the places of the answer's tokens, on the CPU."""
    inputs = batch_inputs(session, [[*row.prompt_ids, *answer]], pictures(row))
    inputs = {key: value.to(session.device) for key, value in inputs.items()}
    with session.precision():
        logits = session.model(**inputs, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.float().log_softmax(-1).cpu()


@torch.no_grad()
def gap_where_they_part(session: Session, row: Row, ours: str, theirs: str) -> float | None:
    """How much more likely (nats) the reference finds its own next token than the server's, where the answers part.

    None where one answer is the start of the other or they part in text that has the same tokens.
    """
    tokenizer, response = session.tokenizer, session.template.conversation.response
    texts = [response[0] + text + response[1] for text in (ours, theirs)]
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return None
    logps = _logps(session, row, a[: at + 1])[at]
    return float(logps[a[at]] - logps[b[at]])


@contextmanager
def with_projector(session: Session, state: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the model's projector has the weights `state`."""
    projector = unwrap(session.model).model.multi_modal_projector
    own = projector_state(session)
    projector.load_state_dict(state)
    try:
        yield
    finally:
        projector.load_state_dict(own)


def projector_state(session: Session) -> dict[str, torch.Tensor]:
    """A copy of the projector's weights, on the CPU."""
    state = unwrap(session.model).model.multi_modal_projector.state_dict()
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
