"""scripts/check.py as a user starts it: its table, its exit code, on a machine without GPU, network or login."""

from __future__ import annotations

import check
import pytest

from helpers.commands import exit_code
from helpers.recipes import photo_rows, write_recipe, write_rows

KEYS = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "per_device_train_batch_size": 2}


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_rows(tmp_path, photo_rows(2, 2))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path


def states(printed: str) -> dict[str, str]:
    """{what was looked at: its state}, of the lines of the table."""
    return {line[8:24].strip(): line[:8].strip() for line in printed.splitlines() if line[:8].strip() in STATES}


STATES = ("ok", "warning", "error")


def test_a_good_recipe_ends_with_its_first_batch(place, capsys):
    assert exit_code(check.main, write_recipe(place, KEYS)) == 0
    printed = capsys.readouterr().out
    found = states(printed)
    assert found["memory"] == "warning" and "no GPU is visible" in printed
    assert {key for key, state in found.items() if state == "ok"} >= {
        "keys and files",
        "versions",
        "W&B login",
        "model",
        "template",
        "image tokens",
        "data",
        "lengths",
        "disk",
        "first batch",
    }
    assert "2 pairs," in printed and "prompt '<s> [INST] <image> \\n" in printed and "2 images," in printed
    assert printed.splitlines()[-1] == "0 errors, 1 warnings"


def test_what_would_stop_a_training_is_an_error_with_a_remedy(place, capsys):
    path = write_recipe(place, {**KEYS, "report_to": "wandb", "template": "llava_v16_vicuna"})
    assert exit_code(check.main, path, "learning_rat=1", "dataset_filter={origin_dataset: nowhere}") == 2
    printed = capsys.readouterr().out
    found = states(printed)
    assert found["keys and files"] == "error" and "did you mean `learning_rate`" in printed
    assert found["W&B login"] == "warning" and "WANDB_MODE=offline" in printed
    assert found["template"] == "warning" and "template: llava_v16_mistral" in printed
    assert found["data"] == "error" and "dataset_filter matches no row of rows" in printed
    assert "Traceback" not in printed and printed.splitlines()[-1].startswith("2 errors")
