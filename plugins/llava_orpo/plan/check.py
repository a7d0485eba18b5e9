"""Everything about a training that can be known before it starts, as lines with a state and a remedy."""

from __future__ import annotations

import importlib.metadata
import json
import netrc
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import keys, precheck
from ..errors import UserError

OK, WARNING, ERROR = "ok", "warning", "error"
REQUIREMENTS = Path(__file__).parents[3] / "requirements.txt"  # only in a checkout
WANDB_HOST = "api.wandb.ai"


@dataclass(frozen=True)
class Line:
    """One thing that was looked at; `remedy` is empty for ok."""

    what: str
    state: str
    found: str
    remedy: str = ""


def lines(recipe: Mapping[str, Any]) -> Iterator[Line]:
    """The checks in order, each line as soon as it is known. Those that need data or model are left out after errors.

    No weight is loaded. Without a GPU, the Hub or a W&B login the lines say so and the others go on.
    """
    problems = precheck.problems(recipe)
    yield from (Line("keys and files", ERROR, sentence, "change the recipe") for sentence in problems)
    if not problems:
        yield Line("keys and files", OK, "keys, values, files and precision")
    recipe = {key: value for key, value in recipe.items() if key in keys.known()}  # the rest is looked at without them
    yield versions()
    yield wandb_login(recipe)
    if any(recipe.get(key) is None for key in ("model_name_or_path", "dataset", "template")):
        return
    config = None
    for line in _guarded("model and template", lambda: _model(recipe)):
        if isinstance(line, Line):
            yield line
        else:
            config = line
    if config is None:
        return
    yield from _guarded("image tokens", lambda: [_image_tokens(recipe, config)])
    yield from _guarded("data", lambda: _data_and_plan(recipe, config))


def _guarded(what: str, look: Callable[[], Any]) -> Iterator[Any]:
    try:
        yield from look()
    except (UserError, OSError, ValueError) as error:
        yield Line(what, ERROR, str(error).strip().split("\n")[0], "change what the message names")


def versions() -> Line:
    """Installed packages against the versions that were run together."""
    if not REQUIREMENTS.is_file():
        return Line("versions", WARNING, "no requirements.txt beside the package", "compare with the repository's")
    wrong = []
    for name, wanted in re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", REQUIREMENTS.read_text(encoding="utf-8"), re.M):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found.partition("+")[0] != wanted:
            wrong.append(f"{name} {found}, tested {wanted}")
    if wrong:
        return Line("versions", WARNING, "; ".join(wrong), "pip install -r requirements.txt")
    return Line("versions", OK, "as in requirements.txt")


def wandb_login(recipe: Mapping[str, Any]) -> Line:
    """Whether `report_to: wandb` can start without asking."""
    targets = recipe.get("report_to") or []
    targets = [targets] if isinstance(targets, str) else targets
    if not {"wandb", "all"} & set(targets):
        return Line("W&B login", OK, "not used by this recipe")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return Line("W&B login", OK, f"WANDB_MODE={os.environ['WANDB_MODE']}")
    host = os.environ.get("WANDB_BASE_URL", f"https://{WANDB_HOST}").split("//")[-1].strip("/")
    try:
        login = netrc.netrc().authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    if os.environ.get("WANDB_API_KEY") or login:
        return Line("W&B login", OK, "found (not tried)")
    return Line("W&B login", WARNING, "none found", "wandb login, or WANDB_MODE=offline, or report_to=none")


def _model(recipe: Mapping[str, Any]) -> Iterator[Any]:
    from ..checkpoint.published import check_folder
    from ..data.conversation import CONVERSATIONS
    from .sizes import load_config

    name, template = str(recipe["model_name_or_path"]), recipe["template"]
    config, source = load_config(recipe)
    if Path(name).is_dir():
        check_folder(name)
        yield Line("model", OK, f"{name}: llava_next, no tensor missing")
    else:
        yield _on_hub("model", name, "model")
    family = config.get_text_config().model_type
    if template not in CONVERSATIONS:
        yield Line("template", ERROR, f"{template} is not exact", f"template: one of {', '.join(CONVERSATIONS)}")
    elif family not in template and family in ("mistral", "llama"):
        near = [other for other in CONVERSATIONS if family in other]
        remedy = f"template: {near[0]}, if the model was trained with it" if near else "use the model's own template"
        yield Line("template", WARNING, f"{template} on a {family} text model", remedy)
    else:
        yield Line("template", OK, f"{template} on a {family} text model")
    yield config


def _on_hub(what: str, name: str, kind: str) -> Line:
    """Whether a model or dataset that is no local file can be had."""
    from . import hub

    found = hub.find(name, kind)
    if found == hub.CACHED:
        return Line(what, OK, f"{name} is in the Hub cache of this machine")
    if found == hub.ONLINE:
        return Line(what, OK, f"{name} is on the Hub; the first training downloads it")
    if found == hub.ABSENT:
        return Line(what, ERROR, f"the Hub has no {kind} {name} for this login", "correct the name, or `hf auth login`")
    remedy = f"training would stop here: connect, or `hf download {name} --repo-type {kind}` where there is a network"
    return Line(what, WARNING, f"{name} is not here, and the Hub was not reached", remedy)


