"""`llamafactory-cli api` and `chat` through the plugin say what transformers' own generate says."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
from pathlib import Path

import ask
import pytest
import torch
import yaml

from helpers.paths import ROOT
from helpers.recipes import random_model
from helpers.serving import accepts, free_port, image_part, picture, post, random_adapter, server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]
TOKENS = 16
QUESTION = 'What is in <the> picture, and where is "</s>"?'
CLI = str(Path(sys.executable).parent / "llamafactory-cli")


@pytest.fixture(scope="module")
def reference():
    return ask.load(str(random_model()), "float32")


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """The URL of the tiny recipe's API on a random model, started without API_HOST."""
    port = free_port()
    recipe = [CLI, "api", "recipes/tiny/llava16_chat.yaml", f"model_name_or_path={random_model()}"]
    log = tmp_path_factory.mktemp("api") / "log.txt"
    with server([*recipe, f"max_new_tokens={TOKENS}"], port, log, API_PORT=str(port)):
        yield f"http://127.0.0.1:{port}/v1/chat/completions"


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


def test_api_survives_what_it_cannot_serve(api, reference):
    two = [image_part(picture(30, 30)), image_part(picture(30, 30)), {"type": "text", "text": "Compare."}]
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]
    for content in (two, broken):
        with pytest.raises(urllib.error.HTTPError):
            say(api, [{"role": "user", "content": content}])
    markers = say(api, [{"role": "user", "content": QUESTION}])
    assert text_of(markers), "special-token literals in a question are text"
    assert text_of(say(api, [{"role": "user", "content": "Hello"}])) == ask.answer(*reference, None, "Hello", TOKENS)


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
