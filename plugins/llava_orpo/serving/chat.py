"""What a chat request to an OpenAI-compatible server holds, and what is read of its reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError

IDS = {"return_token_ids": True}  # vLLM's: the reply holds the prompt's ids
# vLLM's: the log-probs of a whole chat, the assistant's answer in it, and nothing new
SCORING = {"add_generation_prompt": False, "prompt_logprobs": 0, "max_tokens": 1, "temperature": 0, **IDS}


def messages(question: str, url: str | None = None, answer: str | None = None) -> list[dict[str, Any]]:
    """A chat of one turn: the image, where `url` is one, then the question, and the answer where it is given."""
    content: str | list = question
    if url is not None:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return chat if answer is None else [*chat, {"role": "assistant", "content": answer}]


def prompt_ids(body: dict[str, Any]) -> list[int] | None:
    """The prompt's ids in a chat completion's body, where the server returns them."""
    found = body.get("prompt_token_ids") or body["choices"][0].get("prompt_token_ids")
    return list(found) if found else None


def answer_logps(body: dict[str, Any], answer: Sequence[int]) -> list[float]:
    """Log-probs (nats) of the tokens `answer`, the last of the prompt of a `SCORING` request. Raises KeyError."""
    entries = body["prompt_logprobs"][-len(answer) :]
    return [entry[str(token)]["logprob"] for token, entry in zip(answer, entries, strict=True)]


def one_line(error: Exception) -> str:
    """What a server said, as a sentence."""
    return " ".join(str(error).split()).rstrip(".") + "."


def without_vision(name: str, base_url: str, error: Exception) -> UserError:
    """What the user is told when a server answers texts alone."""
    return UserError(
        f"{name} on {base_url} answers text but refuses an image: it needs a model with its vision part. The server "
        f"says: {one_line(error)}"
    )
