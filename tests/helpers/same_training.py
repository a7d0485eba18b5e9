"""Small trainings that must come out the same however many processes run them, and the comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.recipes import photo_rows, recipe, write_rows

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
IN_PARTS = {**TWO, "max_tokens_per_step": 135}  # a pair with an image has about 126, a text-only pair 50
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


def assert_same(one: Path, other: Path, tolerance: float = 1e-4, norms: bool = True) -> float:
    """Compares logs, and adapters relative to the largest weight of their kind (Adam makes rounding errors larger).

    norms: whether the logged gradient norms are of the whole gradient (FSDP1 logs each process's own part on CPUs).
    Returns the largest difference of an adapter's weight, relative to the largest weight of its kind.
    """
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
        for key in ("loss", "sft_loss", "rewards/accuracies", "logps/chosen", "odds_ratio_loss", "grad_norm")[
            : 5 + norms
        ]:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4), (key, a, b)
    return worst
