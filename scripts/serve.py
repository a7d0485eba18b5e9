"""Serves a LLaVA-1.6 through vLLM's OpenAI-compatible API, with the prompt that the checkpoint was trained on.

    bash scripts/serve.sh outputs/llava16_orpo_merged
    bash scripts/serve.sh llava-hf/llava-v1.6-mistral-7b-hf adapter=outputs/llava16_orpo_qlora port=8001

Takes a merged, GPTQ or AWQ folder, or a base model (folder or Hub id) with its adapter, which need not be merged.
Plain chat requests of any client then get the checkpoint's own prompt; evals/serve_parity.py proves it. Keys:

    adapter        folder of a LoRA adapter of the model; both are served, each under its own name
    port 8000, host 127.0.0.1      where it listens; host=0.0.0.0 lets other machines connect
    api_key        the key that requests must carry; none: no key. Without it the variable VLLM_API_KEY counts, and
                   without that a key is made and printed
    model_name     the name in requests (default: the folder's); with adapter= it names the adapter
    dtype          float32, bfloat16 or float16 (default: the folder's own)
    max_model_len  tokens of prompt and answer (default: the model's, 8192 at most; an image takes up to 2,928)
    vllm.<option>  any further option of `vllm serve`: vllm.tensor_parallel_size=2

A system without NVIDIA GPU is served by vLLM's CPU wheel, without compilation.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llava_orpo.recipe import read_command, run

OWN_KEYS = {
    "adapter": str,
    "host": "127.0.0.1",
    "port": 8000,
    "api_key": str,
    "model_name": str,
    "dtype": str,
    "max_model_len": int,
    "vllm": {},
}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, file="MODEL", must_exist=False, secrets=("api_key",))
    own = command.own
    from llava_orpo.serving import vllm_server

    served = vllm_server.plan(
        str(command.file),
        adapter=own["adapter"],
        model_name=own["model_name"],
        dtype=own["dtype"],
        max_model_len=own["max_model_len"],
    )
    vllm_server.check_address(own["host"], own["port"])
    key, made = vllm_server.choose_key(own["api_key"], os.environ.get("VLLM_API_KEY"))
    template = vllm_server.write_template(served, Path(sys.prefix))
    words = vllm_server.command(served, own["host"], own["port"], template, own["vllm"])
    print(vllm_server.describe(served, own["host"], own["port"], key, made), flush=True)
    # In place of this process, which has nothing more to do: signals and exit codes are vLLM's own.
    os.execve(sys.executable, [sys.executable, *words], vllm_server.environment(served, key))


if __name__ == "__main__":
    run(main)
