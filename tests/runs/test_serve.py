"""`llamafactory-cli api` and `chat` through the plugin say what transformers' own generate says."""

from __future__ import annotations

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import ask
import psutil
import pytest
import torch
import yaml
from PIL import Image

from helpers.paths import ROOT
from helpers.recipes import random_model
from helpers.serving import accepts, free_port, image_part, picture, png, post, random_adapter, server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]
TOKENS = 16
QUESTION = 'What is in <the> picture, and where is "</s>"?'
CLIENT_SECONDS = 6  # that a request may take to arrive
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CLI = str(Path(sys.executable).parent / "llamafactory-cli")


@pytest.fixture(scope="module")
def reference():
    return ask.load(str(random_model()), "float32")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(URL, process) of the tiny recipe's API on a random model, started without API_HOST."""
    port = free_port()
    recipe = [CLI, "api", "recipes/tiny/llava16_chat.yaml", f"model_name_or_path={random_model()}"]
    log = tmp_path_factory.mktemp("api") / "log.txt"
    variables = {"API_PORT": str(port), "API_CLIENT_TIMEOUT": str(CLIENT_SECONDS)}
    with server([*recipe, f"max_new_tokens={TOKENS}"], port, log, **variables) as process:
        yield f"http://127.0.0.1:{port}/v1/chat/completions", process


@pytest.fixture(scope="module")
def api(started):
    return started[0]


@pytest.fixture(scope="module")
def api_process(started):
    return started[1]


def connection(api: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(api).port), timeout=120)


def say(api: str, messages: list[dict], **keys) -> dict:
    return json.loads(post(api, {"model": "llava", "messages": messages, **keys}))


