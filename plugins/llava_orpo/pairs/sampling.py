"""Several answers of one model to each prompt: sampled here, image and prompt prefilled once, or by a server.

A record of one prompt is {"position", "dataset", "pair_id", "answers": [text, …], "cut": [bool, …]}, or has "bad_image"
with the reason in place of answers. cut: whether an answer was stopped by max_new_tokens, so that it has no end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..data import images
from ..data.conversation import full_prompt_ids
from ..data.image_store import load_image
from ..errors import UserError
from ..evaluation import served
from ..evaluation.generation import (
    Settings,
    answer_texts,
    batch_inputs,
    end_tokens,
    generation_config,
    prompt_seed,
)
from ..evaluation.resume import fingerprint
from ..evaluation.sampling import SeededSampling
from ..evaluation.saved import Saved
from ..evaluation.session import Session
from ..preference import scoring
from ..serving.asking import ask_each
from ..serving.chat import messages
from ..serving.client import EndpointUnusable, RequestFailed, Server
from ..step.attention import unwrap

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
    done, waiting = _done(saved, positions)
    if waiting:
        with saved.appending(len(positions), len(positions) - len(waiting), "prompt", "sampling") as add:
            for batch in _sampled(session, waiting, settings, answers):
                add(batch)
                done.update((record["position"], record) for record in batch)
    return {position: done[position] for position in positions}


def _sampled(session: Session, positions: Sequence[int], settings: Settings, answers: int) -> Iterator[list[Record]]:
    """A list of records per batch, longest prompts first."""
    ids = scoring.unique_ids(session.rows)
    image_token = unwrap(session.model).config.image_token_id
    conversation, tokenizer = session.template.conversation, session.tokenizer

    def load(batch: list[int]):
        """Runs in the dataloader's workers."""
        rows, pictures, bad = [], [], []
        for position in batch:
            row = dict(session.rows[position], position=position)
            row["prompt_ids"] = conversation.encode_prompt(tokenizer, row["question"], row["image"] is not None)
            try:
                picture = load_image(row["image"]) if row["image"] is not None else None
            except (images.ImageError, OSError) as err:
                bad.append((row, str(err)))
                continue
            rows.append(row)
            if picture is not None:
                pictures.append(picture)
        sequences = [full_prompt_ids(row, image_token) for row in rows]
        return rows, bad, batch_inputs(session, sequences, pictures) if rows else {}

    order = sorted(positions, key=lambda p: -session.rows[p]["num_image_tokens"] - len(session.rows[p]["prompt_ids"]))
    loader = DataLoader(order, batch_size=session.batch_size, collate_fn=load, num_workers=session.num_workers)
    for rows, bad, inputs in loader:
        records = [_record(row, ids, bad_image=reason) for row, reason in bad]
        if rows:
            seeds = [seed for row in rows for seed in answer_seeds(row, settings.seed, answers)]
            texts, cut = sample_batch(session, inputs, settings, seeds)
            for number, row in enumerate(rows):
                own = slice(number * answers, (number + 1) * answers)
                records.append(_record(row, ids, answers=texts[own], cut=cut[own]))
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
    done, waiting = _done(saved, positions)
    failed: dict[int, str] = {}
    if waiting:
        with saved.appending(len(positions), len(positions) - len(waiting), "prompt", f"sampling {name}") as add:
            try:
                asker = _Asker(server, session, name, settings)
                asker.answers = answers
                asyncio.run(_ask_all(asker, waiting, done, failed, add))
            except EndpointUnusable as error:
                raise server.unusable(error, served.KEPT) from None
    return {position: done[position] for position in positions if position in done}, failed


async def _ask_all(asker: _Asker, waiting: list[int], done: dict[int, Record], failed: dict[int, str], add) -> None:
    await asker.settled(waiting)
    try:
        asking = ask_each(waiting, asker.record, asker.server.concurrency)
        async with contextlib.aclosing(asking) as answered:
            async for position, found in answered:
                if isinstance(found, RequestFailed):
                    failed[position] = str(found)
                else:
                    add([found])
                    done[position] = found
    finally:
        await asker.client.close()


class _Asker(served.Asker):
    """Asks for several answers to a prompt."""

    answers = 1

    async def record(self, position: int) -> Record:
        """The record of one prompt. Raises as `ChatClient.ask`."""
        row = self.row(position)
        try:
            url = await served.picture_of(row)
        except (images.ImageError, OSError) as error:
            return _record(row, self.ids, bad_image=str(error))
        texts, cut, record = [], [], {}
        for seed in answer_seeds(row, self.settings.seed, self.answers):
            payload = {"model": self.name, "messages": messages(row["question"], url), **self.extra}
            payload.update(self.sampling(row), seed=seed & served.SEED_BITS)
            payload.update(self.server.request)
            answer = await self.client.ask({field: value for field, value in payload.items() if value is not None})
            there, right = answer["usage"].get("prompt_tokens"), self.prompt_tokens(row)
            if there and there != right:
                record["prompt_tokens"] = [there, right]
            texts.append(answer["text"].strip())
            cut.append(answer["usage"].get("completion_tokens", 0) >= self.settings.max_new_tokens)
        return _record(row, self.ids, answers=texts, cut=cut, **record)


def _record(row: dict[str, Any], ids: list[str], **what: Any) -> Record:
    return {"position": row["position"], "dataset": row["dataset"], "pair_id": ids[row["position"]], **what}


def _done(saved: Saved, positions: Sequence[int]) -> tuple[dict[int, Record], list[int]]:
    done = {record["position"]: record for record in saved.records}
    return done, [position for position in positions if position not in done]


def _key(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
