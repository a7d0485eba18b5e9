"""What the demo's tests have in common: rows, an adapter with an effect, a recipe, and the two models."""

from __future__ import annotations

import pytest
import yaml

from helpers.recipes import photo_rows, random_model, recipe, write_rows
from helpers.serving import random_adapter
from llava_orpo.demo import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, an adapter with an effect, and a recipe that names them."""
    folder = tmp_path_factory.mktemp("demo")
    write_rows(folder, photo_rows(3, 2))
    random_adapter(random_model(), folder / "adapter")
    keys = recipe(folder, {"eval_dataset": "rows", "finetuning_type": "lora"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return folder


@pytest.fixture(scope="module")
def keys(folder):
    return yaml.safe_load((folder / "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def candidates(folder, keys):
    """(base, aligned), loaded here."""
    return models.load_candidates(keys, str(folder / "adapter"), str(folder / "out"))
