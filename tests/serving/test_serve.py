"""scripts/serve.sh: what is refused, which template and options vLLM gets, and (heavy) vLLM itself, compared."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
import serve
from filelock import FileLock
from PIL import Image
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoProcessor

from helpers.commands import exit_code, run_script
from helpers.paths import ROOT
from helpers.recipes import CACHE, random_model
from helpers.serving import free_port, image_part, random_adapter, server
from llava_orpo import early
from llava_orpo.errors import UsageError, UserError
from llava_orpo.serving import chat_template, vllm_server

TINY = ROOT / "outputs" / "tiny"
RECIPE = "recipes/tiny/llava16_orpo_qlora.yaml"


def copy_of_the_model(folder: Path) -> Path:
    shutil.copytree(random_model(), folder)
    return folder


def changed_tokenizer(folder: Path, change) -> Path:
    """A copy of the random model whose tokenizer.json `change` has changed."""
    path = copy_of_the_model(folder) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))
    return folder


def not_legacy(tokenizer: Tokenizer) -> None:
    """What `legacy: false` makes of a Llama tokenizer: only the start of a string opens with a blank."""
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)


def test_the_template_that_gives_the_checkpoints_ids_is_found_for_each_kind_of_tokenizer(tmp_path):
    for change, front in ((lambda _: None, chat_template.BOS), (not_legacy, chat_template.BOS_AND_BLANK)):
        folder = changed_tokenizer(tmp_path / f"model{len(front)}", change)
        template, found = chat_template.served_template(folder)
        assert found == front
        processor = AutoProcessor.from_pretrained(folder)
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, **processor.tokenizer.special_tokens_map
        )
        own = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids
        assert ids == processor.tokenizer(own).input_ids and ids[0] == processor.tokenizer.bos_token_id


def test_a_template_with_its_own_bos_stays_and_one_that_cannot_fit_is_refused(tmp_path):
    folder = copy_of_the_model(tmp_path / "model")
    own = folder / "chat_template.jinja"
    own.write_text(chat_template.BOS + own.read_text())
    assert chat_template.served_template(folder) == (own.read_text(), "")

    def end_token_too(tokenizer):
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])

    folder = changed_tokenizer(tmp_path / "ends", end_token_too)
    with pytest.raises(UserError, match="its tokenizer does not fit its template"):
        chat_template.served_template(folder)


@pytest.fixture
def refused(capsys, monkeypatch):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("the server was started"))

    def run(*words):
        capsys.readouterr()
        assert exit_code(serve.main, *words) in (1, 2)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return run


def test_what_cannot_be_served_is_refused_in_one_line(refused, tmp_path):
    model, adapter = random_model(), random_adapter(random_model(), tmp_path / "adapter")
    assert "There is no folder outputs/no/such" in refused("outputs/no/such")
    message = refused(adapter)
    assert f"holds an adapter, not a whole model: bash scripts/serve.sh {model} adapter={adapter}" in message
    assert "not a model folder" in refused(tmp_path)
    assert "holds no adapter_config.json; serve a whole model without adapter=" in refused(model, f"adapter={model}")
    assert "there is no such folder" in refused(model, f"adapter={tmp_path / 'none'}")
    other = copy_of_the_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_vl"}))
    assert "is of model type 'qwen2_vl', not 'llava_next'" in refused(other)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for change, words in (
        ({"base_model_name_or_path": "another/base"}, "was trained on another/base, not on"),
        ({"use_dora": True}, "takes no adapter with use_dora; merge it"),
        ({"r": 1024}, "a rank above 512"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **change}))
        assert words in refused(model, f"adapter={adapter}")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"Port {port} of 127.0.0.1 is in use; give another: port=" in refused(model, f"port={port}")
    assert "dtype=int8" in refused(model, "dtype=int8")
    assert "max_model_len=99999999" in refused(model, "max_model_len=99999999")
    assert "trust_remote_code is not allowed" in refused(model, f"port={free_port()}", "vllm.trust_remote_code=true")
    assert "vllm.port: set by port=" in refused(model, f"port={free_port()}", "vllm.port=1")
    quantized = tmp_path / "quantized"
    copy_of_the_model(quantized)
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    assert "compute in 16 bits" in refused(quantized, "dtype=float32")
    assert vllm_server.plan(str(quantized)).dtype == "bfloat16"


def test_what_vllm_is_told(tmp_path, monkeypatch, capsys):
    started = {}
    monkeypatch.setattr(os, "execve", lambda program, words, env: started.update(words=words, env=env))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(vllm_server, "installed", lambda: ("cpu", vllm_server.WRITTEN_FOR))
    adapter = random_adapter(random_model(), tmp_path / "adapter")
    port = free_port()
    words = [str(random_model()), f"adapter={adapter}", f"port={port}", "vllm.max_num_seqs=4"]
    serve.main(words)
    line, env = " ".join(started["words"]), started["env"]
    name = random_model().name
    assert f"--served-model-name {name} --host 127.0.0.1 --port {port}" in line
    assert f"--lora-modules adapter={adapter}" in line and "--max-lora-rank 8" in line and "--max-loras 2" in line
    assert "--enable-tower-connector-lora" in line and "--enforce-eager" in line and "--max-num-seqs 4" in line
    template = Path(started["words"][started["words"].index("--chat-template") + 1])
    assert template.read_text() == chat_template.served_template(random_model())[0]
    key, printed = env["VLLM_API_KEY"], capsys.readouterr().out
    assert len(key) > 20 and key in printed and key not in line and env["VLLM_NO_USAGE_STATS"] == "1"
    serve.main([*words, "api_key=mine"])
    assert started["env"]["VLLM_API_KEY"] == "mine" and "mine" not in " ".join(started["words"])
    assert "mine" not in capsys.readouterr().out
    serve.main([*words, "api_key=none"])
    assert "VLLM_API_KEY" not in started["env"] and "no key" in capsys.readouterr().out


@pytest.mark.parametrize("lists", ["GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)", ""])
def test_the_wheel_is_chosen_by_what_the_machine_has(lists, tmp_path):
    """An environment that looks installed, whose python tells how it was called."""
    pins = subprocess.run(
        ["bash", "-c", 'p=$(cat requirements.txt requirements/* pyproject.toml); sha256sum <<<"$p"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout[:16]
    venv, name = tmp_path / "venv", "serve.txt" if lists else "serve-cpu.txt"
    (venv / "bin").mkdir(parents=True)
    (venv / f".installed-{pins}-{name}").touch()
    for file, text in (("python", 'echo "$@ ${UV_OVERRIDE:-none}"'), ("nvidia-smi", f'echo "{lists}"')):
        (venv / "bin" / file).write_text(f"#!/bin/sh\n{text}\n")
        (venv / "bin" / file).chmod(0o755)
    relative = os.path.relpath(venv, ROOT)
    env = {
        **os.environ,
        "SERVE_VENV": relative,
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    env.pop("UV_OVERRIDE", None)
    done = subprocess.run(
        ["bash", "scripts/serve.sh", "m", "port=1"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    override = "none" if lists else "requirements/serve-cpu.override"
    assert done.stdout.strip() == f"scripts/serve.py m port=1 {override}", done.stderr


def test_llamafactorys_own_vllm_is_refused_before_anything_is_loaded():
    with pytest.raises(UsageError, match="infer_backend: vllm is not taken: .*bash scripts/serve.sh"):
        early.check("api", ["recipes/tiny/llava16_chat.yaml", "infer_backend=vllm"])


run = functools.partial(run_script, QUANTIZE_VENV="outputs/test-cache/venv-quantize")


@pytest.fixture(scope="module")
def folders():
    """The quickstart's tiny models and their GPTQ and AWQ forms; the environment of scripts/serve.sh."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "venv-serve.lock"):
        if not all((TINY / part).is_dir() for part in ("model", "merged", "orpo_qlora", "data")):
            run("bash", "scripts/quickstart.sh")
        for method in ("gptq", "awq"):
            if not (TINY / method).exists():
                words = ["--method", method, "--model", TINY / "merged", "--data", "demo_train", "--out", TINY / method]
                run("bash", "scripts/quantize.sh", *words)
    return TINY


