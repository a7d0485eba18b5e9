"""data/skipped.py: the list of rows that are left out, and how many a recipe allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_orpo.data import skipped
from llava_orpo.errors import UserError


def entries(count: int, reason: str = "bad image") -> list[dict]:
    return [{"dataset": "d", "row": i, "pair_id": f"p{i}", "reason": f"{reason}: größer"} for i in range(count)]


def listed(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rows_found_later_are_added_once_each_rank_in_its_own_file(tmp_path):
    folder = tmp_path / "new" / "folder"
    first, second, third, fourth = entries(4)
    assert skipped.write_skipped(str(folder), [first]) == str(folder / "skipped_rows.jsonl")
    assert skipped.write_skipped(str(folder), [second, first, second], rank=0) == str(folder / "skipped_rows.jsonl")
    assert skipped.write_skipped(str(folder), [third, second], rank=1) == str(folder / "skipped_rows.rank1.jsonl")
    assert skipped.write_skipped(str(folder), [fourth, third], rank=2) == str(folder / "skipped_rows.rank2.jsonl")
    assert listed(folder / "skipped_rows.jsonl") == [first, second]
    assert listed(folder / "skipped_rows.rank1.jsonl") == [third]
    assert listed(folder / "skipped_rows.rank2.jsonl") == [fourth]
    assert "größer" in (folder / "skipped_rows.jsonl").read_text(encoding="utf-8")  # to be read by people


def test_the_summary_holds_every_row_of_every_rank_once(tmp_path):
    reading, training = ([dict(entry, stage=stage) for entry in entries(2)] for stage in ("reading", "training"))
    other = dict(training[1], row=7, pair_id="p7")
    files = {"": [reading[0]], ".rank1": [training[1], other], ".rank10": [training[1]]}
    for name, content in files.items():
        text = "".join(json.dumps(entry) + "\n" for entry in content)
        (tmp_path / f"skipped_rows{name}.jsonl").write_text(text + ('{"cut' if name else ""))
    assert skipped.summarize_skipped(str(tmp_path)) == {"reading": 1, "training": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["skipped_rows.jsonl"]
    assert listed(tmp_path / "skipped_rows.jsonl") == [reading[0], training[1], other]
    assert skipped.summarize_skipped(str(tmp_path)) == {"reading": 1, "training": 2}
    assert skipped.summarize_skipped(str(tmp_path / "none")) == {}


def test_a_resumed_run_keeps_what_it_found_while_training(tmp_path):
    found = dict(entries(3)[2], stage="training")
    read = [dict(entry, stage="reading") for entry in entries(2)]
    skipped.report_skipped(read, 100, 0.05, str(tmp_path), write=True)
    skipped.write_skipped(str(tmp_path), [found], rank=1)
    skipped.report_skipped(read, 100, 0.05, str(tmp_path), write=True, keep_training=True)
    assert listed(tmp_path / "skipped_rows.jsonl") == [*read, found]
    skipped.write_skipped(str(tmp_path), [found], rank=1)  # met again in a later epoch
    assert skipped.summarize_skipped(str(tmp_path)) == {"reading": 2, "training": 1}
    skipped.report_skipped([], 100, 0.05, str(tmp_path), write=True)
    assert not list(tmp_path.iterdir()), "a new run without a bad row leaves no list of the old one"


def test_bad_rows_error_names_the_first(tmp_path):
    rows = [{**entry, "reason": entry["reason"] + "\n  on two lines."} for entry in entries(2)]
    with pytest.raises(UserError) as refused:
        skipped.stop_at_bad_row(rows, "error")
    assert str(refused.value) == (
        "dataset d, row 0, pair p0: bad image: größer on two lines. "
        "Mend or remove the row, or set `bad_rows: skip` to leave such rows out."
    )
    skipped.stop_at_bad_row(rows, "skip")
    skipped.stop_at_bad_row([], "error")


def test_a_report_takes_the_place_of_an_earlier_run_s(tmp_path):
    path = tmp_path / "skipped_rows.jsonl"
    skipped.report_skipped(entries(3), 100, 0.05, str(tmp_path), write=True)
    assert listed(path) == entries(3)
    skipped.report_skipped(entries(2), 100, 0.05, str(tmp_path), write=True)
    assert listed(path) == entries(2)
    skipped.report_skipped(entries(5), 100, 0.05, str(tmp_path), write=False)  # another process writes it
    assert listed(path) == entries(2)
    skipped.report_skipped([], 0, 0.0, str(tmp_path / "none"), write=True)
    assert not (tmp_path / "none").exists()


def test_the_share_may_reach_the_limit_but_not_pass_it(tmp_path):
    skipped.report_skipped(entries(1), 4, 0.25, str(tmp_path), write=True)
    with pytest.raises(UserError, match=r"2 of 4 pairs \(50.0%\) .*max_skipped_fraction: 0.25.*skipped_rows.jsonl"):
        skipped.report_skipped(entries(2), 4, 0.25, str(tmp_path), write=True)
    assert len(listed(tmp_path / "skipped_rows.jsonl")) == 2, "the list is there to be looked at"
    with pytest.raises(UserError, match="3 of 0 pairs"):  # counted by a process that took no row
        skipped.report_skipped(entries(3), 0, 0.99, str(tmp_path), write=False)


def test_the_advice_fits_the_reasons(tmp_path):
    with pytest.raises(UserError, match="Look at the listed reasons, or raise max_skipped_fraction"):
        skipped.report_skipped(entries(2), 4, 0.1, str(tmp_path), write=False)
    long = entries(2, "the prompt alone has 3000 tokens, cutoff_len is 2048")
    with pytest.raises(UserError, match="2 of them do not fit cutoff_len: raise it"):
        skipped.report_skipped(long + entries(1), 4, 0.1, str(tmp_path), write=False)
