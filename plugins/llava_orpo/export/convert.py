"""Conversion between the original LLaVA layout and llava-hf's."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checkpoint.files import (
    CheckpointError,
    copy_files,
    fresh_folder,
    processor_files,
    read_json,
    write_shards,
)
from ..checkpoint.published import (
    RECOMPUTED,
    check_folder,
    check_shapes,
    config_with_dtype,
    published_names,
    read_config,
)
from .original_files import SIDECAR, make_next_files, make_original_files, read_original_config, read_small_files
from .original_tokenizer import TOKENIZER_MODEL
from .original_weights import EMBEDDING, LM_HEAD, Weights, map_names, open_weights, padding_rows, to_original

ROWS = "converted_from.safetensors"  # vocabulary rows that only the transformers layout has


@dataclass(frozen=True)
class Plan:
    """A conversion, checked and ready to run."""

    target: str  # "llava_next" or "original"
    names: dict[str, tuple[Weights, str]]  # target name -> where its tensor is, and its name there
    shapes: dict[str, tuple[int, ...]]  # target name -> shape to be written
    read: Callable[[str], torch.Tensor]  # target name -> tensor to be written
    files: dict[str, str]  # small files of the target, by name
    tokenizer: Path  # folder to copy tokenizer.model from, if it has one
    dropped_rows: Callable[[], dict[str, torch.Tensor]] | None  # published name -> rows without a place there

    def planned(self) -> dict[str, torch.Tensor]:
        """Target name -> meta tensor of the dtype and shape to be written."""
        return {
            name: torch.empty(self.shapes[name], dtype=weights.dtypes[source], device="meta")
            for name, (weights, source) in self.names.items()
        }


def target_files(
    source: Path, target: str, files_from: Path | None, make: Callable[[], dict[str, str]]
) -> tuple[dict[str, str], Path]:
    """Small files of the target by name, and the folder to take tokenizer.model from.

    They come from --files-from if it is given, else from the source's record of an earlier conversion out of the
    target's layout, else they are made from the source's files.
    """
    sidecar = read_json(source / SIDECAR) if (source / SIDECAR).is_file() else {}
    if files_from is not None:
        if target == "llava_next":
            processor_files(files_from)
        return read_small_files(files_from), files_from
    return sidecar["files"] if sidecar.get("layout") == target else make(), source


def plan_next(source: Path, files_from: Path | None, vision_tower: Path | None) -> Plan:
    """Plans original -> transformers."""
    original = read_original_config(source)
    weights = open_weights(source)
    names = map_names(weights, open_weights(vision_tower) if vision_tower else None)
    make = functools.partial(make_next_files, source, original, vision_tower)
    files, tokenizer = target_files(source, "llava_next", files_from, make)
    config = json.loads(files["config.json"])
    if EMBEDDING not in names:
        raise CheckpointError(f"{source} holds no embedding (model.embed_tokens.weight): not a whole checkpoint.")
    shapes = {name: where.shapes[there] for name, (where, there) in names.items()}
    added = config["text_config"]["vocab_size"] - original["vocab_size"]
    if added < 0:
        raise CheckpointError(f"{source}: vocabulary of {original['vocab_size']}, but {-added} fewer rows wanted.")

    @functools.cache
    def rows() -> dict[str, torch.Tensor]:
        if (source / ROWS).is_file() and files_from is None:
            return load_file(source / ROWS)
        where, there = names[EMBEDDING]
        return dict(zip((EMBEDDING, LM_HEAD), padding_rows(where.read(there), added), strict=True))

    def read(name: str) -> torch.Tensor:
        where, there = names[name]
        tensor = where.read(there)
        return torch.cat([tensor, rows()[name]]) if added and name in (EMBEDDING, LM_HEAD) else tensor

    for name in {EMBEDDING, LM_HEAD} & shapes.keys():
        shapes[name] = (shapes[name][0] + added, *shapes[name][1:])
    check_shapes(shapes, config, f"{source}, converted,")
    dtype = names[EMBEDDING][0].dtypes[names[EMBEDDING][1]]
    files = {**files, "config.json": config_with_dtype(files["config.json"].encode(), dtype).decode()}
    return Plan("llava_next", names, shapes, read, files, tokenizer, None)


def plan_original(source: Path, files_from: Path | None) -> Plan:
    """Plans transformers -> original."""
    config = read_config(source)
    if "quantization_config" in config:
        raise CheckpointError(f"{source} is quantized; only 16- and 32-bit checkpoints are converted.")
    check_folder(source)
    weights = open_weights(source)
    published = published_names(name for name in weights.shapes if not RECOMPUTED.search(name))
    names = {to_original(name): (weights, there) for name, there in published.items()}
    files, tokenizer = target_files(source, "original", files_from, functools.partial(make_original_files, source))
    vocabulary = json.loads(files["config.json"])["vocab_size"]
    padded = weights.shapes[published[EMBEDDING]][0]
    if vocabulary > padded:
        raise CheckpointError(f"{source} has {padded} vocabulary rows; the original config wants {vocabulary}.")
    cut = {to_original(EMBEDDING), to_original(LM_HEAD)} & names.keys()
    shapes = {name: where.shapes[there] for name, (where, there) in names.items()}
    shapes |= {name: (vocabulary, *shapes[name][1:]) for name in cut}

    def read(name: str) -> torch.Tensor:
        tensor = weights.read(names[name][1])
        return tensor[:vocabulary].contiguous() if name in cut else tensor

    def dropped() -> dict[str, torch.Tensor]:
        present = [name for name in (EMBEDDING, LM_HEAD) if name in published]
        return {name: weights.read(published[name])[vocabulary:].clone() for name in present}

    return Plan("original", names, shapes, read, files, tokenizer, dropped)


def make_plan(source: Path, files_from: Path | None, vision_tower: Path | None) -> Plan:
    """Reads configs and headers, not weights, and checks everything. Raises CheckpointError."""
    if read_json(source / "config.json").get("model_type") == "llava_next":
        if vision_tower is not None:
            raise CheckpointError("--vision-tower is for original checkpoints; this one is in transformers layout.")
        return plan_original(source, files_from)
    return plan_next(source, files_from, vision_tower)


def convert(source: Path, out: Path, plan: Plan, max_shard_gb: float = 5.0, overwrite: bool = False) -> None:
    """Runs a plan: writes `out` beside its place, then renames it. Raises CheckpointError."""
    if out.resolve() == source.resolve():
        raise CheckpointError("The output folder is the source folder; choose another.")
    planned = plan.planned()
    needed = sum(tensor.nbytes for tensor in planned.values()) + sum(map(len, plan.files.values()))
    layout = "original" if plan.target == "llava_next" else "llava_next"
    with fresh_folder(out, needed, overwrite) as partial:
        if (plan.tokenizer / TOKENIZER_MODEL).is_file():
            copy_files(plan.tokenizer, [Path(TOKENIZER_MODEL)], partial)
        for name, text in plan.files.items():
            (partial / name).write_text(text, encoding="utf-8")
        sidecar = {"layout": layout, "files": read_small_files(source)}
        (partial / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
        if plan.dropped_rows:
            save_file(plan.dropped_rows(), partial / ROWS, metadata={"format": "pt"})
        write_shards(partial, planned, plan.read, max_shard_gb, what=f"to {plan.target}")
        if plan.target == "llava_next":
            check_folder(partial)