@pytest.mark.heavy
@pytest.mark.xdist_group("quickstart")
@pytest.mark.parametrize("form", ["merged", "adapter", "gptq", "awq"])
def test_vllm_says_what_transformers_says(form, folders, tmp_path):
    port, adapter = free_port(), folders / "orpo_qlora"
    words = [folders / "model", f"adapter={adapter}"] if form == "adapter" else [folders / form]
    reference = adapter if form == "adapter" else folders / form
    rows = 400 if form == "merged" else 20
    command = ["bash", "scripts/serve.sh", *map(str, words), f"port={port}", "api_key=none"]
    log, out = tmp_path / "log.txt", tmp_path / "out"
    # The CPU's 4-bit kernel (CPUWNA16LinearKernel) takes no float32; log-probs differ by rounding to bfloat16.
    tolerance = 0.2 if form in ("gptq", "awq") else 1e-3
    venv = {"SERVE_VENV": "outputs/test-cache/venv-serve", "PYTHON": sys.executable, "VLLM_API_KEY": ""}
    with server(command, port, log, **venv):
        run(
            sys.executable,
            "evals/serve_parity.py",
            RECIPE,
            f"reference={reference}",
            f"output_dir={out}",
            f"base_url=http://127.0.0.1:{port}/v1",
            f"model={reference.name}",
            f"max_rows={rows}",
            f"tolerance={tolerance}",
            codes=(0, 1),
        )
    report = json.loads((out / "serve_parity.json").read_text())
    assert report["prompt_ids_equal"] == report["prompt_counts_equal"] == report["n"] == rows
    assert report["logps"]["ids_equal"] == 2 * rows and report["logps"]["worst"] <= tolerance
    correct = report["accuracy"]["correct"]
    assert abs(correct[0] - correct[1]) <= 1
    if form in ("merged", "adapter"):
        assert report["equal"] and report["answers_equal"] == rows
    if form == "merged":
        scores = tmp_path / "scores"
        run(
            sys.executable,
            "evals/preference.py",
            RECIPE,
            f"model_name_or_path={reference}",
            "quantization_bit=null",
            "grounding_eval=false",
            f"output_dir={scores}",
        )
        history = json.loads((scores / "preference_eval.json").read_text())["history"][0]["metrics"]
        assert abs(correct[0] - history["preference_accuracy"] * rows) <= 1


