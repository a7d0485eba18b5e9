"""An OpenAI-compatible chat endpoint on 127.0.0.1 that answers, or misbehaves, as a test asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from helpers.local_server import JsonHandler, LocalServer


class Reply:
    """status, body text, extra headers; `delay` seconds before anything is sent."""

    def __init__(self, text: str = "", status: int = 200, headers: dict | None = None, delay: float = 0.0, raw=None):
        body = {
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        }
        self.body = raw if raw is not None else json.dumps(body if status == 200 else {"error": {"message": text}})
        self.status, self.headers, self.delay = status, headers or {}, delay


class JudgeServer(LocalServer):
    """`behave(request, number)` gives the Reply; `requests` keeps (body, headers, seconds since start).

    models: the names that the server lists; it has no list without them.
    """

    def __init__(self, behave: Callable[[dict, int], Reply], models: Sequence[str] = ()):
        self.requests: list[tuple[dict, dict, float]] = []
        self.at_once = self.most_at_once = 0
        lock, start = threading.Lock(), time.monotonic()
        outer = self

        class Handler(JsonHandler):
            def do_GET(self):
                known = models and self.path == "/v1/models"
                self.send(200 if known else 404, {"data": [{"id": name} for name in models]})

            def do_POST(self):
                body = self.body()
                with lock:
                    outer.requests.append((body, dict(self.headers), time.monotonic() - start))
                    number = len(outer.requests)
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                reply = behave(body, number) if self.path == "/v1/chat/completions" else Reply("no such path", 404)
                time.sleep(reply.delay)
                with lock:
                    outer.at_once -= 1
                with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
                    self.send_bytes(reply.status, reply.body.encode(), reply.headers)

        super().__init__(Handler)


def shown(request: dict) -> tuple[str, str, str, str | None]:
    """(question, first answer, second answer, image data URL) in a judge's request."""
    content = request["messages"][1]["content"]
    text = content[-1]["text"]
    parts = [text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0] for tag in ("question", "answer_a", "answer_b")]
    return (*parts, content[0]["image_url"]["url"] if content[0]["type"] == "image_url" else None)
