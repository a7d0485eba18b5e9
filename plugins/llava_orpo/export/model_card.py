"""The model card of a merged model or an adapter."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import keys, loss_keys
from ..checkpoint.adapter import ADAPTER_FILE
from ..errors import UserError
from ..files import write_atomic
from ..preference.records import HISTORY, read_history

# What a dataset's publisher says on its card; for other datasets the licence has to be given with licence=.
DATA = {
    "openbmb/RLAIF-V-Dataset": ("cc-by-nc-4.0", "CC BY-NC 4.0 (no commercial use)"),
    "openbmb/RLHF-V-Dataset": ("cc-by-nc-4.0", "CC BY-NC 4.0 (no commercial use)"),
}
BASES = {
    "llava-hf/llava-v1.6-mistral-7b-hf": "Apache 2.0",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "LLaMA 2 Community License",
    "llava-hf/llava-v1.6-vicuna-13b-hf": "LLaMA 2 Community License",
    "llava-hf/llava-v1.6-34b-hf": "Apache 2.0",
}
TRAINED_WITH = "trained_with.yaml"  # in a run's folder: its recipe and where its data is from
NOT_UPLOADED = ["checkpoint-*", "*.jsonl", "images/*", "*.png", "training_args.bin", "*.partial", ".*", TRAINED_WITH]


def is_stock(readme: Path) -> bool:
    """Whether a README.md is the template that PEFT or the Trainer writes beside an adapter, and no one's own text."""
    text = readme.read_text(encoding="utf-8")
    return (
        "[More Information Needed]" in text
        or "has been generated automatically according to" in text
        or MADE_BY in text
    )


MADE_BY = "<!-- Written by scripts/model_card.py of LLaVA-ORPO. -->"


def sources(recipe: dict[str, Any], registry: dict[str, dict]) -> dict[str, str]:
    """{registered name: Hub id or file} of the recipe's training sets. Raises UserError for an unregistered name."""
    found = {}
    for name in str(recipe["dataset"]).split(","):
        name = name.strip()
        if name not in registry:
            raise UserError(f"The recipe trains on {name!r}, which dataset_info.json does not hold.")
        entry = registry[name]
        found[name] = entry.get("hf_hub_url") or Path(entry["file_name"]).name
    return found


def make_card(
    name: str,
    recipe: dict[str, Any],
    recipe_name: str,
    data: dict[str, str],
    history: list[dict],
    adapter: bool = False,
    licence: str | None = None,
    origin: str = "",
) -> str:
    """The text of the card. name: the Hub address, or a short name; history: entries of preference_eval.json.

    origin: the section that says what the weights were made from (`made_from`).
    """
    base = str(recipe["model_name_or_path"])
    hub_base = not Path(base).exists() and base.count("/") == 1
    known = [DATA[source] for source in data.values() if source in DATA]
    licence_id = licence or (known[0][0] if known else None)
    meta: dict[str, Any] = {
        "license": licence_id,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": base if hub_base else None,
        "base_model_relation": ("adapter" if adapter else "finetune") if hub_base else None,
        "datasets": sorted({source for source in data.values() if source in DATA}) or None,
        "tags": ["llava_next", "orpo", "preference-optimization", "llama-factory"],
    }
    meta = {key: value for key, value in meta.items() if value is not None}
    method = (recipe.get("preference_loss") or recipe.get("pref_loss") or loss_keys.DEFAULT).upper()
    if recipe.get("preference_loss") not in ("pea", "sft"):
        method += f" (weight {recipe.get('pref_beta', 0.1)})"
    if weight := recipe.get("image_preference"):
        method += f" and an image term ({recipe.get('image_preference_loss', 'odds_ratio')}, weight {weight})"
    bits = recipe.get("quantization_bit")
    full = recipe.get("finetuning_type", "lora") != "lora"
    tuning = "training of all parameters" if full else f"LoRA of rank {recipe.get('lora_rank', 8)}"
    tuning += f" on the {bits}-bit base model" if bits else ""
    parts = [
        "---\n" + yaml.safe_dump(meta, sort_keys=False) + "---",
        f"{MADE_BY}\n\n# {name.split('/')[-1]}",
        f"{base} aligned with {method} by {tuning}, on {', '.join(data)}. "
        + ("This is the adapter; it needs the base model." if adapter else "Adapter and base are merged."),
        *([origin] if origin else []),
        usage(name, adapter, base),
        "## Measured\n\n" + measured(history),
        "## Data and licences\n\n" + licences(base, data, licence),
        f"## Recipe\n\n`llamafactory-cli train {recipe_name}` with LLaMA-Factory and the llava_orpo plugin:\n\n"
        "```yaml\n" + yaml.safe_dump(public(recipe), sort_keys=False) + "```",
        "## Limits\n\nAligned to prefer the answers that its data marks as more faithful to the image. It still "
        "invents things, and was not tested for safety. Preference accuracy says which of two given answers the model "
        "finds likelier, not how often its own answers are right.",
    ]
    return "\n\n".join(parts) + "\n"


