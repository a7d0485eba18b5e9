"""Pairs of LLaMA-Factory's own formats under the plugin: no pair ids, and images that cannot be decoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.recipes import build_trainer, tokenized
from helpers.serving import picture, png
from llava_orpo.errors import UserError

SIDES = ("chosen", "rejected")
LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "dataset": "other",
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 3,
    "disable_shuffling": True,
}


def broken(data: bytes) -> bytes:
    """A PNG whose header and end are whole and whose pixels are not."""
    start = data.index(b"IDAT") + 4
    return data[:start] + bytes(64) + data[start + 64 :]


def write_alpaca(folder: Path, images: list[bytes]) -> list[dict]:
    """Registers `other`: one pair for each image, in the columns of Alpaca, the image's place marked in the text."""
    rows = []
    for i, data in enumerate(images):
        path = folder / f"{i}.png"
        path.write_bytes(data)
        answers = {side: f"{side.capitalize()} answer number {i}." for side in SIDES}
        rows.append({"instruction": f"<image>\nWhat is in picture {i}?", "input": "", **answers, "images": [str(path)]})
    (folder / "other.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "query": "input", "images": "images", **{side: side for side in SIDES}}
    info = {"other": {"file_name": "other.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return rows


def pictures(count: int) -> list[bytes]:
    return [png(picture(90 + 10 * i, 60, seed=i)) for i in range(count)]


def skipped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "skipped_rows.jsonl").read_text().splitlines()]


def test_a_broken_header_is_skipped_with_its_reason(tmp_path):
    images = pictures(4)
    images[2] = b"no image at all"
    rows = write_alpaca(tmp_path, images)
    train, _ = tokenized(tmp_path, {**LORA, "max_skipped_fraction": 1.0})
    assert train["image"] == [rows[i]["images"][0] for i in (0, 1, 3)]
    assert train["question"] == [f"What is in picture {i}?" for i in (0, 1, 3)]
    assert train["pair_id"] == train["dataset"] == train["image_hash"] == [""] * 3
    (entry,) = skipped(tmp_path)
    assert entry["stage"] == "tokenizing" and entry["reason"].startswith("bad image: ")
    assert rows[2]["images"][0] in entry["reason"]


def test_the_share_of_skipped_pairs_is_of_all_pairs(tmp_path):
    images = pictures(4)
    images[2] = b"no image at all"
    write_alpaca(tmp_path, images)
    train, _ = tokenized(tmp_path, {**LORA, "max_skipped_fraction": 0.25})
    assert len(train) == 3
    with pytest.raises(UserError, match=r"1 of 4 pairs \(25.0%\)"):
        tokenized(tmp_path, {**LORA, "max_skipped_fraction": 0.24})


def test_only_the_pair_of_a_broken_image_is_left_out(tmp_path):
    """Of a batch, by its place there: pairs of other formats have no ids that could tell them apart."""
    images = pictures(2)
    write_alpaca(tmp_path, [broken(images[0]), images[1]])
    trainer = build_trainer(tmp_path, {**LORA, "eval_dataset": "other"})
    rows = [trainer.train_dataset[i] for i in range(2)]
    batch = trainer.data_collator(rows)
    assert batch["weights"].tolist() == [0.0, 1.0]
    ((index, reason),) = batch["bad_images"]
    assert index == 0 and reason and batch["rows"] == rows
    other_way = trainer.data_collator(rows[::-1])
    assert other_way["weights"].tolist() == [1.0, 0.0] and other_way["bad_images"] == [(1, reason)]

    trainer.model.eval()
    with torch.no_grad():
        results = [trainer.get_batch_loss_metrics(trainer.model, b) for b in (batch, trainer.data_collator(rows[1:]))]
    (loss, metrics), (alone, metrics_alone) = results
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    weighted = [key for key in metrics if not key.startswith("logits/")]  # a mean over all tokens of the batch
    assert {key: metrics[key] for key in weighted} == pytest.approx(
        {key: metrics_alone[key] for key in weighted}, rel=1e-4
    )

    trainer.evaluate()
    (scored,) = (json.loads(line) for line in (tmp_path / "out" / "preference_pairs.jsonl").read_text().splitlines())
    assert scored["pair_id"] == "row-1"


def test_every_broken_image_is_listed_once(tmp_path):
    images = pictures(3)
    rows = write_alpaca(tmp_path, [broken(images[0]), images[1], broken(images[2])])
    trainer = build_trainer(tmp_path, {**LORA, "max_steps": 2})
    trainer.train()
    listed = skipped(tmp_path)
    assert sorted(entry["pair_id"] for entry in listed) == [rows[i]["images"][0] for i in (0, 2)]
    assert all(entry["stage"] == "training" and entry["reason"].startswith("bad image: ") for entry in listed)
