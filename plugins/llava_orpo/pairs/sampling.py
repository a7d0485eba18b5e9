"""Several answers of one model to each prompt: sampled here, image and prompt prefilled once, or by a server.

A record of one prompt is {"position", "dataset", "pair_id", "answers": [text, …], "cut": [bool, …]}, or has "bad_image"
with the reason in place of answers. cut: whether an answer was stopped by max_new_tokens, so that it has no end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import images
from ..errors import UserError
from ..evaluation import served
from ..evaluation.generation import (
    Settings,
    answer_texts,
    end_tokens,
    generation_config,
    prompt_batches,
    prompt_seed,
    record_of,
)
from ..evaluation.resume import fingerprint
from ..evaluation.sampling import SeededSampling
from ..evaluation.saved import Saved
from ..evaluation.session import Session
from ..serving.client import Server

Record = dict[str, Any]


def check(settings: Settings, answers: int) -> None:
    """Raises UserError where the answers to a prompt could not differ."""
    if answers < 2:
        raise UserError(f"answers={answers}: a pair needs at least two answers to a prompt.")
    if settings.temperature <= 0:
        raise UserError(f"temperature={settings.temperature}: greedy answers are all equal; set temperature=0.7.")


def answer_seeds(row: dict[str, Any], seed: int, count: int) -> list[int]:
    """A seed for each answer to a prompt; the first is the one with which `evals/generate.py` samples its answer."""
    return [prompt_seed(row, seed), *(prompt_seed(row, [seed, number]) for number in range(1, count))]


def sample(
    session: Session, positions: Sequence[int], folder: Path, settings: Settings, answers: int, restart: bool = False
) -> dict[int, Record]:
    """{position: record} of the session's own model, saved in `folder` as they come; saved ones are not sampled again.

    Raises UserError as `check`.
    """
    check(settings, answers)
    key = _key([fingerprint(session), dataclasses.asdict(settings), answers])
    saved = Saved(folder / ".sampled.jsonl", key, restart)
    done = {record["position"]: record for record in saved.records}
    waiting = [position for position in positions if position not in done]
    if waiting:
        with saved.appending(len(positions), len(positions) - len(waiting), "prompt", "sampling") as add:
            for batch in _sampled(session, waiting, settings, answers):
                add(batch)
                done.update((record["position"], record) for record in batch)
    return {position: done[position] for position in positions}


def _sampled(session: Session, positions: Sequence[int], settings: Settings, answers: int) -> Iterator[list[Record]]:
    """A list of records per batch, longest prompts first."""
    for rows, records, inputs in prompt_batches(session, positions):
        if rows:
            seeds = [seed for row in rows for seed in answer_seeds(row, settings.seed, answers)]
            texts, cut = sample_batch(session, inputs, settings, seeds)
            for number, row in enumerate(rows):
                own = slice(number * answers, (number + 1) * answers)
                records.append(record_of(row, answers=texts[own], cut=cut[own]))
        yield records


@torch.no_grad()
def sample_batch(
    session: Session, inputs: dict[str, torch.Tensor], settings: Settings, seeds: Sequence[int]
) -> tuple[list[str], list[bool]]:
    """(texts, whether each was cut off) of len(seeds) / n answers to each of n prompts, prompt by prompt.

    inputs: of `generation.batch_inputs`. Image and prompt go through the model once; the cache of their keys and values
    is repeated for the answers. An answer is the one that `generation.answer_batch` gives to its prompt with its seed.
    """
    inputs = {key: value.to(session.device) for key, value in inputs.items()}
    prompts, width = inputs["input_ids"].shape
    repeats = len(seeds) // prompts
    with session.precision():
        first = session.model.generate(
            **inputs, generation_config=generation_config(session, 1, return_dict_in_generate=True)
        )
        cache = first.past_key_values
        cache.crop(width - 1)  # the last token runs again: its logits begin the answers
        cache.batch_repeat_interleave(repeats)
        out = session.model.generate(
            input_ids=inputs["input_ids"].repeat_interleave(repeats, 0),
            attention_mask=inputs["attention_mask"].repeat_interleave(repeats, 0),
            past_key_values=cache,
            generation_config=generation_config(session, settings.max_new_tokens),
            logits_processor=[SeededSampling(seeds, settings.temperature, settings.top_p)],
        )[:, width:]
    ends = torch.tensor(end_tokens(session.template.conversation, session.tokenizer), device=out.device)
    return answer_texts(session, out), (~torch.isin(out, ends).any(1)).tolist()


def sample_served(
    server: Server,
    session: Session,
    positions: Sequence[int],
    folder: Path,
    name: str,
    settings: Settings,
    answers: int,
    restart: bool = False,
) -> tuple[dict[int, Record], dict[int, str]]:
    """({position: record}, {position: why the server did not give all its answers}) of a served model.

    The answers to a prompt are requests of their own, with seeds of their own, one after the other: a server with
    prefix caching (vLLM) runs image and prompt once. Those of a prompt are saved together, as they come.

    Raises UserError as `check`, and when the server cannot be used, stops answering, or takes no image.
    """
    check(settings, answers)
    used = [dataclasses.asdict(settings), answers, server.request]
    saved = Saved(
        folder / ".sampled_served.jsonl", _key([server.base_url, name, served.rows_digest(session.rows), used]), restart
    )

    def asker() -> _Asker:
        made = _Asker(server, session, name, settings)
        made.answers = answers
        return made

    return served.collect(asker, saved, positions, f"sampling {name}")


class _Asker(served.Asker):
    """Asks for several answers to a prompt."""

    answers = 1

    async def record(self, position: int) -> Record:
        """The record of one prompt. Raises as `ChatClient.ask`."""
        row = {**self.row(position), "unique_id": self.ids[position]}
        try:
            url = await served.picture_of(row)
        except (images.ImageError, OSError) as error:
            return record_of(row, bad_image=str(error))
        texts, cut, found = [], [], {}
        for seed in answer_seeds(row, self.settings.seed, self.answers):
            answer, about = await self.asked(row, url, seed)
            found |= about
            texts.append(answer["text"].strip())
            cut.append(answer["usage"].get("completion_tokens", 0) >= self.settings.max_new_tokens)
        return record_of(row, answers=texts, cut=cut, **found)


def _key(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
