"""A merged LLaVA-1.6 as an OpenVINO folder, by optimum-intel in an environment of its own."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..checkpoint.files import CheckpointError, fresh_folder
from ..checkpoint.published import read_merged
from ..progress import waiting

# optimum-intel's names. Without a word the weights stay what they are; fp32 also holds bf16 exactly.
FORMATS = {"": "fp32", "16bit": "fp16", "8bit": "int8", "4bit": "int4"}


def export(model: Path, out: Path, bits: str, overwrite: bool = False) -> int:
    """Writes `out`, whole or not at all, and returns its size in bytes.

    bits: "" (fp32), "16bit" (fp16), "8bit" or "4bit": weights of the language model in 8 bits a channel, or in 4 bits
    with a scale for each 128, embeddings and LM head in 8; computing stays in fp32. Needs twice the model's size in
    memory, since PyTorch loads it in fp32. Raises CheckpointError: not a whole, unquantized llava_next folder, a filled
    `out`, or optimum-intel's own words.
    """
    _, table = read_merged(model, "OpenVINO's form")
    if out.resolve() == model.resolve():
        raise CheckpointError(f"{out} is the model's own folder; write the result somewhere else.")
    numbers = sum(math.prod(shape) for _, shape, _ in table.values())
    with fresh_folder(out, 4 * numbers, overwrite) as partial:
        command = [
            str(Path(sys.executable).with_name("optimum-cli")),
            *("export", "openvino", "--model", str(model), "--task", "image-text-to-text"),
            *("--weight-format", FORMATS[bits], str(partial)),
        ]
        if bits == "4bit":
            command[-1:-1] = ["--group-size", "128", "--group-size-fallback", "adjust"]
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            with waiting(f"exporting {model.name} to OpenVINO"):
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=_offline()).returncode
            log.seek(0)
            if code:
                raise CheckpointError(f"optimum-cli failed (exit code {code}): {log.read()[-2000:].strip()}")
        return sum(file.stat().st_size for file in partial.iterdir())


def _offline() -> dict[str, str]:
    """The environment of a run that asks no server: the model is a folder."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
