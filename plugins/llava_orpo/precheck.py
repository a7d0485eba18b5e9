"""What is wrong with a recipe, found before anything heavy is imported: keys, values, datasets, files, precision.

Everything is looked up on this machine; no request is sent for a Hub id or a dataset of the Hub.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import accelerator, keys, loss_keys
from .checkpoint import complete

DATASET_INFO = "dataset_info.json"
OUTPUTS = "outputs"  # the recipes write there: a name below it is a folder, although `outputs/x` could be a Hub id
# Registry keys under which LLaMA-Factory looks for a dataset elsewhere than in dataset_dir.
REMOTE_ENTRIES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
LEAST_FREE = 5e7  # bytes
TRAINING_KEYS = "TrainingArguments"  # the class whose keys `train` alone takes
REMOTE_CODE = (
    "trust_remote_code: true is not allowed with plugins: llava_orpo, because it runs code of whoever wrote the model "
    "folder; LLaVA-1.6 needs none. Leave it out."
)
# With which words of `recompute` these keys of LLaMA-Factory agree.
CHECKPOINTING = {"disable_gradient_checkpointing": ("none", "0", "auto"), "gradient_checkpointing": ("all", "auto")}
VLLM_BACKEND = (
    "infer_backend: vllm is not taken: LLaMA-Factory 0.9.5 wants vllm 0.11 at most, which this environment has not; "
    "serve through vLLM itself (bash scripts/serve.sh, docs/serving.md), or set `infer_backend: huggingface`."
)
NEEDED = {"export": ("model_name_or_path", "export_dir")}


def problems(
    recipe: Mapping[str, Any],
    command: str = "train",
    uses: Collection[str] | None = None,
    also_known: Collection[str] = (),
) -> list[str]:
    """One sentence per problem of `recipe`, [] if it is good. Values are to be as `recipe.as_meant` gives them.

    command: LLaMA-Factory's command that takes the recipe. uses: the keys whose files must exist (default: all).
    also_known: further keys that may be suggested for a misspelt one.
    """
    found = _key_problems(recipe, command, also_known)
    if command == "train" and not found:  # else a value may not be of its type
        found += loss_keys.problems(recipe)
    for key in NEEDED.get(command, ("model_name_or_path",)):
        if recipe.get(key) is None:
            found.append(f"{key} is missing.")
    for key, check in CHECKS.items():
        if recipe.get(key) not in (None, False, "") and (uses is None or key in uses):
            found += check(key, recipe)
    return found


def looks_local(name: str) -> bool:
    """Whether a model's name is meant as a folder of this machine rather than as the id of a Hub repository."""
    if name.startswith((".", "~", os.sep)):
        return True
    first, *rest = Path(name).parts or ("",)
    return len(rest) > 1 or (len(rest) == 1 and (first == OUTPUTS or Path(first).is_dir()))


def _key_problems(recipe: Mapping[str, Any], command: str, also_known: Collection[str]) -> list[str]:
    known = keys.known()
    if command != "train":
        known = {key: schema for key, schema in known.items() if schema["$comment"] != TRAINING_KEYS}
    found = []
    for key, value in recipe.items():
        if key in known:
            found.append(keys.problem(key, value, known[key]))
        elif key in keys.known():
            found.append(f"`{key}` is a key of `llamafactory-cli train`; `{command}` does not take it.")
        elif not extra_keys_are_allowed():
            found.append(keys.unknown(str(key), {*known, *also_known}))
    return [sentence for sentence in found if sentence]


def extra_keys_are_allowed() -> bool:
    """Whether a switch of LLaMA-Factory is on under which it takes keys that the schema does not know."""
    return any(os.environ.get(name, "0").lower() in ("true", "y", "1") for name in ("ALLOW_EXTRA_ARGS", "USE_MCA"))


def _model(key: str, recipe: Mapping[str, Any]) -> list[str]:
    name = recipe[key]
    if not isinstance(name, str) or not (looks_local(name) or Path(name).exists()):
        return []
    folder = Path(name)
    if not folder.is_dir():
        return [f"{key}: there is no folder {name}."]
    if (folder / "config.json").is_file():
        return []
    if (folder / "adapter_config.json").is_file():
        return [f"{key}: {name} holds an adapter; name it with adapter_name_or_path and its base model with {key}."]
    return [f"{key}: {name} holds no config.json, so it is not a model folder."]


