"""The recipes of the family: each tiny twin trains two steps and evaluates, in this process, on a random model."""

from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.paths import ROOT
from helpers.recipes import build_trainer, photo_rows, random_model, write_rows
from llava_orpo import loss_keys
from llava_orpo.recipe import load

NAMES = ("simpo", "dpo", "mdpo", "dpo_context", "pea", "orpo_image", "sft_chosen")
CONTEXT = "There is a photograph of a woman."


def tiny(name: str) -> dict:
    return load(ROOT / "recipes" / "tiny" / f"llava16_{name}.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with photograph pairs, registered as `rows`, half of them with a context."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, photo_rows(4, 1))
    table = pq.read_table(folder / "rows.parquet")
    contexts = pa.array([CONTEXT, "", CONTEXT, None], pa.string())
    pq.write_table(table.append_column("context", contexts), folder / "rows.parquet")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_has_the_same_keys_and_none_contradicts_another(name):
    large, small = load(ROOT / "recipes" / f"llava16_{name}.yaml"), tiny(name)
    assert large.keys() == small.keys()
    assert loss_keys.problems(large) == loss_keys.problems(small) == []
    for key in ("preference_loss", "image_preference_loss", "damaged_image", "reference", "text_margin"):
        assert large.get(key) == small.get(key), key


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_recipe_trains_and_evaluates(name, folder, tmp_path):
    recipe = tiny(name)
    made_for_the_test = {
        "pref_loss": None,  # the helper's own recipe has one
        "model_name_or_path": str(random_model()),
        "dataset_dir": str(folder),
        "dataset": "rows",
        "eval_dataset": "rows",
        "cutoff_len": 4096,
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "eval_steps": 2,
        "warmup_ratio": 0.0,
        "save_strategy": "no",
        "plot_loss": False,
    }
    trainer = build_trainer(tmp_path, {**recipe, **made_for_the_test})
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 2 and all(math.isfinite(value) for entry in log for value in entry.values())
    assert {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert ("grounding/margin" in log[0]) == loss_keys.runs_damaged(recipe)
    assert ("rewards/margins" in log[0]) == (name != "sft_chosen")
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_preference_accuracy" in entry]
    assert evaluated["eval_n"] == 4  # the rejected answers are scored here, by SFT too
