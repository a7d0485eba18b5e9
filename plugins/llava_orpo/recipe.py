"""A command's recipe: the YAML file, its overrides, the command's own keys, and the model it names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def read_recipe(argv: Sequence[str], own_keys: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(recipe, the script's own keys) from `recipe.yaml key=value …`, as llamafactory-cli reads them.

    own_keys: the script's keys with their defaults. Raises SystemExit with the usage for a missing recipe.
    """
    if not argv or argv[0] in ("-h", "--help") or not argv[0].endswith((".yaml", ".yml")):
        keys = " ".join(f"[{key}={'' if value is None else value}]" for key, value in own_keys.items())
        raise SystemExit(f"usage: python {sys.argv[0]} recipe.yaml [any recipe key=value …] {keys}")
    if not Path(argv[0]).is_file():
        raise SystemExit(f"There is no recipe {argv[0]}.")
    bad = [word for word in argv[1:] if "=" not in word]
    if bad:
        raise SystemExit(f"Overrides are written key=value; got {' '.join(bad)}.")
    merged = OmegaConf.merge(OmegaConf.load(argv[0]), OmegaConf.from_cli(list(argv[1:])))
    recipe = OmegaConf.to_container(merged)
    own = {key: recipe.pop(key, default) for key, default in own_keys.items()}
    return recipe, own


def model_label(recipe: dict[str, Any]) -> str:
    """A short name for the model a recipe loads, usable as a folder name."""
    name = Path(str(recipe["model_name_or_path"]).rstrip("/")).name
    if recipe.get("adapter_name_or_path"):
        adapters = recipe["adapter_name_or_path"]
        adapters = adapters.split(",") if isinstance(adapters, str) else adapters
        name += "+" + "+".join(Path(str(adapter).rstrip("/")).name for adapter in adapters)
    return name + (f"-{recipe['quantization_bit']}bit" if recipe.get("quantization_bit") else "")


def with_model(recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """The recipe with another model: `base` (no adapter), an adapter folder, or a model folder or Hub id."""
    recipe = dict(recipe)
    recipe.pop("adapter_name_or_path", None)
    if model == "base":
        return recipe
    if (Path(model) / "adapter_config.json").is_file():
        return {**recipe, "adapter_name_or_path": model, "finetuning_type": "lora"}
    return {**recipe, "model_name_or_path": model}
