"""The way in: a recipe's `plugins:` key, its own keys, refusals, and no trace left for plain recipes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from llamafactory.hparams import get_infer_args, get_train_args

from helpers.paths import ROOT
from helpers.recipes import photo_rows, recipe, tokenized, write_rows
from llava_orpo.arguments import PLUGIN_KEYS
from llava_orpo.errors import UserError
from llava_orpo.integration import activation, run, swaps


@pytest.fixture(autouse=True)
def inactive():
    run.deactivate()  # an earlier test of this process may have left its recipe active
    yield
    run.deactivate()


PRISTINE = {(module, name): getattr(importlib.import_module(module), name) for module, name, _ in swaps.SWAPS}


def swapped() -> list[str]:
    """Names of LLaMA-Factory's that are replaced at the moment."""
    return [name for (module, name), value in PRISTINE.items() if getattr(sys.modules[module], name) is not value]


def test_pth_adds_a_finder_and_imports_nothing_heavy():
    code = "import sys; print([type(f).__module__ for f in sys.meta_path], 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "llava_orpo.autoload" in out and "False" in out


def test_only_the_autoload_module_adds_the_finder_and_adds_one():
    code = (
        "import sys; from llava_orpo import autoload; autoload.install(); autoload.install()\n"
        "print(sum(type(f).__module__ == 'llava_orpo.autoload' for f in sys.meta_path))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_recipe_activates_and_plain_recipe_deactivates(tmp_path):
    assert swapped() == []
    get_train_args(recipe(tmp_path, {"anyres_max_tiles": 2}))
    assert run.current().arguments.anyres_max_tiles == 2
    assert len(swapped()) == len(swaps.SWAPS)
    plain = {k: v for k, v in recipe(tmp_path, {}).items() if k not in PLUGIN_KEYS}
    get_train_args({**plain, "template": "llava_next_mistral"})
    assert swapped() == []
    with pytest.raises(RuntimeError, match="not active"):
        run.current()


@pytest.mark.parametrize("end", ["a plain recipe", "deactivate", "another recipe with the plugin"])
@pytest.mark.parametrize("set_before", [{}, {"API_HOST": "0.0.0.0"}, {"WANDB_PROJECT": "mine"}])
def test_environment_variables_are_put_back(tmp_path, monkeypatch, set_before, end):
    """What a recipe sets ends with it; what the user has set stays, during the recipe and after it."""
    for name in ("API_HOST", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch takes off again what a failing test leaves
        monkeypatch.delenv(name)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)

    def variables() -> dict[str, str]:
        return {name: os.environ[name] for name in ("API_HOST", "WANDB_PROJECT") if name in os.environ}

    get_train_args(recipe(tmp_path, {"project": "demo", "report_to": "none"}))
    assert variables() == {"API_HOST": "127.0.0.1", "WANDB_PROJECT": "demo", **set_before}
    if end == "deactivate":
        run.deactivate()
    elif end == "a plain recipe":
        plain = {key: value for key, value in recipe(tmp_path, {}).items() if key not in PLUGIN_KEYS}
        get_train_args({**plain, "template": "llava_next_mistral"})
    else:  # its own project takes the first one's place
        get_train_args(recipe(tmp_path, {"project": "next"}))
        assert variables() == {"API_HOST": "127.0.0.1", "WANDB_PROJECT": "next", **set_before}
        run.deactivate()
    assert variables() == set_before


def test_inference_commands_take_the_plugin_too():
    get_infer_args({"plugins": "llava_orpo", "model_name_or_path": "x", "template": "llava_v16_mistral"})
    assert run.current().arguments.plugins == "llava_orpo"


def test_command_line_without_a_recipe():
    get_infer_args(["--plugins", "llava_orpo", "--anyres_max_tiles", "3", "--model_name_or_path", "x"])
    assert run.current().arguments.anyres_max_tiles == 3


@pytest.mark.parametrize(
    "key, near",
    [
        ("shared_prefx", "shared_prefix"),
        ("learning_rat", "learning_rate"),
        ("group_pairs_by_images", "group_pairs_by_image"),
    ],
)
def test_misspelt_key_names_the_nearest(tmp_path, key, near):
    with pytest.raises(UserError, match=rf"`{key}` \(did you mean `{near}`\?\)"):
        get_train_args(recipe(tmp_path, {key: 1}))


def test_misspelt_plugin_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean `plugins: llava_orpo`"):
        get_train_args(recipe(tmp_path, {"plugins": "lava_orpo"}))


def test_values_are_taken_as_meant_and_checked_for_python_callers_too(tmp_path):
    keys = {"eval_strategy": False, "save_strategy": False, "anyres_max_tiles": "2", "shared_prefix": "no"}
    *_, training_args, finetuning_args, _ = get_train_args(recipe(tmp_path, keys))
    assert (training_args.eval_strategy, training_args.save_strategy) == ("no", "no")
    taken = run.current().arguments
    assert (taken.anyres_max_tiles, taken.shared_prefix) == (2, False)
    with pytest.raises(UserError, match="^grounding_eval: 'flase' is not allowed; it must be true or false.$"):
        get_train_args(recipe(tmp_path, {"grounding_eval": "flase"}))


def test_overrides_of_the_command_line_are_taken_as_meant(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, {})) + "save_strategy: no\n")
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(file), "eval_strategy=no"])
    training_args = get_train_args()[2]
    assert (training_args.eval_strategy, training_args.save_strategy) == ("no", "no")


def test_other_llamafactory_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(activation, "VERSION", "0.9.9")
    with pytest.raises(ValueError, match=r"0\.9\.5, but 0\.9\.9 is installed.*allow_untested_llamafactory"):
        get_train_args(recipe(tmp_path, {}))
    get_train_args(recipe(tmp_path, {"allow_untested_llamafactory": True}))


def test_other_templates_and_models_are_refused(tmp_path):
    write_rows(tmp_path, photo_rows(1, 1))
    with pytest.raises(ValueError, match="llava_next_mistral is not one of the exact LLaVA-1.6 templates"):
        tokenized(tmp_path, {"template": "llava_next_mistral"})
    with pytest.raises(ValueError, match="tokenized_path is not used"):
        tokenized(tmp_path, {"tokenized_path": str(tmp_path / "t")})
    with pytest.raises(ValueError, match="cutoff_len: 99999 is more than the model's 32768 positions"):
        tokenized(tmp_path, {"cutoff_len": 99999})


def test_module_entry_point():
    out = subprocess.run([sys.executable, "-m", "llava_orpo", "version"], capture_output=True, text=True, check=True)
    assert "0.9.5" in out.stdout


@pytest.mark.slow
def test_wheel_carries_the_pth(tmp_path):
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "llava_orpo_autoload.pth" in names and "llava_orpo/integration/__init__.py" in names
    assert "llava_orpo/schema.json" in names and not any(name.startswith("recipes/") for name in names)
