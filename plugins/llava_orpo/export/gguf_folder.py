"""A folder of GGUF files of one LLaVA-1.6, written whole or not at all. Runs in the environment of scripts/gguf.sh."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.files import CheckpointError, fresh_folder, tensor_table
from ..checkpoint.published import LM_HEAD
from ..progress import waiting
from ..serving.llama_server import program
from .gguf import read_model, vocabulary

EMBEDDING = "language_model.model.embed_tokens.weight"
HEADERS = 10_000_000  # bytes, for headers and the vocabulary of all files


def write_folder(model: Path, out: Path, types: Sequence[str], overwrite: bool = False) -> list[Path]:
    """The files written: language model, projector, and the language model in each of `types`.

    types: llama-quantize's names, in any case, such as q4_k_m. Raises CheckpointError.
    """
    import torch
    from transformers import AutoProcessor

    from .calibration import checkpoint_conversation

    config, tokenizer = read_model(model)
    table = tensor_table(model)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(table[EMBEDDING][0])
    if dtype is None or LM_HEAD not in table:
        raise CheckpointError(
            f"{model} holds {table[EMBEDDING][0]} weights or no LM head; a merged LLaVA-1.6 has both."
        )
    words = vocabulary(tokenizer, table[EMBEDDING][1][0], f"{model}/tokenizer.json")
    conversation = checkpoint_conversation(AutoProcessor.from_pretrained(model), model)
    if words.joined_otherwise:
        print(
            f"Note: llama.cpp can also join {len(words.joined_otherwise)} pieces of this vocabulary from other parts "
            f"than its merges ({', '.join(words.joined_otherwise[:5])}, …); rare texts may be split differently."
        )
    from . import llama_cpp

    if out.resolve() == model.resolve():
        raise CheckpointError(f"{out} is the model's own folder; write the result somewhere else.")
    weights = sum(dtype.itemsize * math.prod(shape) for _, shape, _ in table.values())
    with fresh_folder(out, weights * (1 + len(types)) + HEADERS, overwrite, mark="mmproj-*.gguf") as partial:
        files = llama_cpp.write(model, partial, dtype, words, conversation)
        for kind in types:
            files.append(quantized(files[0], partial / f"model-{kind.lower()}.gguf", kind))
    return [out / file.name for file in files]


def quantized(source: Path, file: Path, kind: str) -> Path:
    """`file`, written by llama-quantize. Raises CheckpointError with the end of what it said."""
    with waiting(f"quantizing to {kind}"):
        command = [program("llama-quantize"), str(source), str(file), kind.upper()]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CheckpointError(f"llama-quantize {kind} failed: {' | '.join(lines[-3:])}")
    return file


def find_files(folder: Path, name: str | None) -> tuple[Path, Path]:
    """(language model, projector) of a folder. name: the language model's file, default the unquantized one."""
    projectors = sorted(folder.glob("mmproj-*.gguf"))
    if not projectors:
        raise CheckpointError(f"{folder} holds no mmproj-*.gguf; write it: bash scripts/gguf.sh MODEL {folder}")
    model = folder / (name or projectors[0].name.replace("mmproj", "model"))
    if not model.is_file():
        found = ", ".join(sorted(file.name for file in folder.glob("model-*.gguf")))
        raise CheckpointError(f"{folder} holds no {model.name}; it has {found or 'no model-*.gguf'}.")
    return model, projectors[0]