def text_of(completion: dict) -> str:
    return completion["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize("size", [(300, 200), (60, 260), (40, 30)])
def test_api_answers_about_an_image_as_transformers_does(api, reference, size):
    image = picture(*size)
    content = [image_part(image), {"type": "text", "text": "What is in the picture?"}]
    completion = say(api, [{"role": "user", "content": content}])
    expected = ask.answer(*reference, image, "What is in the picture?", TOKENS)
    assert text_of(completion) == expected and expected
    inputs = reference[1](images=image, text="[INST] <image>\nWhat is in the picture? [/INST]", return_tensors="pt")
    assert completion["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    other = [image_part(picture(*size, seed=9)), content[1]]
    assert text_of(say(api, [{"role": "user", "content": other}])) != expected, "the picture matters"


def test_api_takes_text_alone_and_a_request_goes_before_the_recipe(api, reference):
    messages = [{"role": "user", "content": "Hello there"}]
    assert text_of(say(api, messages)) == ask.answer(*reference, None, "Hello there", TOKENS)
    assert text_of(say(api, messages, max_tokens=3)) == ask.answer(*reference, None, "Hello there", 3)


def test_api_streams_the_same_text(api, reference):
    image = picture(120, 90)
    content = [{"type": "text", "text": "Where is it?"}, image_part(image)]
    lines = post(api, {"model": "llava", "messages": [{"role": "user", "content": content}], "stream": True})
    events = [line[len("data: ") :] for line in lines.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert len(deltas) > 3
    assert "".join(deltas).strip() == ask.answer(*reference, image, "Where is it?", TOKENS)


@torch.no_grad()
def test_api_keeps_the_image_in_a_longer_conversation(api, reference):
    model, processor = reference
    image = picture(200, 150)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(image), {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Which colour?"},
    ]
    text = "<<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] <image>\nWhat is it? [/INST] A cat.</s> [INST] Which colour? [/INST]"
    inputs = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    completion = say(api, messages)
    assert completion["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert text_of(completion) == processor.tokenizer.decode(out, skip_special_tokens=True).strip()


def refused(api: str, body: dict | bytes, **headers: str) -> tuple[int, str]:
    """(status, message) of a request that is refused with an error in OpenAI's form."""
    data = body if isinstance(body, bytes) else json.dumps({"model": "llava", **body}).encode()
    request = urllib.request.Request(api, data, {"Content-Type": "application/json", **headers})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=120)
    error = json.loads(caught.value.read())["error"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    return caught.value.code, error["message"]


def user(*parts, **message) -> dict:
    return {"messages": [{"role": "user", "content": list(parts), **message}]}


def image_address(data: bytes, kind: str = "image/png") -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def goes_on(api: str, reference) -> None:
    said = say(api, [{"role": "user", "content": "Hello"}])
    assert text_of(said) == ask.answer(*reference, None, "Hello", TOKENS)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kB."""
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


def test_api_refuses_what_it_cannot_serve_and_goes_on(api, reference):
    image, words = image_part(picture(30, 30)), {"type": "text", "text": "Compare."}
    whole = png(picture(300, 200))
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello."}]
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}}
    cases = [
        (user(image, image, words), 400, "one image per conversation; the request has 2"),
        (user(image, image, words) | {"stream": True}, 400, "one image per conversation"),
        ({"messages": [*turns, *user(image)["messages"]]}, 400, "first message of the user"),
        ({"messages": turns}, 400, "alternate"),
        (user(words, role="tool"), 400, "alternate"),
        ({"messages": []}, 400, "alternate"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "no content"),
        (user(video), 400, "takes no other"),
        (user(words) | {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tool calls"),
        (user(words) | {"temperature": -1}, 400, "temperature=-1"),
        (user(image_address(b"hello")), 400, "cannot be read"),
        (user(image_address(whole[: len(whole) // 2])), 400, "cannot be read"),
        (user(image_address(whole, "text/html")), 400, "data:image/png"),
        (user({"type": "image_url", "image_url": {"url": "data:image/png;base64,a%"}}), 400, "not base64"),
        (user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}), 400, "private"),
        (user({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), 400, "file path"),
        (user(image_address(bomb(10_000, 6_000))), 413, "10000x6000 pixels; the limit is 50 megapixels"),
        (user(image_address(bomb(40_000, 40_000))), 400, "cannot be read"),
        (user(image_address(bytes(11 * 2**20))), 413, "larger than 10 MB"),
        (b'{"messages": ' + b"[" * 200_000, 400, "not JSON"),
        ({"messages": [{"role": "nobody", "content": "Hello"}]}, 400, "alternate"),
        ({"messages": "Hello"}, 422, "messages: "),
    ]
    for body, status, words in cases:
        code, message = refused(api, body)
        assert code == status and words in message, (message, body)
    assert text_of(say(api, [{"role": "user", "content": QUESTION}])), "special-token literals in a question are text"
    goes_on(api, reference)


def test_api_takes_webp(api, reference):
    out = io.BytesIO()
    picture(120, 90).save(out, "WEBP", lossless=True)
    said = say(api, user(image_address(out.getvalue(), "image/webp"), {"type": "text", "text": "Where?"})["messages"])
    assert text_of(said) == ask.answer(*reference, picture(120, 90), "Where?", TOKENS)


@pytest.mark.parametrize("chunked", [False, True])
def test_api_refuses_a_large_body_without_keeping_it(api, api_process, reference, chunked):
    process, most = psutil.Process(api_process.pid), 0
    before = process.memory_info().rss
    piece = bytes(2**20)
    with connection(api) as client:
        length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (100 * len(piece))
        client.sendall(HEAD + length + b"\r\n\r\n")
        for _ in range(100):
            client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            most = max(most, process.memory_info().rss - before)
        client.sendall(b"0\r\n\r\n" if chunked else b"")
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"] == "The request is larger than 20 MB."
    assert most < (60 if chunked else 20) * 2**20, "the limit, and what growing it takes; nothing where the head tells"
    goes_on(api, reference)


def test_slow_clients_stop_nobody_and_are_sent_away(api, reference):
    started = time.monotonic()
    beginnings = [b"", b"POST /v1/chat/comp", HEAD, HEAD + b"Content-Length: 5000\r\n\r\n", b"GET / HTTP/1.1\r\nA: "]
    clients = [connection(api) for _ in range(50)]
    for number, client in enumerate(clients):
        client.sendall(beginnings[number % len(beginnings)])
    goes_on(api, reference)
    if time.monotonic() - started < CLIENT_SECONDS / 2:  # one more byte buys no time
        for client in clients[1::5]:
            client.sendall(b"l")
    for client in clients:
        answer = b"".join(iter(lambda client=client: client.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 408 "), answer
        assert b"was not whole after" in answer
        client.close()
    assert time.monotonic() - started < 60
    goes_on(api, reference)


def test_api_listens_on_this_machine_only(api):
    port = int(api.split(":")[2].split("/")[0])
    assert accepts("127.0.0.1", port)
    assert not accepts("127.0.0.2", port), "a server on 0.0.0.0 answers on every address of the machine"


def test_chat_in_the_terminal_with_base_and_adapter(tmp_path, reference):
    from peft import PeftModel

    adapter = random_adapter(random_model(), tmp_path / "adapter")
    command = [CLI, "chat", "recipes/tiny/llava16_chat.yaml", f"model_name_or_path={random_model()}"]
    command += [f"adapter_name_or_path={adapter}", f"max_new_tokens={TOKENS}"]
    done = subprocess.run(command, cwd=ROOT, input="Hello there\nexit\n", capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.split("Assistant: ", 1)[1].split("\nUser:", 1)[0].strip()
    expected = ask.answer(*reference, None, "Hello there", TOKENS)
    model = PeftModel.from_pretrained(ask.load(str(random_model()), "float32")[0], adapter).eval()
    aligned = ask.answer(model, reference[1], None, "Hello there", TOKENS)
    assert said == aligned != expected


@pytest.mark.parametrize("name", ["llava16_chat.yaml", "tiny/llava16_chat.yaml"])
def test_chat_recipes_serve_what_the_merge_recipes_write(name):
    chat, merge = (
        yaml.safe_load((ROOT / "recipes" / path).read_text()) for path in (name, name.replace("chat", "merge"))
    )
    assert chat["model_name_or_path"] == merge["export_dir"]
    assert chat["template"] == merge["template"] and chat["plugins"] == merge["plugins"]
    assert chat["do_sample"] is False


@pytest.mark.parametrize("expand", [True, False])
def test_engines_that_repeat_the_placeholder_themselves_get_one(reference, expand):
    """vLLM's engine in LLaMA-Factory sets expand_mm_tokens to False before it encodes a prompt."""
    from llava_orpo.data.mm_plugin import LlavaOrpoPlugin
    from llava_orpo.data.template import exact_templates

    processor = reference[1]
    template_class = exact_templates()["llava_v16_mistral"]
    plugin = LlavaOrpoPlugin("<image>", None, None, expand_mm_tokens=expand)
    template = template_class(
        *[None] * 7,
        default_system="",
        stop_words=[],
        thought_words=("", ""),
        tool_call_words=("", ""),
        efficient_eos=False,
        replace_eos=False,
        replace_jinja_template=False,
        enable_thinking=None,
        preserve_thinking=False,
        mm_plugin=plugin,
    )
    image = picture(100, 60)
    messages = plugin.process_messages([{"role": "user", "content": "<image>Where?"}], [image], [], [], processor)
    messages.append({"role": "assistant", "content": ""})
    prompt_ids, _ = template.encode_oneturn(processor.tokenizer, messages)
    text = "[INST] <image>\nWhere? [/INST]"
    whole = processor(images=image, text=text, return_tensors="pt")["input_ids"][0].tolist()
    assert prompt_ids == (whole if expand else processor.tokenizer(text).input_ids)
