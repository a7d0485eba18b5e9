"""The demo's two models on an OpenAI-compatible server: nothing is computed here, so many can be asked at a time."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from ..data.conversation import expand_image_token
from ..evaluation.served import names_on, settle
from ..evaluation.session import Session, open_session
from ..recipe import with_model
from ..serving.chat import SCORING, answer_logps, messages, one_line, prompt_ids
from ..serving.client import ChatClient, EndpointUnusable, RequestFailed, Server, exact_data_url
from .models import Comparison, ScoredAnswer, encode, encode_answers, readable

Result = TypeVar("Result")

NO_LOGPS = (
    "This server does not give the log-probs of a prompt (prompt_logprobs), which the comparison is made of; vLLM "
    "does. The answers on the other tab need none."
)
FIRST_QUESTION = "What is in the picture?"


class Loop:
    """An event loop in a thread of its own, for callers in any thread."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """What the coroutine returns; waits for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def iterate(self, texts: AsyncGenerator[str, None]) -> Iterator[str]:
        """The texts of an asynchronous generator, which is closed when this iterator is."""

        async def following() -> str | None:
            return await anext(texts, None)

        async def close() -> None:
            await texts.aclose()

        try:
            while (text := self.run(following())) is not None:
                yield text
        finally:
            self.run(close())


@dataclass(frozen=True)
class ServedCandidate:
    """A `models.Candidate` that a server answers for. label: its name there; extra: see `served.settle`."""

    label: str
    session: Session
    client: ChatClient
    loop: Loop
    extra: dict[str, Any]
    at_once: int

    def stream_answer(self, image: bytes, question: str, max_new_tokens: int) -> Iterator[str]:
        """As `models.stream_answer`. Raises ValueError when the server gives no answer, or not the whole."""
        chat = messages(question, exact_data_url(image))
        payload = {"model": self.label, "messages": chat, "max_tokens": max_new_tokens, "temperature": 0, **self.extra}
        text = ""
        try:
            for piece in self.loop.iterate(self.client.stream(payload)):
                text += piece
                yield text.strip()
            yield text.strip()
        except (RequestFailed, EndpointUnusable) as error:
            raise ValueError(f"The server gave no whole answer: {one_line(error)}") from None

    def compare(self, image: bytes, question: str, a: str, b: str) -> Comparison:
        """As `models.compare`, from the server's `prompt_logprobs`.

        Raises ValueError for what `models.compare` refuses, for a server that gives no such log-probs, and for one that
        reads question and answer as other tokens than training does.
        """
        row = encode_answers(self.session, image, question, a, b)
        prompt = expand_image_token(row["prompt_ids"], self.session.image_token_id, row["num_image_tokens"])
        url = exact_data_url(image)
        sides = ((a, row["chosen_ids"]), (b, row["rejected_ids"]))
        scored = [self._scored(messages(question, url, text), prompt, ids) for text, ids in sides]
        return Comparison(*scored, scored[0].mean - scored[1].mean)

    def _scored(self, chat: list[dict[str, Any]], prompt: list[int], answer: list[int]) -> ScoredAnswer:
        payload = {"model": self.label, "messages": chat, **SCORING, **self.extra}
        try:
            body = self.loop.run(self.client.chat(payload))
        except (RequestFailed, EndpointUnusable) as error:
            raise ValueError(f"{NO_LOGPS} It says: {one_line(error)}") from None
        entries, ids = body.get("prompt_logprobs"), prompt_ids(body)
        if not entries:
            raise ValueError(NO_LOGPS)
        if len(entries) != len(prompt) + len(answer) or (ids or [*prompt, *answer]) != [*prompt, *answer]:
            raise ValueError(
                f"The server reads {len(entries)} tokens where training reads {len(prompt) + len(answer)}, or others: "
                "its scores would be of another text. evals/serve_parity.py says why."
            )
        logps = answer_logps(body, answer)
        return ScoredAnswer(tuple(readable(self.session.tokenizer, answer, logps)), sum(logps), len(answer))


def load_served(
    recipe: dict[str, Any], server: Server, base: str, aligned: str, output_dir: str
) -> tuple[tuple[ServedCandidate, ServedCandidate], list[str]]:
    """((base, aligned), warnings) for two served names; tokenizer and processor are the recipe's, no weights are read.

    Raises UserError when the server does not answer, lacks a name, or takes no images.
    """
    names = names_on(server, [base, aligned])
    session = open_session(with_model(recipe, "base"), output_dir, need_rows=False, need_model=False)
    loop, client = Loop(), server.client()
    out = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 140, 60)).save(out, "PNG")
    ids, _ = encode(session, out.getvalue(), FIRST_QUESTION)
    found, warnings = [], []
    for name in names:
        try:
            asked = settle(client, name, FIRST_QUESTION, exact_data_url(out.getvalue()), len(ids))
            extra, tokens = loop.run(asked)
        except EndpointUnusable as error:
            raise server.unusable(error) from None
        if tokens and tokens != len(ids):
            warnings.append(
                f"{name}: a prompt of {len(ids)} tokens in training has {tokens} on the server; the answers are to "
                "another prompt. evals/serve_parity.py says why."
            )
        found.append(ServedCandidate(name, session, client, loop, extra, server.concurrency))
    return tuple(found), warnings
