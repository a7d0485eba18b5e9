"""Checks before a merge whether a LoRA adapter belongs to a base model, from small files and headers alone."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open

from .files import CheckpointError, read_header, read_json, resolve_model_dir, some, tensor_table
from .published import expected_tensors, published_name, read_config

ADAPTER_FILE = "adapter_model.safetensors"
_PART = re.compile(r"\.(lora_A|lora_B)\.weight$|\.(lora_embedding_A|lora_embedding_B|lora_magnitude_vector)$")
_HUB_CACHE = re.compile(r"models--[^/]+--([^/]+)/snapshots/[^/]+/?$")


def check_adapter(adapter_dir: str | Path, base: str | Path) -> None:
    """Raises CheckpointError unless the PEFT adapter in `adapter_dir` can be one of the model `base`.

    base: a folder or a Hub id. Every adapter tensor must fit the base's weight of that name (shapes as the base's
    config.json implies them). If adapter_config.json names another base whose folder still exists, that folder must
    hold the same weights (first rows are compared); otherwise the last part of both names must agree.
    """
    adapter_dir = Path(adapter_dir)
    settings = read_json(adapter_dir / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{adapter_dir} holds a {settings.get('peft_type')} adapter; only LoRA and DoRA are known."
        )
    if not (adapter_dir / ADAPTER_FILE).is_file():
        raise CheckpointError(f"{adapter_dir} has no {ADAPTER_FILE}: not a (whole) adapter folder.")
    base_dir = resolve_model_dir(base)
    shapes = expected_tensors(read_config(base_dir))
    problems = []
    for name, (_, shape) in read_header(adapter_dir / ADAPTER_FILE).items():
        target, wanted = _target(name, shape)
        if target not in shapes:
            problems.append(f"{name}: the base has no weight of that name")
        elif not _fits(wanted, shapes[target]):
            problems.append(f"{name} {shape}: the base's {target} is {shapes[target]}")
    trained_on = settings.get("base_model_name_or_path") or ""
    if problems:
        raise CheckpointError(
            f"The adapter {adapter_dir} was not trained on {base}"
            + (f" but on {trained_on}" if trained_on else "")
            + f": {len(problems)} tensors do not fit. {some(problems, 3)}"
        )
    if trained_on and not _same_base(trained_on, str(base), base_dir):
        raise CheckpointError(
            f"The adapter {adapter_dir} was trained on {trained_on}, not on {base}. If they are the same, "
            f"write the new place into base_model_name_or_path of {adapter_dir / 'adapter_config.json'}."
        )


def _target(name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int | None, ...]]:
    """The published name of the weight an adapter tensor changes, and the shape it asks of it (None: any)."""
    name = name.removeprefix("base_model.model.")
    match = _PART.search(name)
    if match is None:  # modules_to_save: the whole weight
        weight, wanted = name, shape
    else:
        weight = name[: match.start()] + ".weight"
        wanted = {
            "lora_A": (None, shape[-1]),
            "lora_B": (shape[0], None),
            "lora_embedding_A": (shape[-1], None),
            "lora_embedding_B": (None, shape[0]),
            "lora_magnitude_vector": (shape[0], None),
        }[match[1] or match[2]]
    try:
        return published_name(weight), wanted
    except CheckpointError:  # another architecture's module: reported by the caller with the rest
        return weight, wanted


def _fits(wanted: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    return len(wanted) == len(shape) and all(w in (None, s) for w, s in zip(wanted, shape, strict=True))


def _last_part(name: str) -> str:
    cached = _HUB_CACHE.search(name)
    return (cached[1] if cached else Path(name).name).lower()


def _same_base(trained_on: str, base: str, base_dir: Path) -> bool:
    if trained_on == base:
        return True
    other = Path(trained_on).expanduser()
    if other.is_dir() and (other / "config.json").is_file():
        return other.resolve() == base_dir.resolve() or _same_weights(other, base_dir)
    return _last_part(trained_on) == _last_part(base)


def _same_weights(a: Path, b: Path) -> bool:
    """Whether the first row of every weight is equal in both folders."""
    tables = [{published_name(n): (n, *entry) for n, entry in tensor_table(folder).items()} for folder in (a, b)]
    if tables[0].keys() != tables[1].keys():
        return False
    return all(torch.equal(_first_row(a, *tables[0][name]), _first_row(b, *tables[1][name])) for name in tables[0])


def _first_row(folder: Path, name: str, dtype: str, shape: tuple[int, ...], file: str) -> torch.Tensor:
    with safe_open(folder / file, framework="pt") as handle:
        return handle.get_slice(name)[0:1]
