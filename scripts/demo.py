"""A page that shows the difference: ask the base and the aligned model, or let both score two answers.

    python scripts/demo.py recipes/llava16_orpo_qlora.yaml aligned=outputs/llava16_orpo_qlora
    python scripts/demo.py recipes/tiny/llava16_orpo_qlora.yaml aligned=outputs/tiny/orpo_qlora \\
        examples=outputs/tiny/data/demo_heldout.parquet
    python scripts/demo.py recipes/llava16_orpo_qlora.yaml base_url=http://127.0.0.1:8000/v1 \\
        base_model=llava-v1.6-mistral-7b-hf aligned_model=llava16_orpo_qlora

Takes a recipe and overrides like llamafactory-cli: model, precision and prompt are the recipe's. Serves only
http://127.0.0.1:7860 unless told otherwise. Own keys:

    aligned         an adapter folder (the base model is loaded once), or a merged model's folder or Hub id
    examples        a parquet in RLAIF-V's schema; its first images are offered as examples
    max_new_tokens  256
    max_upload_mb   largest image that is taken (10)
    host            127.0.0.1; 0.0.0.0 lets other machines in
    port            7860
    share           true: also open a public address through gradio.live

With base_url= an OpenAI-compatible server (scripts/serve.sh with adapter=) answers for both models instead, several
requests at a time; no weights are loaded here, and `aligned` is not given:

    base_url        the server's address, with /v1
    base_model, aligned_model      the two served names
    api_key_env     name of the environment variable with the key (default OPENAI_API_KEY)
    concurrency     requests at a time (8)
    timeout         seconds for one answer (120)
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import MODEL, Command, read_command, run

OWN_KEYS = {
    "aligned": str,
    "examples": Path,
    "max_new_tokens": 256,
    "max_upload_mb": 10,
    "host": "127.0.0.1",
    "port": 7860,
    "share": False,
    "base_url": str,
    "base_model": str,
    "aligned_model": str,
    "api_key_env": "OPENAI_API_KEY",
    "concurrency": 8,
    "timeout": 120.0,
}
SERVER_KEYS = ("base_model", "aligned_model", "api_key_env", "concurrency", "timeout")
OLD_FLAGS = {f"--{key.replace('_', '-')}": key for key in OWN_KEYS if key not in ("base_url", *SERVER_KEYS)}


def main(argv: list[str]) -> int:
    served = any(word.startswith("base_url=") for word in argv)
    command = read_command(__doc__, argv, OWN_KEYS, required=() if served else ("aligned",), uses=MODEL, old=OLD_FLAGS)
    own = command.own
    check(command)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", "The '.*' parameter in", DeprecationWarning)  # 5.50 announces Gradio 6
    from llava_orpo.demo.models import load_candidates
    from llava_orpo.demo.page import build, read_examples
    from llava_orpo.demo.served import load_served
    from llava_orpo.serving.client import Server

    with tempfile.TemporaryDirectory(prefix="llava-orpo-demo-") as scratch:
        examples = read_examples(own["examples"], 12, Path(scratch)) if own["examples"] else []
        if own["base_url"]:
            server = Server(own["base_url"], own["api_key_env"], own["concurrency"], own["timeout"], retries=2)
            names = own["base_model"], own["aligned_model"]
            candidates, warned = load_served(command.recipe, server, *names, scratch)
            for sentence in warned:
                print(f"warning: {sentence}", file=sys.stderr)
        else:
            candidates = load_candidates(command.recipe, own["aligned"], scratch)
        build(candidates, examples, own["max_new_tokens"]).launch(
            server_name=own["host"],
            server_port=own["port"],
            share=own["share"],
            show_api=False,
            show_error=True,
            max_file_size=f"{own['max_upload_mb']}mb",
            allowed_paths=[scratch],
        )
    return 0


def check(command: Command) -> None:
    """Raises UsageError for a server without its two names, and for keys of a server without one."""
    own = command.own
    if own["base_url"]:
        wrong = [f"{key}= is missing: the served name." for key in ("base_model", "aligned_model") if not own[key]]
        wrong += ["aligned= and base_url= are given; one of them says where the models are."] if own["aligned"] else []
    else:
        wrong = [f"{key}= is about a server, and base_url= is missing." for key in SERVER_KEYS if command.given(key)]
    if wrong:
        raise UsageError(*wrong)


if __name__ == "__main__":
    run(main)
