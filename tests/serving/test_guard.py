"""The guard of the API in this process: what the tests against a running server would have to wait long for."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.exceptions import HTTPException

from helpers.local_server import JsonHandler, LocalServer
from helpers.serving import picture, png
from llava_orpo.errors import UserError
from llava_orpo.serving.guard import Guard, Limits

CHAT = "/v1/chat/completions"


class Client:
    """One request to an ASGI application. reads: whether it takes what is sent; else the application waits for ever."""

    def __init__(self, body: dict, headers: dict[str, str] | None = None, reads: bool = True):
        self.data, self.reads, self.sent = json.dumps(body).encode(), reads, []
        self.headers = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]

    async def to(self, app) -> tuple[int, dict, dict]:
        """(status, headers, JSON) of the response."""
        given = iter([{"type": "http.request", "body": self.data, "more_body": False}])

        async def receive():
            return next(given, {"type": "http.disconnect"})

        async def send(message):
            if not self.reads:
                await asyncio.Event().wait()
            self.sent.append(message)

        await app({"type": "http", "method": "POST", "path": CHAT, "headers": self.headers}, receive, send)
        if not self.sent:
            return 0, {}, {}
        body = b"".join(message.get("body", b"") for message in self.sent[1:])
        headers = {key.decode(): value.decode() for key, value in self.sent[0]["headers"]}
        return self.sent[0]["status"], headers, json.loads(body)


def question(url: str | None = None) -> dict:
    image = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": [*image, {"type": "text", "text": "?"}]}]}


async def answers(scope, receive, send):
    """An application that repeats the body it was given."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def guard(app=answers, key: str = "", check_address=lambda url: None, **limits) -> Guard:
    return Guard(app, Limits(**limits), key, lambda path: None, check_address)


def test_only_who_has_the_key_is_served():
    def status(**headers):
        return asyncio.run(Client(question(), headers).to(guard(key="right")))[0]

    assert status(authorization="Bearer right") == 200
    assert status() == status(authorization="Bearer wrong") == status(authorization="right") == 401


def test_too_many_waiting_requests_are_sent_away_and_asked_to_come_again():
    async def run():
        go = asyncio.Event()

        async def slow(scope, receive, send):
            await go.wait()
            await answers(scope, receive, send)

        guarded = guard(slow, waiting=2)
        held = [asyncio.create_task(Client(question()).to(guarded)) for _ in range(2)]
        await asyncio.sleep(0.05)
        status, headers, body = await Client(question()).to(guarded)
        assert (status, headers["retry-after"], body["error"]["type"]) == (503, "5", "server_error")
        go.set()
        assert [status for status, *_ in await asyncio.gather(*held)] == [200, 200]
        assert (await Client(question()).to(guarded))[0] == 200, "a place is free again"

    asyncio.run(run())


def test_a_client_that_does_not_read_its_answer_gives_its_place_back():
    async def run():
        guarded = guard(seconds=0.1, waiting=1)
        async with asyncio.timeout(5):
            assert await Client(question(), reads=False).to(guarded) == (0, {}, {})
        assert (await Client(question()).to(guarded))[0] == 200

    asyncio.run(run())


def test_every_step_of_a_redirection_is_checked():
    class Moved(JsonHandler):
        def do_GET(self):
            if self.path == "/picture":
                self.send_bytes(200, png(picture(40, 30)))
            else:
                self.send_bytes(302, b"", {"Location": "/picture" if self.path == "/once" else self.path})

    asked = []

    def public(url):
        asked.append(url.rsplit("/", 1)[-1])

    def private(url):
        if url.endswith("/picture"):
            raise HTTPException(403, "not for you")

    with LocalServer(Moved) as server:
        root = server.base_url.removesuffix("/v1")

        def fetched(path, check):
            return asyncio.run(Client(question(f"{root}/{path}")).to(guard(check_address=check)))

        status, _, body = fetched("once", public)
        assert status == 200 and asked == ["once", "picture"]
        assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        status, _, body = fetched("once", private)
        assert status == 403 and body["error"]["message"] == "not for you"
        status, _, body = fetched("forever", public)
        assert status == 400 and "redirects more than 3 times" in body["error"]["message"]


@pytest.mark.parametrize("text", ["no", "0", "-1", "nan", "inf"])
@pytest.mark.parametrize("variable", Limits.VARIABLES.values())
def test_a_limit_that_is_no_number_is_refused(variable, text):
    with pytest.raises(UserError, match=f"^{variable}={text}: must be a number above 0"):
        Limits.from_environment({variable: text})


def test_limits_come_from_the_environment_and_the_others_stay():
    assert Limits.from_environment({"API_MAX_BODY_MB": "1.5", "API_MAX_WAITING": "3", "API_MAX_IMAGE_MB": ""}) == (
        Limits(body_mb=1.5, waiting=3)
    )
