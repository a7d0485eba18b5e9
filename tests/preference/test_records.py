"""preference/records.py: what a scored pair may be, and the two files that evaluations keep."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace

import pytest

from helpers.report_runs import make_pairs
from llava_orpo.errors import UserError
from llava_orpo.preference import records
from llava_orpo.preference.records import ScoredPair

PAIR = ScoredPair(
    pair_id="p",
    dataset="demo",
    subset="coco/question answering",
    source="coco",
    question_type="question answering",
    image_hash="image of p",
    image_condition="true",
    chosen_logp=-1.0,
    rejected_logp=-2.0,
    chosen_tokens=1,
    rejected_tokens=1,
)


def test_the_fields_of_a_line_are_those_of_the_pair_and_correct():
    line = PAIR.to_json()
    assert line == {**dataclasses.asdict(PAIR), "correct": True}
    assert list(line) == [field.name for field in dataclasses.fields(ScoredPair)] + ["correct"]
    assert ScoredPair.from_json(json.loads(json.dumps(line)), "here") == PAIR
    assert ScoredPair.from_json(line | {"a later field": 1}, "here") == PAIR
    assert PAIR.key == ("demo", "p")


def test_correct_is_by_mean_log_prob_and_a_tie_is_not():
    long = replace(PAIR, chosen_logp=-4.0, rejected_logp=-3.0, chosen_tokens=8, rejected_tokens=2)
    assert long.mean_logps == (-0.5, -1.5) and long.margin == 1.0 and long.correct is True
    tie = replace(PAIR, chosen_logp=-4.0, rejected_logp=-1.0, chosen_tokens=8, rejected_tokens=2)
    assert tie.margin == 0.0 and tie.correct is False
    wrong = replace(PAIR, chosen_logp=-3.0)
    assert wrong.margin == -1.0 and wrong.correct is False and wrong.to_json()["correct"] is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen_logp": math.nan}, "'p'.*chosen_logp.*nan"),
        ({"rejected_logp": -math.inf}, "'p'.*rejected_logp.*inf"),
        ({"rejected_logp": True}, "'p'.*rejected_logp.*True"),
        ({"rejected_tokens": 0}, "'p'.*rejected_tokens.*0"),
        ({"chosen_tokens": 2.0}, "'p'.*chosen_tokens.*2.0"),
        ({"chosen_tokens": True}, "'p'.*chosen_tokens.*True"),
        ({"chosen_logp": 0.5}, "'p'.*above 0"),
        ({"image_condition": "gray"}, "'p'.*image_condition.*gray"),
        ({"source": None}, "'p'.*'source' must be a string"),
    ],
)
def test_scores_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        replace(PAIR, **fields)


def test_a_log_prob_above_zero_by_rounding_is_accepted():
    """Each token's may be rounded up by a thousandth of a nat."""
    assert replace(PAIR, chosen_logp=0.001, rejected_logp=0.008, rejected_tokens=8).chosen_logp == 0.001
    for fields in ({"chosen_logp": 0.0011}, {"rejected_logp": 0.0081, "rejected_tokens": 8}):
        with pytest.raises(UserError, match="above 0"):
            replace(PAIR, **fields)


def test_pairs_survive_the_file_exactly(tmp_path):
    odd = replace(PAIR, pair_id="naïve 漢字 </script>\u2028\n\r\x85", chosen_logp=-0.1, rejected_logp=-1e-300)
    pairs = make_pairs(50, 0.2, seed=9) + [odd]
    path = tmp_path / "preference_pairs.jsonl"
    records.write_pairs(path, pairs)
    assert records.read_pairs(path) == pairs
    assert [json.loads(line)["correct"] for line in path.read_text().strip("\n").split("\n")] == [
        pair.correct for pair in pairs
    ]
    records.write_pairs(path, pairs[:3])
    assert records.read_pairs(path) == pairs[:3]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"pair_id": "cut o', "not JSON"),
        ("[1, 2]", "expected an object"),
        ("{}", "'pair_id' must be a string"),
        (json.dumps(PAIR.to_json() | {"correct": False}), "'correct' is False"),
        (json.dumps({k: v for k, v in PAIR.to_json().items() if k != "correct"}), "'correct' is None"),
        (json.dumps(PAIR.to_json() | {"chosen_tokens": "3"}), "chosen_tokens"),
        (json.dumps(PAIR.to_json() | {"image_condition": "gray"}), "image_condition"),
        (json.dumps(PAIR.to_json() | {"chosen_logp": math.nan}), "chosen_logp"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "preference_pairs.jsonl"
    path.write_text(json.dumps(replace(PAIR, pair_id="good").to_json()) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"preference_pairs.jsonl:2: .*{message}"):
        records.read_pairs(path)


def test_history_appends_replaces_and_sorts(tmp_path):
    path = tmp_path / "preference_eval.json"

    def entry(step: int, accuracy: float, dataset: str = "demo") -> dict:
        metrics = {"preference_accuracy": accuracy}
        return {"step": step, "epoch": step / 10, "dataset": dataset, "metrics": metrics, "grounding": None}

    records.append_history(path, entry(20, 0.6))
    records.append_history(path, entry(10, 0.5))
    records.append_history(path, entry(20, 0.7))
    records.append_history(path, entry(20, 0.9, dataset="other"))
    history = records.read_history(path)
    assert [(e["step"], e["dataset"], e["metrics"]["preference_accuracy"]) for e in history] == [
        (10, "demo", 0.5),
        (20, "demo", 0.7),
        (20, "other", 0.9),
    ]
    assert json.loads(path.read_text())["format"] == records.HISTORY_FORMAT == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_broken_history_is_named_and_kept(tmp_path):
    path = tmp_path / "preference_eval.json"
    for text, message in [
        ('{"format": 1,\n "hist', ":2: not JSON"),
        ('{"format": 2, "history": []}', "no preference history of format 1"),
        ('{"format": 1}', "no preference history of format 1"),
        ('{"format": 1, "history": {}}', "no preference history of format 1"),
        ("[1, 2]", "no preference history of format 1"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=f"preference_eval.json{message}|preference_eval.json: {message}"):
            records.append_history(path, {"step": 1, "epoch": 0.1, "dataset": "d", "metrics": {}, "grounding": None})
        assert path.read_text() == text


def test_an_unwritable_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "preference_pairs.jsonl"
    records.write_pairs(path, make_pairs(2, 0.2, seed=0))
    before = path.read_bytes()
    with pytest.raises(ValueError):  # the second pair fails while the pairs are being written
        records.write_pairs(path, (replace(PAIR, chosen_logp=logp) for logp in (-1.0, -math.inf)))
    assert path.read_bytes() == before
    with pytest.raises(ValueError):  # half a surrogate pair is no text that UTF-8 can hold
        records.write_pairs(path, [PAIR, replace(PAIR, pair_id="\ud83d")])
    assert path.read_bytes() == before
    history = tmp_path / "preference_eval.json"
    entry = {"step": 1, "epoch": 0.1, "dataset": "d", "metrics": {"loss": 0.5}, "grounding": None}
    records.append_history(history, entry)
    before = history.read_bytes()
    with pytest.raises(ValueError):
        records.append_history(history, entry | {"step": 2, "metrics": {"loss": math.nan}})
    assert history.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [history.name, path.name]
