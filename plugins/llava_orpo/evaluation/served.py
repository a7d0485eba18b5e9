"""Answers that an OpenAI-compatible server gives to a recipe's held-out prompts, and its scores of given answers.

The records are those of `generation.answers`. Only the recipe's rows, tokenizer and processor are read here
(`open_session` with need_model=False), and they tell how many tokens every prompt must have: a server that begins the
prompt without BOS, or does not see the image, is noticed by its count.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data import image_store, images
from ..data.conversation import full_prompt_ids
from ..errors import UserError
from ..preference import scoring
from ..preference.fingerprint import rows_digest
from ..serving.asking import ask_each
from ..serving.chat import messages, without_vision
from ..serving.client import ChatClient, EndpointUnusable, RequestFailed, Server, exact_data_url
from .generation import Settings, prompt_seed
from .saved import Saved
from .session import Session

GREETING_RETRIES = 1  # whether anything listens is found out within seconds
KEPT = "Answers that came are kept; the same command asks for the others."
SEED_BITS = 0x7FFFFFFF  # some servers read a seed as 32 bits


def names_on(server: Server, wanted: Sequence[str]) -> list[str]:
    """The served names to ask: `wanted`, or the one model that the server has.

    Raises UserError when nothing answers there, a name is given twice or is not served, or none is given and the server
    has several.
    """
    served = asyncio.run(_served(server))
    if len(set(wanted)) != len(wanted) or not all(wanted):
        raise UserError(f"models={','.join(wanted)}: name every model once.")
    if not wanted and len(served) != 1:
        raise UserError(f"{server.base_url} serves {_listed(served)}: name one with model=, or several with models=.")
    for name in wanted:
        if served and name not in served:
            raise UserError(f"{server.base_url} serves {_listed(served)}, not {name}: an adapter needs a served name.")
    return list(wanted) or served


async def _served(server: Server) -> list[str]:
    client = server.client(GREETING_RETRIES)
    try:
        return await client.models()
    except (EndpointUnusable, RequestFailed) as error:
        if str(error).startswith("status ") and not str(error).startswith(("status 401", "status 403")):
            return []  # a server without a list of models
        raise server.unusable(error) from None
    finally:
        await client.close()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "no list of models"


def answers(
    server: Server,
    session: Session,
    positions: Sequence[int],
    folder: Path,
    name: str,
    settings: Settings,
    restart: bool = False,
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """({position: record as in `generation.answers`}, {position: why the server gave no answer}).

    name: the model's on the server; answers are saved in `folder` as they come, and those of an earlier run of the same
    server address, name, rows and settings are not asked for again. A record whose prompt had another number of tokens
    on the server than in training also has "prompt_tokens": [the server's, the right number].

    Raises UserError when the server cannot be used, stops answering, or does not take images.
    """
    used = [settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed, server.request]
    parts = json.dumps([server.base_url, name, rows_digest(session.rows), used], sort_keys=True)
    place = hashlib.sha256(f"{server.base_url} {name}".encode()).hexdigest()[:12]
    key = hashlib.sha256(parts.encode()).hexdigest()[:16]
    saved = Saved(folder / f".answers_{place}.jsonl", key, restart)
    return collect(lambda: Asker(server, session, name, settings), saved, positions, name)


def collect(
    make: Callable[[], Asker], saved: Saved, positions: Sequence[int], title: str
) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """({position: record}, {position: why the server gave none}); those in `saved` are not asked for again.

    make: called where something is left to ask. title: of the progress bar. Raises UserError as `answers`.
    """
    done = {record["position"]: record for record in saved.records}
    waiting = [position for position in positions if position not in done]
    failed: dict[int, str] = {}
    if waiting:
        asker = make()
        with saved.appending(len(positions), len(positions) - len(waiting), "prompt", title) as add:
            try:
                asyncio.run(_answer_all(asker, waiting, done, failed, add))
            except EndpointUnusable as error:
                raise asker.server.unusable(error, KEPT) from None
    return {position: done[position] for position in positions if position in done}, failed


def other_prompts(records: Sequence[dict[str, Any]]) -> str:
    """A sentence about answers to prompts that are not the recipe's by their number of tokens; "" if all are."""
    other = [record["prompt_tokens"] for record in records if "prompt_tokens" in record]
    if not other:
        return ""
    there, right = other[0]
    return (
        f"{len(other)} of {len(records)} prompts have another number of tokens on the server than in training "
        f"({there} and not {right}, for one): the answers are to other prompts. evals/serve_parity.py says why."
    )


async def _answer_all(asker: Asker, waiting: list[int], done: dict, failed: dict, add) -> None:
    asker = await asker.settled(waiting)
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


class Asker:
    """Asks one served model, from one event loop. extra: fields that make the server's prompt the recipe's."""

    def __init__(self, server: Server, session: Session, name: str, settings: Settings, extra: dict | None = None):
        self.server, self.session, self.name, self.settings = server, session, name, settings
        self.extra = extra or {}
        self.ids = scoring.unique_ids(session.rows)
        self.client = server.client()

    async def settled(self, positions: Sequence[int]) -> Asker:
        """This asker, with the fields that make the prompt of one of the positions as long as in training.

        Raises UserError when the server takes no image, EndpointUnusable as `ask_each`.
        """
        for position in sorted(positions, key=lambda p: self.session.rows[p]["image"] is None):
            row = self.row(position)
            try:
                url = await picture_of(row)
            except (images.ImageError, OSError):
                continue
            self.extra, _ = await settle(self.client, self.name, row["question"], url, self.prompt_tokens(row))
            break
        return self

    def row(self, position: int) -> dict[str, Any]:
        """A row of the session with the prompt's ids alone, as `generation.generate` reads it."""
        row = dict(self.session.rows[position], position=position)
        conversation, tokenizer = self.session.template.conversation, self.session.tokenizer
        row["prompt_ids"] = conversation.encode_prompt(tokenizer, row["question"], row["image"] is not None)
        return row

    def prompt_tokens(self, row: dict[str, Any]) -> int:
        """The number of tokens that the model was trained with for this prompt, image tokens included."""
        return len(full_prompt_ids(row, self.session.image_token_id))

    async def record(self, position: int) -> dict[str, Any]:
        """The record of one prompt. Raises as `ChatClient.ask`."""
        row = self.row(position)
        record = {"position": position, "dataset": row["dataset"], "pair_id": self.ids[position]}
        try:
            url = await picture_of(row)
        except (images.ImageError, OSError) as error:
            return {**record, "bad_image": str(error)}
        answer, about = await self.asked(row, url, prompt_seed(row, self.settings.seed))
        return {**record, **about, "answer": answer["text"].strip()}

    async def asked(self, row: dict[str, Any], url: str | None, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the client's answer to a row's prompt, "prompt_tokens" if the prompt had another number of tokens there).

        url: of `picture_of`. Raises as `ChatClient.ask`.
        """
        payload = {"model": self.name, "messages": messages(row["question"], url), **self.extra, **self.sampling(seed)}
        payload.update(self.server.request)
        answer = await self.client.ask({field: value for field, value in payload.items() if value is not None})
        there, right = answer["usage"].get("prompt_tokens"), self.prompt_tokens(row)
        return answer, {"prompt_tokens": [there, right]} if there and there != right else {}

    def sampling(self, seed: int) -> dict[str, Any]:
        """Greedy, or sampled with an answer's own seed, whose stream is the server's and not `SeededSampling`'s."""
        if not self.settings.temperature:
            return {"max_tokens": self.settings.max_new_tokens, "temperature": 0}
        return {
            "max_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": seed & SEED_BITS,
        }


async def picture_of(row: dict[str, Any]) -> str | None:
    """The image of a row as `exact_data_url`, decoded beside the event loop; None for a prompt without one.

    Raises data.images.ImageError or OSError when it cannot be read.
    """
    if row["image"] is None:
        return None
    return await asyncio.to_thread(lambda: exact_data_url(image_store.read_bytes(row["image"])))


async def settle(
    client: ChatClient, name: str, question: str, url: str | None, right: int
) -> tuple[dict[str, Any], int | None]:
    """(request fields, the number of tokens that the server's prompt has with them), which is `right` if possible.

    The fields are {} where none are needed or none help; the number is None where the server does not tell it.

    vLLM tokenizes a rendered chat without special tokens, and the checkpoint's template has no BOS in it; a server with
    another template has it twice if they are asked for. So the count decides.

    Raises UserError when the server does not take the image, EndpointUnusable when it cannot be used at all.
    """

    async def count(url: str | None, **extra) -> int | None:
        payload = {"model": name, "messages": messages(question, url), "max_tokens": 1, "temperature": 0, **extra}
        return (await client.ask(payload))["usage"].get("prompt_tokens")

    async def plain_text() -> int | None:
        with contextlib.suppress(RequestFailed):
            return await count(None)
        return None

    try:
        there = await count(url)
    except RequestFailed as error:
        if url is not None and await plain_text() is not None:
            raise without_vision(name, client.base_url, error) from None
        raise EndpointUnusable(str(error)) from None
    if not there or there == right:
        return {}, there
    with contextlib.suppress(RequestFailed):  # a server that refuses fields it does not know
        if await count(url, add_special_tokens=True) == right:
            return {"add_special_tokens": True}, right
    if url is not None and there == await plain_text():
        raise UserError(
            f"{name} on {client.base_url} does not see the image: its prompt has {there} tokens with the image and "
            f"without it, where the recipe's has {right}. Serve the model with its vision part."
        )
    return {}, there