def _repositories(recipe: Mapping[str, Any]) -> list[str]:
    """The Hub repositories of the recipe's datasets, each once."""
    folder = str(recipe.get("dataset_dir") or keys.known()["dataset_dir"]["default"])
    registry = Path(folder) / precheck.DATASET_INFO
    entries = json.loads(registry.read_text(encoding="utf-8")) if registry.is_file() else {}
    names = [name for key in ("dataset", "eval_dataset") for name in precheck.names(recipe.get(key))]
    return list(dict.fromkeys(entries[name]["hf_hub_url"] for name in names if "hf_hub_url" in entries.get(name, {})))


def _image_tokens(recipe: Mapping[str, Any], config) -> Line:
    from .sizes import HEAD, PHOTO, QUESTION, PairSize, largest

    pair = largest(PairSize(0, 0, *PHOTO, HEAD, QUESTION, 1, 1), config)
    cutoff, room = int(recipe.get("cutoff_len", 2048)), config.get_text_config().max_position_embeddings
    found = f"up to {pair.image:,} image tokens, cutoff_len {cutoff:,}"
    if cutoff > room:
        return Line("image tokens", ERROR, f"cutoff_len {cutoff:,}, {room:,} positions", f"cutoff_len={room}")
    if pair.image + HEAD + QUESTION >= cutoff:
        needed = min(room, -(-(pair.image + 512) // 1024) * 1024)
        return Line("image tokens", WARNING, found, f"cutoff_len={needed}, or fewer anyres_max_tiles")
    return Line("image tokens", OK, found)


def _data_and_plan(recipe: Mapping[str, Any], config) -> Iterator[Line]:
    from . import reading, sizes

    data = rows = module = None
    if sizes.data_is_here(recipe) and Path(str(recipe["model_name_or_path"])).is_dir():
        rows, module = reading.tokenized(recipe)
        data = sizes.sizes_of(rows, recipe, config)
        yield Line("data", OK, f"{data.source} after filters and skipped rows")
        longest = max(pair.tokens for pair in data.sizes)
        yield Line("lengths", OK, f"longest pair {longest:,} tokens of prompt and both answers")
    else:
        repositories = _repositories(recipe)
        yield from (_on_hub("data", name, "dataset") for name in repositories)
        if not repositories:
            remedy = "lengths and batch are read once the model is a folder on this machine"
            yield Line("data", WARNING, "registered files are here; the model is not", remedy)
        data = sizes.assumed(config)
    yield from _plan(recipe, config, data)
    if rows is not None:
        yield _first_batch(recipe, config, rows, module)


def _plan(recipe: Mapping[str, Any], config, data) -> Iterator[Line]:
    import torch

    from . import report
    from .trace import Setting, trace

    on_gpu = torch.cuda.is_available() and not recipe.get("use_cpu")
    longest = report.batches_of(data, recipe, config)[1]
    traced = trace(config, Setting.of(recipe, "cuda" if on_gpu else "cpu", config), longest)
    need = traced.peak + (report.RESERVE if on_gpu else 0)
    found = f"{report.gb(need)} GB computed for the longest batch ({traced.tokens:,} tokens)"
    if not on_gpu:
        yield Line("memory", WARNING, f"{found}; no GPU is visible", "python scripts/plan.py recipe.yaml gpu=NAME")
    else:
        card = torch.cuda.get_device_properties(0)
        fits = need <= card.total_memory
        found += f", {card.name} has {report.gb(card.total_memory)}"
        remedy = "" if fits else "python scripts/plan.py names the keys to change"
        yield Line("memory", OK if fits else ERROR, found, remedy)
    wanted = report.disk(recipe, traced)
    total = wanted["checkpoints kept"] + wanted["each checkpoint"] + wanted["result"]
    folder = Path(str(recipe.get("output_dir") or "."))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{report.gb(total)} GB for checkpoints, {report.gb(free)} GB free at {folder}"
    if free < total:
        yield Line("disk", ERROR, found, "make room, or lower save_total_limit, or move output_dir")
    else:
        yield Line("disk", OK, found)


def _first_batch(recipe: Mapping[str, Any], config, rows, module: Mapping[str, Any]) -> Line:
    """Decodes the first batch as the collator does, without a model."""
    from ..step.collator import SharedPrefixCollator

    size = min(int(recipe.get("per_device_train_batch_size", 8)), len(rows))
    collator = SharedPrefixCollator(
        module["processor"],
        config.image_token_id,
        recipe.get("group_pairs_by_image", False),
        recipe.get("max_pairs_per_image", 4),
    )
    batch = collator([dict(rows[i]) for i in range(size)])
    if batch["bad_images"]:
        return Line("first batch", WARNING, f"bad image: {batch['bad_images'][0][1]}", "verify_images=full finds all")
    pixels = batch["image_inputs"].get("pixel_values")
    row, packed = batch["rows"][0], batch["packed"]
    tiles = (
        "no image" if pixels is None else f"{len(pixels)} images, {pixels.shape[1]} tiles of {pixels.shape[-1]} pixels"
    )
    prompt = module["tokenizer"].decode(row["prompt_ids"])
    found = (
        f"{packed.n_pairs} pairs, {packed.num_tokens:,} tokens, {tiles}; first pair: prompt {prompt!r},"
        f" {len(row['prompt_ids'])} prompt ids, {row['num_image_tokens']} image tokens, answers of"
        f" {len(row['chosen_ids'])} and {len(row['rejected_ids'])} tokens"
    )
    return Line("first batch", OK, found)
