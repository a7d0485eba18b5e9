"""Secrets of the environment and of a recipe reach no file: logs, checkpoints, W&B's folder, report, model card."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers.paths import ROOT
from helpers.recipes import photo_rows, recipe, run_cli, write_rows
from llava_orpo import keys, precheck
from llava_orpo import recipe as recipes
from llava_orpo.arguments import PluginArguments
from llava_orpo.errors import UserError
from llava_orpo.export import model_card
from llava_orpo.integration.run import Run
from llava_orpo.training import secrets

VARIABLES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
)
IN_RECIPE = ("hf_hub_token", "ms_hub_token", "om_hub_token", "swanlab_api_key", "swanlab_lark_secret")


def planted(name: str) -> str:
    return f"hf_planted{name.replace('_', '').lower()}0123456789abcdef"[:40].ljust(40, "0")


def leaks(folder: Path, needles: dict[str, str]) -> list[str]:
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        found += [f"{name} in {file}" for name, secret in needles.items() if secret.encode() in data]
    return found


@pytest.mark.slow
def test_planted_secrets_reach_no_file(tmp_path):
    write_rows(tmp_path, photo_rows(6, 1))
    content = recipe(tmp_path, {name: planted(name) for name in IN_RECIPE})
    content.update(eval_dataset="rows", do_eval=True, max_steps=2, save_steps=1, logging_steps=1, report_to="wandb")
    content.update(
        finetuning_type="lora", lora_target="q_proj,v_proj", lora_rank=4, swanlab_lark_webhook_url=planted("w")
    )
    content.update(hub_token=planted("HF_TOKEN"), cache_dir=str(tmp_path / "cache"))
    private = tmp_path / "private"
    private.mkdir()
    path = private / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    variables = {name: planted(name) for name in VARIABLES}
    logged = tmp_path / "logged"
    logged.mkdir()
    env = {**variables, "WANDB_MODE": "offline", "WANDB_DIR": str(logged), "LLAMAFACTORY_VERBOSITY": "INFO"}
    done = run_cli("train", path, env=env)
    (logged / "output.txt").write_text(done.stdout + done.stderr)
    whole = {**os.environ, **env}
    for words in (
        ["evals/report.py", tmp_path / "out"],
        ["scripts/model_card.py", path, f"folder={tmp_path / 'out'}", "licence=mit"],
    ):
        run = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=whole, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        (logged / f"{Path(words[0]).stem}.txt").write_text(run.stdout + run.stderr)
    names = {file.name for file in tmp_path.rglob("*")}
    assert {"training_args.bin", "report.html", "README.md", "trainer_state.json", "preference_eval.json"} <= names
    assert any(name.endswith(".wandb") for name in names)
    path.unlink()
    needles = {**variables, **{name: planted(name) for name in IN_RECIPE}, "webhook": planted("w")}
    assert leaks(tmp_path, needles) == []
    (logged / "proof.txt").write_text(planted("API_KEY"))
    assert leaks(tmp_path, needles), "the search finds what is there"


def test_secrets_are_put_away(monkeypatch):
    from llamafactory.hparams import FinetuningArguments

    monkeypatch.delenv("HF_TOKEN", raising=False)
    training_args = SimpleNamespace(hub_token="one")
    finetuning_args = FinetuningArguments(swanlab_api_key="a", swanlab_lark_secret="b", swanlab_lark_webhook_url="c")
    run = Run(PluginArguments())
    secrets.put_away(run, training_args, finetuning_args)
    assert training_args.hub_token is None and os.environ["HF_TOKEN"] == "one" == run.variables["HF_TOKEN"]
    assert not {"a", "b", "c"} & set(map(str, vars(finetuning_args).values()))
    secrets.put_away(run, SimpleNamespace(hub_token=None), finetuning_args)
    with pytest.raises(UserError, match="hub_token and the variable HF_TOKEN differ") as refused:
        secrets.put_away(run, SimpleNamespace(hub_token="two"), finetuning_args)
    assert "two" not in str(refused.value) and "one" not in str(refused.value)


def test_which_keys_are_secret():
    secret = {name for name in keys.known() if keys.is_secret(name)}
    assert secret >= {*IN_RECIPE, "hub_token", "swanlab_lark_webhook_url"}
    assert not secret & {"max_new_tokens", "add_tokens", "split_special_tokens", "dataset", "hub_model_id"}
    assert model_card.public({name: "x" for name in secret} | {"seed": 1}) == {"seed": 1}
    complaint = keys.refusal("hf_hub_token", ["very-secret"], keys.known()["hf_hub_token"])
    assert "very-secret" not in complaint and "hf_hub_token" in complaint


def test_a_secret_on_the_command_line_is_refused():
    (complaint,) = recipes.check_overrides(["seed=1", "hf_hub_token=abc", "hub_token="])
    assert complaint.startswith("hf_hub_token: a secret on a command line") and "abc" not in complaint


def test_remote_code_is_refused_before_the_model_is_touched(tmp_path):
    from llamafactory.hparams import get_train_args

    write_rows(tmp_path, photo_rows(1, 1))
    keys_given = recipe(tmp_path, {"trust_remote_code": True, "model_name_or_path": str(tmp_path)})
    assert precheck.REMOTE_CODE in precheck.problems(keys_given)
    with pytest.raises(UserError, match="^trust_remote_code: true is not allowed"):
        get_train_args(keys_given)
    words = ["--plugins", "llava_orpo", "--model_name_or_path", "x", "--output_dir", "y", "--trust_remote_code"]
    for more in ([], ["true"]):
        with pytest.raises(UserError, match="^trust_remote_code: true is not allowed"):
            get_train_args([*words, *more])
    assert precheck.REMOTE_CODE not in precheck.problems(recipe(tmp_path, {"trust_remote_code": False}))