def _adapters(key: str, recipe: Mapping[str, Any]) -> list[str]:
    found = []
    for name in names(recipe[key]):
        if not (looks_local(name) or Path(name).exists()):
            continue
        if not Path(name).is_dir():
            found.append(f"{key}: there is no folder {name}.")
        elif not (Path(name) / "adapter_config.json").is_file():
            whole = (Path(name) / "config.json").is_file()
            hint = "name a whole model with model_name_or_path" if whole else "training writes one at its end"
            found.append(f"{key}: {name} holds no adapter_config.json, so it is not an adapter; {hint}.")
    return found


def _datasets(key: str, recipe: Mapping[str, Any]) -> list[str]:
    folder = recipe.get("dataset_dir", keys.known()["dataset_dir"]["default"])
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return []
    registry = Path(folder) / DATASET_INFO
    if not registry.is_file():
        return [f"dataset_dir: there is no {registry}, in which datasets are registered."]
    try:
        entries = json.loads(registry.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{registry} is not JSON: {error}."]
    return [sentence for name in names(recipe[key]) if (sentence := _dataset_problem(key, name, entries, registry))]


def _dataset_problem(key: str, name: str, entries: Mapping[str, Any], registry: Path) -> str | None:
    if name not in entries:
        near = keys.nearest(name, entries)
        hint = f"did you mean `{near}`?" if near else f"it names {', '.join(sorted(entries))}."
        return f"{key}: {name} is not registered in {registry}; {hint}"
    entry = entries[name]
    if not isinstance(entry, dict) or any(remote in entry for remote in REMOTE_ENTRIES):
        return None
    if "file_name" not in entry:
        return f"{registry}: {name} has no file_name and no address of a Hub."
    path = Path(os.path.normpath(registry.parent / entry["file_name"]))
    return None if path.exists() else f"{key}: {path}, the data of {name}, does not exist (registered in {registry})."


def _file(key: str, recipe: Mapping[str, Any]) -> list[str]:
    name = recipe[key]
    is_path = isinstance(name, str) and (name.endswith(".json") or os.sep in name)  # DeepSpeed also takes base64
    return [f"{key}: there is no file {name}."] if is_path and not Path(name).is_file() else []


def _accelerator_config(key: str, recipe: Mapping[str, Any]) -> list[str]:
    """A file that is not there, and what `training.checks.refuse_unsupported_loading` would refuse later."""
    config = recipe[key]
    if isinstance(config, str) and (missing := _file(key, recipe)):
        return missing
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8") if Path(config).is_file() else config)
        except ValueError as error:
            return [f"{key}: {recipe[key]} is not JSON: {error}."]
    if isinstance(config, dict) and config.get("dispatch_batches"):
        return [f"{key}: dispatch_batches: true can't send packed batches to other processes; leave it out."]
    return []


def _folder(key: str, recipe: Mapping[str, Any]) -> list[str]:
    name = recipe[key]
    return [f"{key}: there is no folder {name}."] if isinstance(name, str) and not Path(name).is_dir() else []


def _checkpoint(key: str, recipe: Mapping[str, Any]) -> list[str]:
    missing = _folder(key, recipe)
    if missing or not isinstance(recipe[key], str):
        return missing
    lacking = complete.problem(recipe[key])
    return [incomplete_checkpoint(recipe[key], lacking)] if lacking else []


def incomplete_checkpoint(folder: str, lacking: str) -> str:
    """The sentence that refuses to go on from a checkpoint that is not whole."""
    before = complete.newest_whole(Path(folder).absolute().parent)
    remedy = f"name {before}" if before else "leave the key out"
    return f"resume_from_checkpoint: {folder} is incomplete ({lacking}); {remedy}."


def _output_dir(key: str, recipe: Mapping[str, Any]) -> list[str]:
    """A folder that cannot be made or written into, or whose disk holds not even an adapter.

    Root may write everywhere but on a read-only file system.
    """
    if not recipe.get("do_train"):
        return []
    existing = folder = Path(str(recipe[key])).expanduser()
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return [f"{key}: {existing} is a file, not a folder; name another folder."]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{key}: {folder} cannot be written, {existing} is read-only for this user; name another folder."]
    free = shutil.disk_usage(existing).free  # `scripts/check.py` compares with what the recipe will write
    return [f"{key}: only {free / 1e6:.0f} MB are free at {existing}; make room."] if free < LEAST_FREE else []


def recompute_problems(recipe: Mapping[str, Any]) -> list[str]:
    """What LLaMA-Factory's own keys contradict in `recompute`; `auto` gives way to them."""
    wanted = str(recipe.get("recompute", "auto"))
    return [
        f"recompute: {wanted} contradicts {key}: true; leave one of them out."
        for key, words in CHECKPOINTING.items()
        if recipe.get(key) is True and wanted not in words
    ]


def _recompute(key: str, recipe: Mapping[str, Any]) -> list[str]:
    found, config = recompute_problems(recipe), Path(str(recipe.get("model_name_or_path"))) / "config.json"
    if not isinstance(recipe[key], int) or not config.is_file():
        return found
    with suppress(ValueError, AttributeError):
        layers = json.loads(config.read_text(encoding="utf-8")).get("text_config", {}).get("num_hidden_layers")
        if layers is not None and recipe[key] > layers:
            found.append(too_many_layers(recipe[key], layers))
    return found


def too_many_layers(wanted: int, layers: int) -> str:
    """The sentence that refuses to recompute more decoder layers than the model has."""
    return f"recompute: {wanted} is more than the model's {layers} decoder layers; set `recompute: all`."


def _precision(key: str, recipe: Mapping[str, Any]) -> list[str]:
    if recipe[key] is not True or recipe.get("use_cpu") is True or not accelerator.only_nvidia():
        return []
    capabilities = accelerator.compute_capabilities()
    if capabilities is None:
        return []
    if not capabilities:
        return [f"{key}: true needs a GPU, and this machine has none; set `{key}: false`."]
    oldest = min(capabilities)
    if key != "fp16" and oldest < accelerator.BF16_SINCE:
        hint = f"`{key}: false`" + (" and `fp16: true`" if key == "bf16" else "")
        return [f"{key}: true needs a GPU of compute capability 8.0, this one has {oldest[0]}.{oldest[1]}; set {hint}."]
    return []


def names(value: Any) -> list[str]:
    """The names in `a,b` or in a list."""
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [str(name).strip() for name in names]


def _export_dir(key: str, recipe: Mapping[str, Any]) -> list[str]:
    """What the plugin's own export would refuse after it has loaded the model (`checkpoint.files.check_output`)."""
    folder = Path(str(recipe[key])).expanduser()
    if recipe.get("export_quantization_bit") or recipe.get("overwrite_export_dir"):
        return []
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    return [f"{key}: {folder} already holds files; name another folder, or set `overwrite_export_dir: true`."]


def _remote_code(key: str, recipe: Mapping[str, Any]) -> list[str]:
    return [REMOTE_CODE]


def _infer_backend(key: str, recipe: Mapping[str, Any]) -> list[str]:
    return [VLLM_BACKEND] if recipe[key] == "vllm" else []


CHECKS: dict[str, Callable[[str, Mapping[str, Any]], list[str]]] = {
    "model_name_or_path": _model,
    "adapter_name_or_path": _adapters,
    "dataset": _datasets,
    "eval_dataset": _datasets,
    "export_dir": _export_dir,
    "media_dir": _folder,
    "output_dir": _output_dir,
    "resume_from_checkpoint": _checkpoint,
    "deepspeed": _file,
    "fsdp_config": _file,
    "accelerator_config": _accelerator_config,
    "bf16": _precision,
    "pure_bf16": _precision,
    "fp16": _precision,
    "recompute": _recompute,
    "infer_backend": _infer_backend,
    "trust_remote_code": _remote_code,
}
