"""An ASGI middleware between the network and an OpenAI-compatible chat API: limits, clean refusals, no slow client.

It knows OpenAI's chat requests and what a LLaVA-1.6 conversation may hold; of the application behind it, nothing. What
reaches that application is whole, within the limits, and has images that were decoded once without an error.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import httpx

from ..data import images
from ..errors import UserError

CHAT = "/v1/chat/completions"
MEGABYTE = 2**20
REDIRECTS = 3
FETCH_SECONDS = 10.0  # for the answer of another machine that holds an image
RETRY_SECONDS = 5  # what a client is asked to wait while too many requests wait
KINDS = ("png", "jpg", "jpeg", "gif", "bmp")  # which LLaMA-Factory takes in a data: address; Pillow reads the content
# (field, smallest, largest): outside of these transformers raises in the middle of an answer
RANGES = (("max_tokens", 1, None), ("temperature", 0, None), ("top_p", 0, 1), ("n", 1, None))


class Refused(Exception):
    """A request that is not served. The message is for the client."""

    def __init__(self, status: int, message: str, drain: bool = False):
        super().__init__(message)
        self.status, self.drain = status, drain


class SlowClient(Exception):
    """A client took longer than it may to accept a piece of an answer."""


@dataclass(frozen=True)
class Limits:
    """What a client may ask for. seconds: for the head of a request, for its body, and to accept a piece of an answer.

    waiting: whole requests that are computed or wait for it. Each number comes from its environment variable.
    """

    body_mb: float = 20
    image_mb: float = 10
    megapixels: float = 50
    seconds: float = 60
    waiting: int = 64

    VARIABLES = {
        "body_mb": "API_MAX_BODY_MB",
        "image_mb": "API_MAX_IMAGE_MB",
        "megapixels": "API_MAX_IMAGE_MEGAPIXELS",
        "seconds": "API_CLIENT_TIMEOUT",
        "waiting": "API_MAX_WAITING",
    }

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Limits:
        """The limits that the variables set. Raises UserError naming a variable that is not a number above 0."""
        given = {}
        for key, variable in cls.VARIABLES.items():
            if text := environment.get(variable, ""):
                try:
                    given[key] = int(text) if key == "waiting" else float(text)
                except ValueError:
                    given[key] = 0
                if not 0 < given[key] < float("inf"):
                    raise UserError(f"{variable}={text}: must be a number above 0.")
        return cls(**given)


class Guard:
    """The middleware.

    Args:
        app: the application behind it.
        limits: see `Limits`.
        key: what requests must carry as `Authorization: Bearer`; "" lets everybody in.
        check_file, check_address: raise a Starlette HTTPException for a file of this machine, or an http(s) address,
            that a request may not name as its image.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        limits: Limits,
        key: str,
        check_file: Callable[[str], None],
        check_address: Callable[[str], None],
    ):
        self.app, self.limits, self.key = app, limits, key
        self.check_file, self.check_address = check_file, check_address
        self.waiting = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_in_time(message) -> None:
            try:
                async with asyncio.timeout(self.limits.seconds):
                    await send(message)
            except TimeoutError:
                raise SlowClient from None

        try:
            await self._serve(scope, receive, send_in_time)
        except* SlowClient:
            pass  # the server closes the connection of an answer that is not complete

    async def _serve(self, scope, receive, send) -> None:
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        counted = False
        try:
            headers = dict(scope["headers"])
            self._check_key(headers.get(b"authorization", b""))
            body = await self._read(headers, receive)
            if self.waiting >= self.limits.waiting:
                raise Refused(503, f"{self.waiting} requests are waiting already; try again later.")
            self.waiting += 1
            counted = True
            if scope["path"] == scope.get("root_path", "") + CHAT:
                body = await self._checked(body)
            await self.app(scope, _replay(body, receive), send)
        except Refused as refusal:
            await self._refuse(refusal, headers, receive, send)
        finally:
            self.waiting -= counted

    def _check_key(self, authorization: bytes) -> None:
        """Before anything of the request is read: strangers get no memory and no image decoded."""
        kind, _, given = authorization.partition(b" ")
        if self.key and not (kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.key.encode())):
            raise Refused(401, "Invalid API key: send it as `Authorization: Bearer KEY`.", drain=True)

    async def _read(self, headers: Mapping[bytes, bytes], receive) -> bytes:
        """The whole body. Raises Refused when it is too large, which the head may say, or does not come in time."""
        most = int(self.limits.body_mb * MEGABYTE)
        too_large = f"The request is larger than {self.limits.body_mb:g} MB."
        if int(headers.get(b"content-length", b"0")) > most:
            raise Refused(413, too_large, drain=True)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "The request ended before it was whole.")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise Refused(413, too_large, drain=more)
                    if not more:
                        return bytes(body)
        except TimeoutError:
            raise Refused(408, f"The request was not whole after {self.limits.seconds:g} s.") from None

    async def _refuse(self, refusal: Refused, headers: Mapping[bytes, bytes], receive, send) -> None:
        content = error_body(refusal.status, str(refusal))
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if refusal.status == 503:
            head.append((b"retry-after", str(RETRY_SECONDS).encode()))
        unread = refusal.drain or refusal.status == 408
        if unread:
            head.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": refusal.status, "headers": head})
        await send({"type": "http.response.body", "body": content, "more_body": unread})
        if not unread:
            return
        if refusal.drain and b"expect" not in headers:
            # A client that is still sending would lose the answer with the connection. What it sends is thrown away.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.limits.seconds):
                    while (message := await receive()).get("more_body", False):
                        del message
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _checked(self, body: bytes) -> bytes:
        """The body for the application, with every image as a data: address it knows. Raises Refused."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "The request is not JSON.") from None
        if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
            return body  # the application says which field is missing
        parts = check_request(request)
        for part in parts:
            part["url"] = await self._image(part["url"])
        return json.dumps(request).encode() if parts else body

    async def _image(self, url: str) -> str:
        """The image's address as the application takes it, after the image was decoded once. Raises Refused."""
        if url.startswith("data:"):
            head, comma, encoded = url.partition(",")
            if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
                raise Refused(400, "An image in a data: address is written data:image/png;base64,…")
            try:
                data = base64.b64decode(encoded, validate=True)
            except (binascii.Error, ValueError):
                raise Refused(400, "The image's data: address is not base64.") from None
            known = head.removeprefix("data:image/").removesuffix(";base64") in KINDS
            handed_on = url if known else f"data:image/png;base64,{encoded}"
        elif url.startswith(("http://", "https://")):
            data = await self._fetched(url)
            handed_on = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        else:
            data = await asyncio.to_thread(self._file, url)
            handed_on = url
        await asyncio.to_thread(self._check_image, data)
        return handed_on

    def _check_image(self, data: bytes) -> None:
        if len(data) > self.limits.image_mb * MEGABYTE:
            raise Refused(413, f"The image is larger than {self.limits.image_mb:g} MB.")
        try:
            width, height = images.header_size(data)
            if width * height > self.limits.megapixels * 1e6:
                raise Refused(
                    413, f"The image has {width}x{height} pixels; the limit is {self.limits.megapixels:g} megapixels."
                )
            images.verify(data)
        except images.ImageError as error:
            raise Refused(400, f"The image cannot be read: {error}") from None

    def _file(self, path: str) -> bytes:
        with _as_refusal():
            if not os.path.isfile(path):
                raise Refused(400, "An image is given as a data: or an http(s) address.")
            self.check_file(path)
            with open(path, "rb") as file:
                return file.read(int(self.limits.image_mb * MEGABYTE) + 1)

    async def _fetched(self, url: str) -> bytes:
        """The file behind an address, every step of a redirection checked. Raises Refused."""
        most = int(self.limits.image_mb * MEGABYTE)
        try:
            async with asyncio.timeout(FETCH_SECONDS), httpx.AsyncClient(timeout=FETCH_SECONDS) as client:
                for _ in range(REDIRECTS + 1):
                    with _as_refusal():
                        await asyncio.to_thread(self.check_address, url)
                    async with client.stream("GET", url) as response:
                        if response.is_redirect:
                            url = urljoin(url, response.headers["location"])
                            continue
                        if response.status_code != 200:
                            raise Refused(400, f"The image's address answers with status {response.status_code}.")
                        data = bytearray()
                        async for piece in response.aiter_bytes():
                            data += piece
                            if len(data) > most:
                                raise Refused(413, f"The image is larger than {self.limits.image_mb:g} MB.")
                        return bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            raise Refused(400, "The image's address does not answer.") from None
        raise Refused(400, f"The image's address redirects more than {REDIRECTS} times.")


