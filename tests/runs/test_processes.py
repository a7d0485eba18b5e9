"""Two processes train what one does: ragged epochs, text-only pairs, bad images, a trained vision tower, resuming."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.ranks import train, train_on_processes
from helpers.recipes import photo_rows, recipe, write_rows

pytestmark = pytest.mark.slow

KEYS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "ddp_timeout": 300,
    "dataloader_num_workers": 0,
}
ONE = {"per_device_train_batch_size": 4}
TWO = {"per_device_train_batch_size": 2}
ACCUMULATED = ["ragged", "bad images alone"]
TWO_ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}


def torn(row: dict) -> dict:
    """The row with a PNG that has a good header and end, and nothing that can be decoded between."""
    out = io.BytesIO()
    Image.open(io.BytesIO(row["image"]["bytes"])).save(out, "PNG")
    data = out.getvalue()
    return {**row, "image": {"bytes": data[:60] + bytes(len(data) - 120) + data[-60:], "path": "torn.png"}}


def rows_of(folder: Path) -> dict[str, dict]:
    """Writes the data sets; returns the keys of every case that one and two processes must train alike."""
    photographs = photo_rows(7, 1)
    write_rows(folder, photographs, "seven")
    mixed = [{**row, "image": None} if number in (2, 3, 5, 6) else row for number, row in enumerate(photographs)]
    write_rows(folder, mixed, "mixed")
    write_rows(folder, [*photographs[:6], *map(torn, photo_rows(8, 1)[6:])], "torn")
    write_rows(folder, photo_rows(4, 3), "groups")
    return {
        "ragged": {"dataset": "seven", "num_train_epochs": 2},
        "text-only": {"dataset": "mixed", "num_train_epochs": 2, "allow_text_only": True, "disable_shuffling": True},
        "bad images alone": {"dataset": "torn", "num_train_epochs": 1, "disable_shuffling": True},
        "vision tower": {"dataset": "seven", "max_steps": 2, "lora_target": "all", "freeze_vision_tower": False},
        "grouped": {"dataset": "groups", "num_train_epochs": 3, "group_pairs_by_image": True, "max_pairs_per_image": 3},
    }


def made(folder: Path, name: str, keys: dict) -> dict:
    return recipe(folder, {**KEYS, **keys, "output_dir": str(folder / name)})


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[dict]:
    """The logged terms of every step."""
    return [line for line in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in line]


def assert_same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Compares logs, and adapters relative to the largest weight of their kind (Adam makes rounding errors larger)."""
    left, right = adapter(one), adapter(other)
    assert left.keys() == right.keys()
    scale = {kind: max(t.abs().max() for n, t in left.items() if kind in n).item() for kind in ("lora_A", "lora_B")}
    worst = max(
        (right[name] - tensor).abs().max().item() / scale["lora_B" if "lora_B" in name else "lora_A"]
        for name, tensor in left.items()
    )
    assert worst <= tolerance
    logs = [losses(folder) for folder in (one, other)]
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs, strict=True):
        assert a["epoch"] == b["epoch"] and a["step"] == b["step"]
        for key in ("loss", "sft_loss", "rewards/accuracies", "logps/chosen", "odds_ratio_loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4), (key, a, b)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every case on one process, and on two with and without accumulation."""
    folder = tmp_path_factory.mktemp("processes")
    cases = rows_of(folder)
    for name, keys in cases.items():
        train(made(folder, f"{name}/one", {**keys, **ONE}))
    recipes = [made(folder, f"{name}/two", {**keys, **TWO}) for name, keys in cases.items()]
    recipes += [made(folder, f"{name}/accumulated", {**cases[name], **TWO_ACCUMULATED}) for name in ACCUMULATED]
    saved = {**cases["grouped"], **TWO, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    recipes.append(made(folder, "resumed/cut", {**saved, "max_steps": 4}))  # in the middle of the second epoch
    resumed = {**cases["grouped"], "resume_from_checkpoint": str(folder / "resumed/cut/checkpoint-4")}
    recipes.append(made(folder, "resumed/two", {**resumed, **TWO}))
    printed = train_on_processes(folder, recipes, 2, LLAMAFACTORY_VERBOSITY="INFO")
    train(made(folder, "resumed/one", {**resumed, **ONE}))
    return folder, printed


CASES = ["ragged", "text-only", "bad images alone", "vision tower", "grouped"]


@pytest.mark.parametrize("case, way", [(c, "two") for c in CASES] + [(c, "accumulated") for c in ACCUMULATED])
def test_two_processes_train_what_one_does(trained, case, way):
    folder, _ = trained
    assert_same(folder / case / "one", folder / case / way)


def test_every_pair_of_a_ragged_epoch_weighs_the_same(trained):
    """The second step of the epoch has three pairs: its terms are the means of three, whoever ran them."""
    folder, _ = trained
    assert [line["step"] for line in losses(folder / "ragged" / "two")] == [1, 2, 3, 4]


def test_bad_images_alone_neither_log_zeros_nor_count(trained):
    folder, _ = trained
    for way in ("one", "two", "accumulated"):
        last = losses(folder / "bad images alone" / way)[-1]  # four pairs: two of them can't be decoded
        assert last["loss"] > 5 and last["logps/chosen"] < -5
        files = (folder / "bad images alone" / way).glob("skipped_rows*.jsonl")  # each process has its own
        skipped = [line for file in files for line in file.read_text().splitlines()]
        assert len(skipped) == 2 and all("bad image" in line for line in skipped)


def test_what_llava_never_reads_of_a_trained_vision_tower_is_frozen_and_named(trained):
    folder, printed = trained
    assert "parameters of the vision tower are frozen, because LLaVA never reads" in printed
    last = [t for name, t in adapter(folder / "vision tower" / "two").items() if "vision" in name and "lora_B" in name]
    assert any(tensor.abs().max() > 0 for tensor in last)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_a_grouped_run_cut_in_its_second_epoch_goes_on_where_it_stopped(trained, processes):
    """On as many processes as before, and on another number with the same global batch."""
    folder, _ = trained
    whole, resumed = folder / "grouped" / "two", folder / "resumed" / processes
    left, right = adapter(whole), adapter(resumed)
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=2e-4, atol=2e-6)
    ahead, after = losses(whole), losses(resumed)
    assert [line["step"] for line in ahead] == list(range(1, 10))
    assert [line["loss"] for line in after][-5:] == pytest.approx([line["loss"] for line in ahead][4:], abs=2e-4)
