"""llama-server on two GGUF files, started for a comparison with transformers and stopped after it."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from ..errors import UserError
from .chat import messages
from .client import ChatClient, data_url
from .side_by_side import Answer

KEY_ENV = "LLAVA_ORPO_LLAMA_SERVER_KEY"  # never set: the server listens on 127.0.0.1, for us, without a key
START_SECONDS = 300
EXACT = ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # llama.cpp keeps keys and values in 16 bits unless told otherwise


def program(name: str) -> str:
    """The path of one of llama.cpp's programs, built by scripts/gguf.sh. Raises UserError."""
    path = Path(os.environ.get("LLAMA_CPP", ".venv-gguf/llama.cpp")) / "build" / "bin" / name
    if not path.is_file():
        raise UserError(f"There is no {path}: run bash scripts/gguf.sh, which builds it.")
    return str(path)


@contextmanager
def serving(model: Path, projector: Path, log: Path, threads: int, context: int = 4096) -> Iterator[str]:
    """The address (with /v1) of a llama-server that runs inside the block. Raises UserError if it does not start."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [program("llama-server"), "-m", str(model), "--mmproj", str(projector), "--host", "127.0.0.1"]
    command += ["--port", str(port), "-c", str(context), "-np", "1", "-t", str(threads), "--no-warmup"]
    command += EXACT
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise UserError(f"llama-server ended with {process.returncode}; {log} ends: {' | '.join(lines[-3:])}")
        try:
            if httpx.get(address, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise UserError(f"llama-server did not answer within {START_SECONDS} s; see {log}.")


class ServedModel:
    """Asks a llama-server greedily, by its chat endpoint as any client does."""

    def __init__(self, base_url: str, max_new_tokens: int):
        self.base_url, self.max_new_tokens = base_url, max_new_tokens

    def ask(self, question: str, image: Any = None) -> Answer:
        """As `Runner.ask`."""
        url, data = None, io.BytesIO()
        if image is not None:
            image.save(data, "PNG")
            url = data_url(data.getvalue())
        payload = {
            "model": "local",
            "messages": messages(question, url),
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 1,
            "cache_prompt": False,
        }
        started = time.perf_counter()
        body = asyncio.run(self._chat(payload))
        seconds = time.perf_counter() - started
        choice = body["choices"][0]
        logp = sum(one["logprob"] for one in choice["logprobs"]["content"])
        usage = body["usage"]
        text = choice["message"]["content"].strip()
        return Answer(text, usage["prompt_tokens"], usage["completion_tokens"], logp, seconds)

    async def _chat(self, payload: dict[str, Any]) -> dict[str, Any]:
        client = ChatClient(self.base_url, KEY_ENV, timeout=600, retries=0)
        try:
            return await client.chat(payload)
        finally:
            await client.close()