def merged_card(name: str, base_name: str, base: Path, adapters: Sequence[str | Path]) -> str:
    """The card of a model that is about to be written, from what the folders it is made of say.

    base_name: the folder or Hub id of the base, as the user gave it; base: its folder. adapters: PEFT folders, merged
    one after the other; without any the base itself was trained. Recipe and evaluation are those beside the last one;
    what is not there is said to be unknown.
    """
    trained = Path(adapters[-1]) if adapters else base
    recipe, history = trained_with(trained), evaluation_of(trained)
    origin = made_from(base_name, adapters)
    if recipe is None:
        shown = short(base_name)
        head = yaml.safe_dump({"library_name": "transformers", "pipeline_tag": "image-text-to-text"}, sort_keys=False)
        parts = [
            f"---\n{head}---",
            f"{MADE_BY}\n\n# {name.split('/')[-1]}",
            f"{shown} and what was trained on it, merged. The recipe and the data of the training are not known: "
            "`python scripts/model_card.py recipe.yaml folder=…` writes them here.",
            origin,
            usage(name, False, shown),
            "## Measured\n\n" + measured(history),
        ]
        return "\n\n".join(parts) + "\n"
    recipe = public({**recipe, "model_name_or_path": base_name if adapters else recipe["model_name_or_path"]})
    return make_card(name, recipe, "recipe.yaml", data_of(trained), history, origin=origin)


def made_from(base_name: str, adapters: Sequence[str | Path]) -> str:
    """The section that names base and adapters, with the SHA-256 of each adapter's weights."""
    lines = [f"- Base: {short(base_name)}"]
    for folder in map(Path, adapters):
        with (folder / ADAPTER_FILE).open("rb") as file:
            code = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"- Adapter: {folder.resolve().name}, SHA-256 of {ADAPTER_FILE}: `{code}`")
    return "## Made from\n\n" + "\n".join(lines)


