"""Whole columns at once: no pass from the registered dataset to an evaluation's order asks for one value at a time."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets.arrow_dataset import Column
from hypothesis import given
from hypothesis import strategies as st

from helpers.recipes import build_trainer, photo_rows, tokenized, write_rows
from llava_orpo.data import columns, images, rlaif_v, rows
from llava_orpo.errors import UserError
from llava_orpo.preference import scoring, writing
from llava_orpo.training import checks


@pytest.fixture
def whole_columns_only(monkeypatch):
    """Reading one value of a Column, or a table as a list of dicts, is an error."""
    original = Column.__getitem__

    def refuse(self, key):
        if isinstance(key, str):  # a nested column, as lazy as this one
            return original(self, key)
        raise AssertionError(f"column {self.column_name!r} was asked for {key!r}")

    def no_list(self, *_args, **_keys):
        raise AssertionError("a whole table became a list of dicts")

    monkeypatch.setattr(Column, "__getitem__", refuse)
    monkeypatch.setattr(datasets.Dataset, "to_list", no_list)


def test_a_column_comes_in_the_order_of_its_dataset():
    made = datasets.concatenate_datasets([datasets.Dataset.from_dict({"a": [k, None, k + 1]}) for k in (0, 10)])
    assert columns.values(made, "a") == [0, None, 1, 10, None, 11]
    picked = made.select([5, 0, 0, 4]).select([0, 1, 3])
    assert columns.values(picked, "a") == [11, 0, None] and isinstance(columns.array(picked, "a"), pa.ChunkedArray)
    assert columns.array(picked, "a").null_count == 1
    shuffled = made.shuffle(seed=1)
    assert columns.values(shuffled, "a") == list(shuffled["a"])
    assert columns.values(made.select([]), "a") == []
    assert columns.values({"a": (1, 2)}, "a") == [1, 2]


@pytest.mark.parametrize("grouped", [False, True])
def test_nothing_reads_a_column_value_by_value(tmp_path, whole_columns_only, grouped):
    made = photo_rows(40, 2)
    made[3]["chosen"] = None
    write_rows(tmp_path, made)
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    for part in ("train", "heldout"):
        info[part] = {**info["rows"], "llava_orpo": {"part": part, "filter": {"origin_dataset": ["coco", "VQA-v2"]}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {
        "dataset": "train",
        "eval_dataset": "heldout",
        "heldout_fraction": 0.3,
        "dataset_filter": {"origin_split": {"type": "detailed description"}},
        "group_pairs_by_image": grouped,
        "allow_text_only": True,
        "max_skipped_fraction": 0.5,
    }
    trainer = build_trainer(tmp_path, keys)
    train, held = trainer.train_dataset, trainer.eval_dataset
    assert len(train) and len(held)
    order = trainer._get_train_sampler()
    assert sorted(order.pairs(0)) == list(range(len(train))) and len(list(order)) == len(order)
    next(iter(trainer.get_train_dataloader()))
    processes = SimpleNamespace(world_size=2, output_dir=str(tmp_path))
    run = SimpleNamespace(arguments=trainer.plugin, shared_prefix=False)
    checks.refuse_unusable_rows({"train_dataset": train, "eval_dataset": held}, run, processes)
    assert checks.tokens_per_second(train, {"epoch": 1.0, "train_runtime": 1.0}) > 0

    shuffled = held.shuffle(seed=0)
    for condition in ("true", "other"):
        order = scoring.in_groups(shuffled, range(len(held)), 4, condition, trainer.plugin)
        assert sorted(order) == list(range(len(held)))
        assert len(list(scoring.ConditionedRows(shuffled, order, condition))) == len(held)
    assert len(set(scoring.unique_ids(shuffled))) == len(held)
    assert writing.dataset_names(held) == "heldout"


def test_a_second_start_reads_its_caches(tmp_path):
    made = photo_rows(10, 2)
    made[0]["rejected"] = ""
    write_rows(tmp_path, made)
    keys = {
        "cache_dir": str(tmp_path / "cache"),
        "dataset_filter": {"origin_split": "question answering"},
        "max_skipped_fraction": 0.5,
    }

    def files() -> set:
        return {(file, file.stat().st_mtime_ns) for file in (tmp_path / "cache").rglob("*.arrow")}

    first, _ = tokenized(tmp_path, keys)
    found, listed = files(), (tmp_path / "out" / "skipped_rows.jsonl").read_text()
    again, _ = tokenized(tmp_path, keys)
    assert files() == found and len(listed.splitlines()) == 1
    assert (tmp_path / "out" / "skipped_rows.jsonl").read_text() == listed
    assert again.to_list() == first.to_list()


def test_bad_rows_are_listed_in_order_with_the_texts_reason_first(tmp_path):
    made = photo_rows(6, 1)
    made[5]["chosen"] = made[5]["rejected"]
    made[1]["image"] = None
    made[3].update(image={"bytes": b"no image", "path": None}, question=None)
    write_rows(tmp_path, made)
    tokenized(tmp_path, {"max_skipped_fraction": 1.0})
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"]) for entry in listed] == [
        (1, "no image"),
        (3, "`question` is missing"),
        (5, "chosen and rejected are the same text"),
    ]
    assert [entry["pair_id"] for entry in listed] == [rows.pair_id_of(made[entry["row"]], 0) for entry in listed]


@given(
    st.lists(st.binary(max_size=6), max_size=60),
    st.floats(0, 1, exclude_min=True, exclude_max=True) | st.sampled_from([0.5, 0.25, 1 - 2**-53, 2**-64]),
)
def test_the_part_of_all_rows_is_that_of_each(contents, fraction):
    hashes = ["", *map(images.content_hash, contents), "", "0" * 16, "7" + "f" * 15, "8" + "0" * 15, "f" * 16]
    array = pa.chunked_array([hashes[:2], hashes[2:]], pa.string())
    for heldout in (False, True):
        expected = [not name or rows.is_heldout(name, fraction) == heldout for name in hashes]
        assert rlaif_v._in_part(array, heldout, fraction).tolist() == expected


SPLITS = ['{"model": "m", "type": "QA"}', '{"type": "qa", "a": [1, null]}', "{broken", "", None, "[1, 2]", "q-a"]


@given(
    st.lists(st.sampled_from(SPLITS), min_size=1, max_size=20),
    st.sampled_from([{"s": "qa"}, {"s": {"type": ["QA", "x"]}}, {"s.a": 1}, {"s": ""}, {"s": ["1", "{broken"]}]),
)
def test_a_filter_keeps_the_rows_that_meet_it_alone(splits, conditions):
    table = [{"s": split} for split in splits]
    met = rlaif_v.match_rows({"s": splits}, range(len(splits)), conditions=conditions, version=0)["_match"]
    if met.any():
        assert np.flatnonzero(met).tolist() == rows.filter_rows(table, conditions, "d")
    else:
        with pytest.raises(UserError, match="matches no row of d"):
            rows.filter_rows(table, conditions, "d")


def test_filters_say_what_there_is_and_which_columns_exist(tmp_path):
    write_rows(tmp_path, photo_rows(8, 1))
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["coco"] = {**info["rows"], "llava_orpo": {"filter": {"origin_dataset": "coco"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"wanted \['VQAv2'\], present: 'COCO' \(2\)$"):  # of the rows left by the first
        tokenized(tmp_path, {"dataset": "coco", "dataset_filter": {"origin_dataset": "VQAv2"}})
    with pytest.raises(UserError, match="rows has no column 'orgin'; its columns are chosen, ds_name, idx, image_path"):
        tokenized(tmp_path, {"dataset_filter": {"orgin.x": "COCO"}})
