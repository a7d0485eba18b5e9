"""Requests to an OpenAI-compatible server: time-outs, retries with back-off, a key that is never shown."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from PIL import ExifTags, Image

from ..data import images
from ..errors import UserError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
HOPELESS = (401, 403, 404)  # the same for every request: wrong key, address or model name
LONGEST_PAUSE = 60.0  # seconds between two tries without a Retry-After header
LONGEST_WAIT = 600.0  # if a server asks for more, the request fails
LOCAL = ("localhost", "127.0.0.1", "::1")
SENT_AS_THEY_ARE = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # of which every reader makes the same RGB


class RequestFailed(Exception):
    """This request got no answer; others may. The message says why."""


class EndpointUnusable(Exception):
    """No request can succeed: wrong key, address or model name."""


class ChatClient:
    """Sends requests to addresses below `base_url`; usable from many tasks of one event loop.

    Args:
        base_url: with the version, e.g. http://127.0.0.1:8000/v1. Raises UserError when it carries a password.
        api_key_env: name of the environment variable that holds the key. The key goes into the Authorization header
            and nowhere else: texts from the server are cleared of it. Raises UserError when it is not set and the
            endpoint is not on this machine.
        timeout: seconds for a whole answer, of which connecting may take at most 10.
        retries: tries after the first. The pause between them doubles from `first_wait` seconds to at most 60; a
            random part of it, at least half, is waited. What a Retry-After header asks for is added.
    """

    def __init__(self, base_url: str, api_key_env: str, timeout: float, retries: int, first_wait: float = 1.0):
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"base_url={base_url}: must be an http(s) address, e.g. http://127.0.0.1:8000/v1.")
        if parts.username or parts.password:
            raise UserError(
                "base_url holds a user or password. Put the key into an environment variable (api_key_env)."
            )
        self._key = os.environ.get(api_key_env, "")
        if not self._key and parts.hostname not in LOCAL:
            raise UserError(
                f"The environment variable {api_key_env} is empty; it must hold the key of {parts.hostname}."
            )
        self.base_url = base_url.rstrip("/")
        self.retries, self.first_wait = retries, first_wait
        self.timeout = timeout
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout)),
            limits=httpx.Limits(max_connections=None),
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},  # never through a proxy
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def ask(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{"text": the answer, "usage": the server's token counts or {}, "tries": int} of a chat request.

        Raises:
            EndpointUnusable: status 401, 403 or 404.
            RequestFailed: another refusal, or still no answer after all retries.
        """
        return await self.request("POST", "/chat/completions", payload, _answer)

    async def chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The whole body of a chat completion, as the server wrote it. Raises as `ask`."""
        return await self.request("POST", "/chat/completions", payload, _chat_body)

    async def models(self) -> list[str]:
        """The names that the server serves, in its order. Raises as `ask`."""
        return (await self.request("GET", "/models", None, _models))["models"]

    async def request(
        self,
        method: str,
        path: str,
        payload: dict[str, Any] | None,
        read: Callable[[httpx.Response], dict[str, Any] | None],
    ) -> dict[str, Any]:
        """What `read` makes of the response to one request, and "tries". path: behind base_url.

        read: gives None for a body that is no answer; then the request is tried again. Raises as `ask`.
        """
        problem = ""
        for tried in range(self.retries + 1):
            pause = min(self.first_wait * 2**tried, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            try:
                async with asyncio.timeout(self.timeout):  # httpx's own bounds each read, not the whole answer
                    response = await self._client.request(method, self.base_url + path, json=payload)
            except (httpx.TransportError, TimeoutError) as error:  # also refused and broken connections
                problem = f"{type(error).__name__}: {error}"
            else:
                problem = f"status {response.status_code}: {response.text[:300]}"
                if response.status_code in HOPELESS:
                    raise EndpointUnusable(self._clean(problem))
                if response.status_code == 200:
                    found = read(response)
                    if found is not None:
                        return {**found, "tries": tried + 1}
                elif response.status_code not in RETRIED:
                    raise RequestFailed(self._clean(problem))
                asked = retry_after(response.headers.get("retry-after"))
                if asked > LONGEST_WAIT:
                    raise RequestFailed(self._clean(f"the server asks to wait {asked:.0f} s; {problem}"))
                pause += asked  # jitter on top, so that waiting requests do not come back together
            if tried < self.retries:
                await asyncio.sleep(pause)
        raise RequestFailed(self._clean(f"no answer after {self.retries + 1} tries; the last: {problem}"))

    async def stream(self, payload: dict[str, Any]) -> AsyncGenerator[str, None]:
        """The pieces of a chat answer as the server writes them. Nothing is tried again; closing it ends the request.

        Raises EndpointUnusable and RequestFailed as `ask`, and RequestFailed when the server stops midway.
        """
        address, whole = self.base_url + "/chat/completions", False
        try:
            async with self._client.stream("POST", address, json={**payload, "stream": True}) as response:
                if response.status_code != 200:
                    await response.aread()
                    problem = self._clean(f"status {response.status_code}: {response.text[:300]}")
                    raise EndpointUnusable(problem) if response.status_code in HOPELESS else RequestFailed(problem)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or data == "[DONE]":
                        continue
                    choice = _chunk(data)
                    whole = whole or bool(choice.get("finish_reason"))
                    if piece := (choice.get("delta") or {}).get("content"):
                        yield piece
        except httpx.TransportError as error:
            raise RequestFailed(self._clean(f"{type(error).__name__}: {error}")) from None
        if not whole:
            raise RequestFailed("the stream ended before the answer was whole")

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


@dataclass(frozen=True)
class Server:
    """Where answers come from, for commands. The key is in the environment variable `api_key_env` (see `ChatClient`).

    timeout: seconds for one answer; request: more fields of every request, None drops one.
    """

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 600.0
    retries: int = 6
    request: dict[str, Any] = field(default_factory=dict)

    def client(self, retries: int | None = None) -> ChatClient:
        """A new client, for one event loop."""
        return ChatClient(self.base_url, self.api_key_env, self.timeout, self.retries if retries is None else retries)

    def unusable(self, error: Exception, kept: str = "") -> UserError:
        """What the user is told when the server cannot be asked. kept: a sentence about what it has answered before."""
        text, advice = " ".join(str(error).split()).rstrip("."), "check base_url and that the server runs"
        if "status 401" in text or "status 403" in text:
            advice = f"put the right key into {self.api_key_env}"
        elif "status 404" in text:
            advice = "check base_url (it ends in /v1) and the model's name"
        return UserError(f"{self.base_url} does not answer: {text}; {advice}.{kept and ' '}{kept}")


def _answer(response: httpx.Response) -> dict[str, Any] | None:
    """Text and token counts of a chat completion; None for any other body."""
    body = _chat_body(response)
    return body and {"text": body["choices"][0]["message"]["content"] or "", "usage": body.get("usage") or {}}


def _chat_body(response: httpx.Response) -> dict[str, Any] | None:
    try:
        body = response.json()
        body["choices"][0]["message"]["content"]
        return body
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _models(response: httpx.Response) -> dict[str, Any] | None:
    try:
        return {"models": [str(one["id"]) for one in response.json()["data"]]}
    except (ValueError, KeyError, TypeError):
        return None


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or an HTTP date; 0 when it is absent or neither."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def data_url(data: bytes) -> str:
    """An image file as a data: address: its own bytes where servers know the format, else the picture as PNG."""
    with Image.open(io.BytesIO(data)) as opened:
        kind = SENT_AS_THEY_ARE.get(opened.format)
        if kind is None:
            out = io.BytesIO()
            opened.convert("RGB").save(out, "PNG")
            kind, data = "png", out.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def exact_data_url(data: bytes) -> str:
    """An image as a data: address from which every server makes the picture that training saw.

    The file's own bytes, except where servers read a file in another way than LLaVA does (see `data.images`): vLLM
    turns it as EXIF says and lays transparent pixels on white (multimodal/media/image.py), and 16-bit grey is clipped.
    Then the decoded picture is sent as PNG.

    Raises data.images.ImageError when the image cannot be decoded.
    """
    picture = images.decode_rgb(data)
    with Image.open(io.BytesIO(data)) as opened:
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
        plain = opened.mode in PLAIN_MODES and "transparency" not in opened.info
    if plain and not turned:
        return data_url(data)
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _chunk(data: str) -> dict[str, Any]:
    """The choice in one event of a stream; {} for one without, such as the token counts at the end."""
    try:
        body = json.loads(data)
        return body["choices"][0] if body["choices"] else {}
    except (ValueError, KeyError, TypeError):
        raise RequestFailed(f"the stream holds {data[:200]!r}") from None
