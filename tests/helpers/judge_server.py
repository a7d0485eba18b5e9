"""An OpenAI-compatible chat endpoint on 127.0.0.1 that answers, or misbehaves, as a test asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reply:
    """status, body text, extra headers; `delay` seconds before anything is sent."""

    def __init__(self, text: str = "", status: int = 200, headers: dict | None = None, delay: float = 0.0, raw=None):
        body = {
            "choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        }
        self.body = raw if raw is not None else json.dumps(body if status == 200 else {"error": {"message": text}})
        self.status, self.headers, self.delay = status, headers or {}, delay


class JudgeServer:
    """`behave(request, number)` gives the Reply; `requests` keeps (body, headers, seconds since start).

    models: the names that the server lists; it has no list without them.
    """

    def __init__(self, behave: Callable[[dict, int], Reply], models: Sequence[str] = ()):
        self.requests: list[tuple[dict, dict, float]] = []
        self.at_once = self.most_at_once = 0
        lock, start = threading.Lock(), time.monotonic()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                data = json.dumps({"data": [{"id": name} for name in models]}).encode()
                self.send_response(200 if models and self.path == "/v1/models" else 404)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((body, dict(self.headers), time.monotonic() - start))
                    number = len(outer.requests)
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                reply = behave(body, number) if self.path == "/v1/chat/completions" else Reply("no such path", 404)
                time.sleep(reply.delay)
                with lock:
                    outer.at_once -= 1
                data = reply.body.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):  # the client gave up
                    pass

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()


def shown(request: dict) -> tuple[str, str, str, str | None]:
    """(question, first answer, second answer, image data URL) in a judge's request."""
    content = request["messages"][1]["content"]
    text = content[-1]["text"]
    parts = [text.split(f"<{tag}>\n")[1].split(f"\n</{tag}>")[0] for tag in ("question", "answer_a", "answer_b")]
    return (*parts, content[0]["image_url"]["url"] if content[0]["type"] == "image_url" else None)