@pytest.mark.heavy
@pytest.mark.xdist_group("quickstart")
def test_model_and_adapter_do_not_mix_in_one_batch(folders, tmp_path):
    """One at a time their answers are compared with transformers' above; here with those in a batch of both."""
    port = free_port()
    words = [folders / "model", f"adapter={folders / 'orpo_qlora'}", f"port={port}", "api_key=none"]
    venv = {"SERVE_VENV": "outputs/test-cache/venv-serve", "PYTHON": sys.executable, "VLLM_API_KEY": ""}
    rows = pq.read_table(folders / "data" / "demo_heldout.parquet").slice(0, 12).to_pylist()

    async def say(client: httpx.AsyncClient, model: str, row: dict) -> tuple[str, list[float]]:
        content = [image_part(Image.open(io.BytesIO(row["image"]["bytes"]))), {"type": "text", "text": row["question"]}]
        body = {"model": model, "messages": [{"role": "user", "content": content}], "logprobs": True}
        reply = await client.post("/chat/completions", json={**body, "temperature": 0, "max_tokens": 40})
        choice = reply.json()["choices"][0]
        return choice["message"]["content"], [token["logprob"] for token in choice["logprobs"]["content"]]

    async def both():
        asked = [(model, row) for row in rows for model in ("model", "orpo_qlora")]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=300) as client:
            alone = [await say(client, *one) for one in asked]
            return alone, await asyncio.gather(*(say(client, *one) for one in asked))

    with server(["bash", "scripts/serve.sh", *map(str, words)], port, tmp_path / "log.txt", **venv):
        alone, mixed = asyncio.run(both())
    assert len({text for text, _ in alone}) > len(rows), "the two models must differ"
    assert [text for text, _ in mixed] == [text for text, _ in alone]
    for (_, one), (_, other) in zip(alone, mixed, strict=True):
        assert other == pytest.approx(one, abs=1e-3)
