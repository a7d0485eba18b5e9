"""Recipes and trainers on a small random model, and rows on real photographs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file

from helpers import forks
from helpers.paths import ROOT
from llava_orpo.export import original_files, original_tokenizer
from llava_orpo.tiny import photo_pairs
from llava_orpo.tiny import random_model as random_llava

SMALL = random_llava.Geometry((64, 128, 2, 4, 2), (32, 64, 3, 2), tile=56)
CACHE = ROOT / "outputs" / "test-cache"
SIZES = {"mixed": [(640, 480), (300, 900), (900, 300), (336, 336)], "small": [(300, 200), (200, 300)]}


def random_model(name: str = "small56") -> Path:
    """A random LLaVA-NeXT made once for all test processes: `small56` (56-pixel tiles) or a named geometry."""
    geometry = SMALL if name == "small56" else random_llava.GEOMETRIES[name]
    code = hashlib.sha256()  # a folder that other code made, of another tokenizer for example, is not taken
    for module in (random_llava, original_tokenizer, original_files):
        code.update(Path(module.__file__).read_bytes())
    out = CACHE / f"{name}-{code.hexdigest()[:8]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):
        if not (out / "complete").exists():
            random_llava.write(geometry, out)
            (out / "complete").touch()
    return out


def other_model(folder: Path) -> Path:
    """`random_model()` with the LM head moved on by one: every answer token is the next one of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in random_model().iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(random_model() / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    save_file({**weights, head: weights[head].roll(1, 0)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def photo_rows(images: int, pairs_per_image: int, aspect: str = "small") -> list[dict]:
    """RLAIF-V rows on photographs with unequal response lengths."""
    return photo_pairs.rows(images, pairs_per_image, 8, 5, sizes=SIZES[aspect])


def write_rows(folder: Path, rows: list[dict], name: str = "rows") -> None:
    """Writes rows.parquet and a dataset_info.json that registers it as `rows`."""
    photo_pairs.write(folder / f"{name}.parquet", rows)
    info_path = folder / "dataset_info.json"
    info = json.loads(info_path.read_text()) if info_path.exists() else {}
    info[name] = {"file_name": f"{name}.parquet", "formatting": "rlaif_v", "ranking": True}
    info_path.write_text(json.dumps(info))


def recipe(folder: Path, keys: dict) -> dict:
    """A complete ORPO recipe on the small model and `rows`."""
    return {
        "plugins": "llava_orpo",
        "model_name_or_path": str(random_model()),
        "stage": "dpo",
        "do_train": True,
        "pref_loss": "orpo",
        "pref_beta": 0.1,
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "llava_v16_mistral",
        "cutoff_len": 4096,
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "seed": 0,
        **keys,
    }


def build_trainer(folder: Path, keys: dict):
    """The trainer that `llamafactory-cli train` would call `train()` on."""
    from llamafactory.hparams import get_train_args

    from llava_orpo.integration.run import current
    from llava_orpo.training import workflow

    *arguments, _ = get_train_args(recipe(folder, keys))
    trainer = workflow.build(current(), *arguments)
    trainer.accelerator.free_memory()
    return trainer


def tokenized(folder: Path, keys: dict):
    """(train rows, eval rows or None) as a training gets them, without loading the model."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from llava_orpo.integration.run import current
    from llava_orpo.training import workflow

    model_args, data_args, training_args, finetuning_args, _ = get_train_args(recipe(folder, keys))
    workflow.check(current(), model_args, data_args, training_args, finetuning_args)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    out = workflow.read_rows(current(), template, module, model_args, data_args, training_args)
    return out["train_dataset"], out.get("eval_dataset")


def run_cli(*words: str, env: dict | None = None, check: bool = True, timeout: int = 600, fresh: bool = False):
    """Runs `llamafactory-cli …` of this environment from the repository's root; returns the finished process.

    fresh: start the real program, in place of a fork that has imported everything; always where torchrun starts it.
    """
    programs = Path(sys.executable).parent
    command = [str(programs / "llamafactory-cli"), *map(str, words)]
    fresh = fresh or "FORCE_TORCHRUN" in (env or {})
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **(env or {})}  # it starts torchrun by name
    if fresh:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    else:
        with tempfile.TemporaryDirectory() as folder:
            done = forks.run(command, env, Path(folder), timeout)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def write_recipe(folder: Path, keys: dict, **more) -> Path:
    """recipe.yaml with the keys of `recipe` (or exactly `keys` with plain=True)."""
    import yaml

    content = keys if more.get("plain") else recipe(folder, keys)
    path = folder / f"{more.get('name', 'recipe')}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def step(trainer, features):
    """(loss, logged terms, gradients by parameter name) of one training micro-batch, no optimizer step."""
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(trainer.data_collator([dict(f) for f in features]))
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    trainer.accelerator.backward(loss)
    gradients = {n: p.grad.detach().double() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), metrics, gradients
