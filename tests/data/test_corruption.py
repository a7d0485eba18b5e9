"""Odd rows of about a hundred kinds: each is used with exact tokens and pixels, or skipped with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoProcessor

from helpers import corruption
from helpers.paths import ROOT
from helpers.recipes import random_model, run_cli, tokenized, write_recipe
from llava_orpo.errors import UserError
from llava_orpo.step.collator import SharedPrefixCollator

MANY = 12  # rows of each kind in the long version
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj", "per_device_train_batch_size": 8}
LOGGED = {"logging_steps": 1, "num_train_epochs": 1, "save_strategy": "no", "overwrite_output_dir": True}


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "skipped_rows.jsonl").read_text("utf-8").splitlines()]


def keys(folder: Path, **more) -> dict:
    return {**corruption.KEYS, "dataset_dir": str(folder / "data"), "cache_dir": str(folder / "cache"), **more}


def read(folder: Path, per_kind: int) -> corruption.Result:
    cases = corruption.make(folder, per_kind)
    rows, _ = tokenized(folder, keys(folder))
    processor = AutoProcessor.from_pretrained(random_model())
    collator = SharedPrefixCollator(processor, processor.tokenizer.convert_tokens_to_ids("<image>"))
    return corruption.judge(cases, rows, listed(folder), processor, collator)


def train(folder: Path, per_kind: int, *words: str) -> corruption.Result:
    """A whole training; afterwards the list must hold exactly the rows that are expected there."""
    cases = corruption.make(folder, per_kind)
    run_cli("train", write_recipe(folder, keys(folder, **LORA, **LOGGED)), *words, timeout=3000)
    rows, _ = tokenized(folder, keys(folder, do_train=False))  # the same rows, from the cache
    log = [json.loads(line) for line in (folder / "out" / "trainer_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses and all(0 < loss < 100 for loss in losses)
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    return corruption.judge(cases, rows, listed(folder), AutoProcessor.from_pretrained(random_model()))


def test_every_kind_is_used_exactly_or_skipped_with_its_reason(tmp_path):
    result = read(tmp_path, 1)
    assert len(result.counts) >= 30 and result.complaints == []


@pytest.mark.slow
def test_a_training_on_odd_rows_lists_exactly_the_bad_ones(tmp_path):
    assert train(tmp_path, 1).complaints == []


@pytest.mark.heavy
def test_many_rows_of_every_kind(tmp_path):
    """The long version; it prints a table and writes it to outputs/corruption.md."""
    (tmp_path / "read").mkdir(), (tmp_path / "train").mkdir()
    result, trained = read(tmp_path / "read", MANY), train(tmp_path / "train", MANY)
    rows = sum(sum(count.values()) for count in result.counts.values())
    (ROOT / "outputs").mkdir(exist_ok=True)
    (ROOT / "outputs" / "corruption.md").write_text(result.table() + "\n")
    print("\n" + result.table())
    assert rows >= 1000 and len(result.counts) >= 30
    assert result.complaints == [] and trained.complaints == []


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("lines", r"dataset lines, row 7, pair \S+: bad image: image file 'pictures/none-0.png' not found"),
        ("rlhf", r"dataset rlhf, row 3, pair \S+: column `text` is not JSON"),
        ("embedded", r"dataset embedded, row 20, pair \S+: `question` is missing"),
    ],
)
def test_bad_rows_error_stops_at_the_first(tmp_path, dataset, words):
    corruption.make(tmp_path, 1)
    with pytest.raises(UserError, match=f"^{words}") as refused:
        tokenized(tmp_path, keys(tmp_path, dataset=dataset, bad_rows="error"))
    assert "\n" not in str(refused.value) and "`bad_rows: skip`" in str(refused.value)


def test_a_damaged_file_is_an_error_of_one_line(tmp_path):
    corruption.make(tmp_path, 1)
    file = tmp_path / "data" / "embedded.parquet"
    data = file.read_bytes()
    for damaged in (data[: len(data) // 2], b"no parquet"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^embedded: its files cannot be read \(.+\); download"):
            tokenized(tmp_path, keys(tmp_path, dataset="embedded"))
    (tmp_path / "data" / "lines.jsonl").write_bytes(b"\n17\n")
    with pytest.raises(UserError, match="lines.jsonl: there is no JSON object in it"):
        tokenized(tmp_path, keys(tmp_path, dataset="lines"))
