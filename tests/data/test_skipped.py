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


def test_rows_found_later_are_added_each_rank_in_its_own_file(tmp_path):
    folder = tmp_path / "new" / "folder"
    first, second, third = entries(3)
    assert skipped.write_skipped(str(folder), [first]) == str(folder / "skipped_rows.jsonl")
    assert skipped.write_skipped(str(folder), [second, third], rank=0) == str(folder / "skipped_rows.jsonl")
    assert skipped.write_skipped(str(folder), [second], rank=1) == str(folder / "skipped_rows.rank1.jsonl")
    assert skipped.write_skipped(str(folder), [third], rank=2) == str(folder / "skipped_rows.rank2.jsonl")
    assert listed(folder / "skipped_rows.jsonl") == [first, second, third]
    assert listed(folder / "skipped_rows.rank1.jsonl") == [second]
    assert "größer" in (folder / "skipped_rows.jsonl").read_text(encoding="utf-8")  # to be read by people


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
