"""A LLaVA behind an OpenAI-compatible API on 127.0.0.1, by plain transformers, that can be made to misbehave."""

from __future__ import annotations

import base64
import io
import json
import threading
from dataclasses import dataclass, field

import torch
from PIL import Image

from helpers.local_server import JsonHandler, LocalServer


@dataclass
class ServedModel:
    """What is served and how. owner: as /v1/models tells it.

    front: put before the rendered template, which is tokenized without special tokens then; None: the processor's way.
    ids, logps: answer vLLM's extensions. strict: unknown fields are refused. fail_after: requests before it breaks off.
    """

    model: torch.nn.Module
    processor: object
    names: tuple[str, ...] = ("served",)
    owner: str = "vllm"
    front: str | None = None
    ids: bool = True
    logps: bool = True
    strict: bool = False
    images: bool = True
    key: str = ""
    fail_after: int = 1 << 30
    limit: int = 1 << 30
    requests: list = field(default_factory=list)

    def chat(self, body: dict) -> dict:
        """A chat completion with the extensions that `body` asks for."""
        picture, messages = None, []
        for message in body["messages"]:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
            for i, part in enumerate(parts):
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    picture, parts[i] = Image.open(io.BytesIO(data)).convert("RGB"), {"type": "image"}
            messages.append({"role": message["role"], "content": parts})
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=body.get("add_generation_prompt", True)
        )
        special = {} if self.front is None else {"add_special_tokens": False}
        inputs = self.processor(images=picture, text=(self.front or "") + text, return_tensors="pt", **special)
        ids = inputs["input_ids"][0].tolist()
        tokens = min(body["max_tokens"], self.limit)
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, len(ids) :]
            reply = {
                "choices": [
                    {
                        "message": {
                            "role": "assistant",
                            "content": self.processor.tokenizer.decode(out, skip_special_tokens=True),
                        },
                        "finish_reason": "length" if len(out) == tokens else "stop",
                    }
                ],
                "usage": {"prompt_tokens": len(ids), "completion_tokens": len(out)},
            }
            if self.ids and body.get("return_token_ids"):
                reply["prompt_token_ids"] = ids
            if self.logps and body.get("prompt_logprobs") is not None:
                logps = self.model(**inputs).logits[0].log_softmax(-1)
                reply["prompt_logprobs"] = [None] + [
                    {str(token): {"logprob": float(logps[i, token])}} for i, token in enumerate(ids[1:])
                ]
        return reply

    def generate(self, body: dict) -> dict:
        """SGLang's /generate, in the form that it documents."""
        text_ids, images = body["input_ids"], body.get("image_data") or []
        text = self.processor.tokenizer.decode(text_ids)
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in images]
        pixels = self.processor.image_processor(pictures, return_tensors="pt") if pictures else {}
        image, at = self.model.config.image_token_id, None
        if pictures:
            count = self.processor(images=pictures[0], text="<image>", return_tensors="pt")["input_ids"][0].tolist()
            at = text_ids.index(image)
            text_ids = text_ids[:at] + [image] * count.count(image) + text_ids[at + 1 :]
        with torch.no_grad():
            logps = self.model(input_ids=torch.tensor([text_ids]), **pixels).logits[0].log_softmax(-1)
        entries = [[None, text_ids[0], None]]
        entries += [[float(logps[i, token]), token, None] for i, token in enumerate(text_ids[1:])]
        return {"text": text, "meta_info": {"input_token_logprobs": entries}}


class OpenAIServer(LocalServer):
    """Serves a ServedModel until the block ends; `base_url` is its address."""

    def __init__(self, served: ServedModel):
        lock = threading.Lock()
        known = {"model", "messages", "max_tokens", "temperature"}

        class Handler(JsonHandler):
            def do_GET(self):
                if self._refused():
                    return
                data = [{"id": name, "owned_by": served.owner} for name in served.names]
                self.send(200, {"object": "list", "data": data})

            def do_POST(self):
                body = self.body()
                with lock:  # one model, one forward at a time
                    served.requests.append(body)
                    if self._refused():
                        return
                    if len(served.requests) > served.fail_after:
                        self.close_connection = True
                        self.connection.close()
                        return
                    if self.path == "/generate":
                        self.send(200, served.generate(body))
                    elif served.strict and body.keys() - known:
                        self.send(400, {"error": {"message": "unknown field"}})
                    elif not served.images and "image_url" in json.dumps(body["messages"]):
                        self.send(400, {"error": {"message": "this model takes no image"}})
                    else:
                        self.send(200, served.chat(body))

            def _refused(self) -> bool:
                if served.key and self.headers.get("Authorization") != f"Bearer {served.key}":
                    self.send(401, {"error": "Unauthorized"})
                    return True
                return False

        super().__init__(Handler)
