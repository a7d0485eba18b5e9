"""What an OpenAI-compatible server says to held-out rows: answers, prompt counts and ids, log-probs where it has them.

Answers come from plain chat requests, as any client sends them. Two extensions are used where a server knows them:
vLLM's `return_token_ids` and `prompt_logprobs`, and SGLang's `/generate` with `return_logprob` (by its documentation,
not run).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError
from .asking import ask_each
from .chat import IDS, SCORING, answer_logps, messages, one_line, prompt_ids, without_vision
from .client import EndpointUnusable, RequestFailed, Server, data_url
from .reference import Row

SIDES = ("chosen", "rejected")
ANSWER = "answer"


@dataclass(frozen=True)
class Abilities:
    """What a server told at the first requests. ids: it returns prompt ids; logps: "vllm", "sglang" or ""."""

    model: str
    kind: str
    ids: bool
    logps: str
    text_tokens: int | None
    text_ids: list[int] | None


class Asked:
    """A server under the name `model`, for one event loop. `native` asks below its root, not below /v1."""

    def __init__(self, server: Server, model: str | None, max_new_tokens: int):
        root = server.base_url.rstrip("/").removesuffix("/v1")
        self.client, self.native = server.client(), replace(server, base_url=root).client()
        self.model, self.max_new_tokens, self.concurrency = model, max_new_tokens, server.concurrency
        self.abilities: Abilities | None = None

    async def greet(self, row: Row) -> Abilities:
        """Finds the model's name and what the server can do, with `row`.

        Raises UserError for a wrong name, for several names without `model`, and for a server that takes no images;
        EndpointUnusable and RequestFailed as `ChatClient.ask`.
        """
        names, kind = await self._names()
        if self.model is None and len(names) == 1:
            self.model = names[0]
        listed = ", ".join(names) or "no list of models"
        if self.model is None:
            raise UserError(f"{self.client.base_url} serves {listed}: name one with model=.")
        if names and self.model not in names and kind != "llamafactory":
            raise UserError(f"{self.client.base_url} serves {listed}, not {self.model}: correct model=.")
        body, ids = await self._chat_with_ids(row.question, None, 1)
        tokens = (body.get("usage") or {}).get("prompt_tokens")
        if row.image is not None:
            try:
                await self.client.chat(self._payload(row.question, row.image, max_tokens=1))
            except RequestFailed as error:
                raise without_vision(self.model, self.client.base_url, error) from None
        self.abilities = Abilities(self.model, kind, ids, "", tokens, prompt_ids(body))
        logps = await self._logps_kind(row)
        self.abilities = Abilities(self.model, kind, ids, logps, tokens, prompt_ids(body))
        return self.abilities

    async def _names(self) -> tuple[list[str], str]:
        try:
            found = await self.client.request("GET", "/models", None, _models)
        except EndpointUnusable as error:
            if "status 404" in str(error):  # a server without a list
                return [], ""
            raise
        kind = found["owner"]
        return found["names"], "llamafactory" if kind == "owner" else kind  # LLaMA-Factory's ModelCard says `owner`

    async def _chat_with_ids(self, question: str, image: bytes | None, tokens: int) -> tuple[dict[str, Any], bool]:
        """(body, whether the server takes `return_token_ids` and returns ids)."""
        with suppress(RequestFailed):  # a server that refuses fields it does not know
            body = await self.client.chat(self._payload(question, image, max_tokens=tokens, **IDS))
            return body, prompt_ids(body) is not None
        return await self.client.chat(self._payload(question, image, max_tokens=tokens)), False

    async def _logps_kind(self, row: Row) -> str:
        for kind in ("vllm", "sglang"):
            if kind == "sglang" and self.abilities.kind != "sglang":
                continue
            with suppress(RequestFailed, EndpointUnusable):
                if await self._scored(kind, row, "chosen"):
                    return kind
        return ""

    def _payload(self, question: str, image: bytes | None, answer: str | None = None, **more) -> dict[str, Any]:
        chat = messages(question, None if image is None else data_url(image), answer)
        return {"model": self.model, "messages": chat, "temperature": 0, **more}

    async def ask(self, task: tuple[str, Row]) -> dict[str, Any]:
        """The record of one task: the answer to a row, or the log-probs of one side of it. Raises as `ChatClient`."""
        what, row = task
        if what != ANSWER:
            ids, logps = await self._scored(self.abilities.logps, row, what) or (None, None)
            return {"what": what, "position": row.position, "ids": ids, "logps": logps}
        started = time.monotonic()
        more = IDS if self.abilities.ids else {}
        body = await self.client.chat(self._payload(row.question, row.image, max_tokens=self.max_new_tokens, **more))
        usage, choice = body.get("usage") or {}, body["choices"][0]
        return {
            "what": ANSWER,
            "position": row.position,
            "answer": (choice["message"]["content"] or "").strip(),
            "finish": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "prompt_ids": prompt_ids(body),
            "tokens": usage.get("completion_tokens"),
            "seconds": time.monotonic() - started,
        }

    async def _scored(self, kind: str, row: Row, side: str) -> tuple[list[int] | None, list[float]] | None:
        """(ids of prompt and answer, log-probs of the answer's tokens); None if the server does not give them."""
        count = len(row.answer_ids[side])
        if kind == "vllm":
            body = await self.client.chat(self._payload(row.question, row.image, row.answer_texts[side], **SCORING))
            ids, entries = prompt_ids(body), body.get("prompt_logprobs")
            if not ids or not entries or len(entries) != len(ids):
                return None
            return ids, answer_logps(body, ids[-count:])
        payload = {
            "input_ids": [*row.plain_ids, *row.answer_ids[side]],
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        if row.image is not None:
            payload["image_data"] = [data_url(row.image)]
        scored = (await self.native.request("POST", "/generate", payload, _sglang))["entries"]
        return None, [entry[0] for entry in scored[-count:]]

    async def run(self, tasks: list[tuple[str, Row]], add: Callable[[dict], None]) -> dict[str, str]:
        """Asks all tasks; `add` takes each record as it comes. Returns {"what position": why it failed}.

        Raises EndpointUnusable when the server no longer answers.
        """
        failed = {}
        async with aclosing(ask_each(tasks, self.ask, self.concurrency)) as answered:
            async for (what, row), found in answered:
                if isinstance(found, RequestFailed):
                    failed[f"{what} {row.position}"] = one_line(found)
                else:
                    add(found)
        return failed

    async def close(self) -> None:
        """Closes the connections."""
        await asyncio.gather(self.client.close(), self.native.close())


def _models(response) -> dict[str, Any] | None:
    try:
        entries = response.json()["data"]
        owner = entries[0].get("owned_by") if entries else ""
        return {"names": [str(entry["id"]) for entry in entries], "owner": str(owner or "")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _sglang(response) -> dict[str, Any] | None:
    """[[log-prob, token id, text], …] of the whole input, as SGLang documents `/generate`."""
    try:
        return {"entries": response.json()["meta_info"]["input_token_logprobs"]}
    except (ValueError, KeyError, TypeError):
        return None