def check_request(request: dict[str, Any]) -> list[dict[str, Any]]:
    """The `image_url` parts of a chat request, at most one, after a look at what LLaVA-1.6 can be asked.

    A field of another type than OpenAI's is left to the application. Raises Refused for what the model cannot answer.
    """
    if request.get("tools"):
        raise Refused(400, "This model has no tool calls.")
    for name, least, most in RANGES:
        value = request.get(name)
        if isinstance(value, (int, float)) and not (value >= least and (most is None or value <= most)):
            raise Refused(400, f"{name}={value}: must be at least {least}" + (f" and at most {most}." if most else "."))
    if request.get("stream") and request.get("n") not in (None, 1):
        raise Refused(400, "A stream has one answer: n must be 1.")
    messages = [message if isinstance(message, dict) else {} for message in request["messages"]]
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    expected = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or [turn.get("role") for turn in turns] != expected[: len(turns)]:
        raise Refused(400, "Messages must alternate (user, assistant, user, …) and end with the user's.")
    found = []
    for message in messages:
        content = message.get("content")
        if message.get("tool_calls"):
            raise Refused(400, "This model has no tool calls.")
        if content is None:
            raise Refused(400, "A message has no content.")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                continue
            address = part.get("image_url") if kind == "image_url" else None
            if not isinstance(address, dict) or not isinstance(address.get("url"), str):
                raise Refused(
                    400, "The parts of a message are text, and image_url with a url; this model takes no other."
                )
            if message is not turns[0]:
                raise Refused(400, "The image must be in the first message of the user.")
            found.append(address)
    if len(found) > 1:
        raise Refused(400, f"LLaVA-1.6 takes one image per conversation; the request has {len(found)}.")
    return found


def error_body(status: int, message: str) -> bytes:
    """An error in OpenAI's form."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}}).encode()


@contextlib.contextmanager
def _as_refusal():
    """Turns the HTTPException of a check into Refused."""
    from starlette.exceptions import HTTPException

    try:
        yield
    except HTTPException as error:
        raise Refused(error.status_code, str(error.detail)) from None


def _replay(body: bytes, receive):
    """A `receive` that gives the whole body first."""
    given = False

    async def replayed():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