def origin_of(readme: Path) -> str:
    """The section `made_from` of a card that is about to be written again; "" if it has none."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    found = re.search(r"^## Made from\n\n(?:- .*\n)+", text, re.MULTILINE)
    return found[0].rstrip() if found else ""


def beside(folder: Path, name: str) -> Path | None:
    """The file of a run, in its folder or, for one of its checkpoints, in the folder above."""
    return next((place / name for place in (folder, folder.resolve().parent) if (place / name).is_file()), None)


def note_training(folder: str | Path, recipe: dict[str, Any]) -> None:
    """Writes into a run's folder the recipe, without secrets, and where its data is from, as its registry says now."""
    registry = Path(str(recipe.get("dataset_dir", "data"))) / "dataset_info.json"
    try:
        data = sources(recipe, json.loads(registry.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, UserError):  # LLaMA-Factory takes data that is registered nowhere, too
        data = {name.strip(): name.strip() for name in str(recipe.get("dataset")).split(",")}
    kept = {key: value for key, value in recipe.items() if not keys.is_secret(key)}
    text = yaml.safe_dump({"recipe": kept, "data": data}, sort_keys=False, allow_unicode=True)
    write_atomic(Path(folder) / TRAINED_WITH, "# What the weights beside this file were trained with.\n" + text)


def trained_with(folder: Path) -> dict[str, Any] | None:
    """The recipe that a training has put into its folder, or None."""
    file = beside(folder, TRAINED_WITH)
    return yaml.safe_load(file.read_text(encoding="utf-8"))["recipe"] if file else None


def data_of(folder: Path) -> dict[str, str]:
    """{registered name: Hub id or file} of the data, as the training has noted it."""
    data = yaml.safe_load(beside(folder, TRAINED_WITH).read_text(encoding="utf-8"))["data"]
    return {short(name): short(source) for name, source in data.items()}


def evaluation_of(folder: Path) -> list[dict]:
    """The run's evaluations, for a checkpoint those up to its step."""
    file = beside(folder, HISTORY)
    history = read_history(file) if file else []
    step = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    return [entry for entry in history if step is None or entry["step"] <= int(step[1])]


def short(name: str) -> str:
    """A Hub id or relative path as it is, the last part of an absolute path."""
    return Path(name).name if os.path.isabs(name) else name


def public(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without secrets, and with absolute paths cut to their last part."""

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(item) for item in value]
        return ",".join(map(short, value.split(","))) if isinstance(value, str) else value

    return {key: cut(value) for key, value in recipe.items() if not keys.is_secret(key)}


def usage(name: str, adapter: bool, base: str) -> str:
    """A snippet that loads the model and asks it with the checkpoint's own chat template."""
    load = (
        f'model = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto", device_map="auto")\n'
        f'model = PeftModel.from_pretrained(model, "{name}")\nprocessor = AutoProcessor.from_pretrained("{base}")'
        if adapter
        else f'model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", device_map="auto")\n'
        f'processor = AutoProcessor.from_pretrained("{name}")'
    )
    imports = ("from peft import PeftModel\n" if adapter else "") + "from PIL import Image\n"
    return (
        f"## Use\n\n```python\n{imports}from transformers import AutoModelForImageTextToText, AutoProcessor\n\n{load}\n"
        'content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]\n'
        'prompt = processor.apply_chat_template([{"role": "user", "content": content}])\n'
        'inputs = processor(images=Image.open("photo.jpg").convert("RGB"), text=prompt, return_tensors="pt")\n'
        "out = model.generate(**inputs.to(model.device), max_new_tokens=256, do_sample=False)\n"
        'print(processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n```'
    )


def measured(history: list[dict]) -> str:
    """A table of the last evaluation of each set, beside the one before training (step 0) where there is one."""
    if not history:
        return "No evaluation was given (`evals/preference.py` makes one)."
    rows = [
        "| set | | pairs | preference accuracy (95 % interval) | margin, nats per token | SFT loss |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name in dict.fromkeys(entry["dataset"] for entry in history):
        entries = [entry for entry in history if entry["dataset"] == name]
        last = entries[-1]
        first = entries[0] if len(entries) > 1 and entries[0]["step"] == 0 and last["step"] > 0 else None
        for label, entry in (("before", first), (f"step {last['step']}" if last["step"] else "this model", last)):
            if entry is not None:
                rows.append(row(name, label, entry["metrics"]))
        for condition in ("grey", "other"):
            if last.get("grounding"):
                shown = "a grey image" if condition == "grey" else "another image"
                rows.append(row(name, f"shown {shown}", last["grounding"][condition]))
    return "\n".join(rows) + (
        "\n\nA pair counts as right when the mean log-prob of the chosen answer is strictly higher than that of the "
        "rejected one."
    )


def row(name: str, label: str, m: dict[str, Any]) -> str:
    """One line of the table."""
    accuracy, low, high = (100 * m[f"preference_accuracy{end}"] for end in ("", "_low", "_high"))
    sft = f"{m['sft_loss']:.3f}" if "sft_loss" in m else ""  # not kept for the grounding conditions
    return (
        f"| {name} | {label} | {m['n']} | {accuracy:.1f} % ({low:.1f} to {high:.1f}) | {m['logps/margin']:+.3f} "
        f"| {sft} |"
    )


def licences(base: str, data: dict[str, str], licence: str | None) -> str:
    """What the base model's and the data's publishers ask of whoever uses these weights."""
    lines = [f"- Base model {base}: {BASES.get(base, 'see its own model card')}."]
    for name, source in data.items():
        terms = DATA[source][1] if source in DATA else licence or "licence not known to this card's writer"
        lines.append(f"- Training data {name} ({source}): {terms}.")
    if any(source in DATA for source in data.values()):
        lines.append("- So these weights are for non-commercial use, whatever the base model's licence allows.")
    return "\n".join(lines)


def push(
    folder: str | Path,
    repository: str,
    private: bool | None = None,
    token: str | None = None,
    keep_card: bool = False,
) -> str:
    """Uploads the folder (not its checkpoints, logs and example images); returns the address.

    private: None leaves it to the Hub's default, and nothing changes for a repository that exists. keep_card: a
    README.md that the repository has already stays.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    keep = keep_card and api.file_exists(repository, "README.md")
    ignored = [*NOT_UPLOADED, *(["README.md"] if keep else [])]
    return str(api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=ignored))
