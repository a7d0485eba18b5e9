"""Servers started as a user starts them, asked over HTTP; images, adapters and addresses for them."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.paths import ROOT

START_SECONDS = 400  # imports alone take a minute on a busy machine


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours: like a photo to the model, small as a file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_part(image: Image.Image) -> dict:
    """An image as OpenAI's chat API takes it."""
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(image)).decode()}}


def random_adapter(base: Path, folder: Path, seed: int = 0) -> Path:
    """A LoRA adapter on the language model and the projector of `base` whose B matrices are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj", "linear_1"],
        init_lora_weights=False,
        exclude_modules=r".*vision_tower.*",
        task_type="CAUSAL_LM",
    )
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(command: list[str], port: int, log: Path, **env: str):
    """Runs `command` until the block ends, and yields when 127.0.0.1:port answers; fails with the log otherwise."""
    environment = {k: v for k, v in os.environ.items() if k not in ("API_HOST", "API_KEY", "GRADIO_SERVER_NAME")}
    environment.update(env, PYTHONUNBUFFERED="1", GRADIO_ANALYTICS_ENABLED="False")
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            deadline = time.time() + START_SECONDS
            while not accepts("127.0.0.1", port):
                assert process.poll() is None, f"the server stopped:\n{log.read_text()[-3000:]}"
                assert time.time() < deadline, f"no answer in {START_SECONDS} s:\n{log.read_text()[-3000:]}"
                time.sleep(0.5)
            yield process
        finally:
            process.terminate()
            process.wait(30)


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex((host, port)) == 0


def post(url: str, body: dict) -> str:
    """The response's text. Raises urllib.error.HTTPError for a status of 400 or more."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()
