"""Bad rows in whole runs: `bad_rows: error`, and one list whatever the number of ranks, epochs and starts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.corruption import wrong_crc
from helpers.recipes import photo_rows, recipe, run_cli, write_recipe, write_rows
from helpers.serving import picture, png

TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
KEYS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "ddp_find_unused_parameters": False,
}


def write(folder: Path, bad: tuple[int, ...]) -> None:
    """Six rows; the images of `bad` have a good header and end, and broken pixels."""
    rows = photo_rows(6, 1)
    for number in bad:
        rows[number]["image"] = {"bytes": wrong_crc(png(picture(60, 50, seed=number))), "path": None}
    write_rows(folder, rows)


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "skipped_rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_image_that_does_not_decode_stops_the_run_if_the_recipe_says_so(tmp_path):
    write(tmp_path, (2,))
    path = write_recipe(tmp_path, {**KEYS, "num_train_epochs": 1, "bad_rows": "error"})
    done = run_cli("train", path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = re.findall(r"^error: .*", done.stderr, flags=re.M)
    assert re.match(r"error: dataset rows, row 2, pair 2-\w{8}: bad image: .* or set `bad_rows: skip`", line)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.heavy
def test_two_ranks_stop_too(tmp_path):
    write(tmp_path, (2,))
    path = write_recipe(tmp_path, {**KEYS, "num_train_epochs": 1, "bad_rows": "error"})
    done = run_cli("train", path, env=TWO, check=False, timeout=400)
    assert done.returncode == 1
    assert re.search(r"dataset rows, row 2, pair 2-\w{8}: bad image: .* or set `bad_rows: skip`", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.heavy)])
def test_a_bad_image_is_listed_once_for_all_ranks_epochs_and_starts(tmp_path, processes):
    write(tmp_path, (1, 4))
    keys = recipe(tmp_path, {**KEYS, "save_strategy": "epoch", "num_train_epochs": 2})
    first = write_recipe(tmp_path, {**keys, "per_device_train_batch_size": 2 // processes})
    quiet = {"LLAMAFACTORY_VERBOSITY": "WARN"}
    counted = "Left out of this run: 2 pairs (2 when the image was decoded), each listed once in"
    # the second start goes on with one process and twice as many epochs
    again = {"per_device_train_batch_size": 2, "resume_from_checkpoint": True, "num_train_epochs": 4}
    second = write_recipe(tmp_path, {**keys, **again}, name="second")
    for path, env in ((first, TWO if processes == 2 else {}), (second, {})):
        done = run_cli("train", path, env={**env, **quiet})
        assert (done.stdout + done.stderr).count(counted) == 1
        assert sorted((entry["stage"], entry["row"]) for entry in listed(tmp_path)) == [
            ("training", 1),
            ("training", 4),
        ]
        assert not list((tmp_path / "out").glob("skipped_rows.rank*"))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["epoch"] == 4.0 and state["global_step"] == 12
