"""data/rows.py: what a row says, which rows are refused and why, filters, the held-out split."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_orpo.data import images, rows

GOOD = {"question": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
TEXTS = ("What is this?", "A cat.", "A dog.")


def test_both_layouts_give_the_same_texts():
    assert rows.preference_texts(GOOD | {"text": "left over"}) == TEXTS
    assert rows.preference_texts({"text": json.dumps(GOOD)}) == TEXTS
    assert rows.preference_texts({"question": None, "text": GOOD}) == TEXTS


@pytest.mark.parametrize("question", ["", " ", "\n"])
def test_an_empty_question_is_a_question(question):
    """The picture alone can be the prompt; an empty answer teaches nothing."""
    assert rows.preference_texts(GOOD | {"question": question})[0] == question


@pytest.mark.parametrize("field", ["chosen", "rejected"])
@pytest.mark.parametrize("answer", ["", " ", "\n\t"])
def test_an_empty_answer_is_refused(field, answer):
    with pytest.raises(rows.RowError, match=f"^`{field}` is empty$"):
        rows.preference_texts(GOOD | {field: answer})


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "`question` is missing"),
        ({"question": None, "text": None}, "`question` is missing"),
        ({"text": json.dumps({"question": "q", "chosen": "c"})}, "`rejected` is missing"),
        (GOOD | {"chosen": 3}, "`chosen` is not text but int"),
        (GOOD | {rows.UNREADABLE: "line 3 is not JSON"}, "line 3 is not JSON"),
        ({"text": "What is this?"}, "column `text` is not JSON: Expecting value"),
        ({"text": "[1, 2]"}, "column `text` must hold a JSON object"),
        ({"text": 3}, "column `text` must hold a JSON object"),
        (GOOD | {"rejected": GOOD["chosen"]}, "chosen and rejected are the same text"),
    ],
)
def test_a_row_without_its_three_texts_is_refused(row, reason):
    with pytest.raises(rows.RowError, match=f"^{reason}"):
        rows.preference_texts(row)


@pytest.mark.parametrize("field", GOOD)
def test_half_a_character_is_refused(field):
    for half in ("\ud800", "\udbff", "\udc00", "\udfff"):
        with pytest.raises(rows.RowError, match=f"^`{field}` holds half a character"):
            rows.preference_texts(GOOD | {field: f"a {half} b"})
    for whole in ("\ud7ff", "\ue000", "\U0001f642"):
        assert f"a {whole} b" in rows.preference_texts(GOOD | {field: f"a {whole} b"})


def test_the_source_is_the_original_dataset_or_else_the_name():
    assert rows.source_of({"origin_dataset": "VQA v2", "ds_name": "RLAIF-V"}) == "VQA v2"
    assert rows.source_of({"origin_dataset": "", "ds_name": "RLAIF-V"}) == "RLAIF-V"
    assert rows.source_of({"origin_dataset": None, "ds_name": ""}) == rows.source_of({}) == "unknown"


@pytest.mark.parametrize(
    "split, kind",
    [
        (json.dumps({"model": "m", "type": "detailed description"}), "detailed description"),
        (json.dumps({"model": "m", "task": ["x", {"kind": "Question_Answering"}]}), "question answering"),
        ({"type": "question answering"}, "question answering"),
        ("detailed description", "detailed description"),
        (json.dumps(["Detailed description"]), "detailed description"),
        ("{broken", "unknown"),
        (json.dumps({"model": None, "type": "chat"}), "unknown"),
        (None, "unknown"),
    ],
)
def test_the_question_type_is_found_wherever_origin_split_has_it(split, kind):
    assert rows.question_type_of({"origin_split": split}) == kind


def test_a_pair_is_named_by_its_idx_and_its_texts():
    """The name is the same in every run: files of scores from different days are compared by it."""
    assert rows.pair_id_of(GOOD | {"idx": 7}, 3) == "7-e81e785a"
    assert rows.pair_id_of(GOOD | {"idx": 0}, 3) == "0-e81e785a"
    for missing in (GOOD, GOOD | {"idx": None}, GOOD | {"idx": ""}):
        assert rows.pair_id_of(missing, 3) == "3-e81e785a"
    names = [rows.pair_id_of(GOOD | {"idx": 7, field: "other"}, 3) for field in (*GOOD, "text")]
    assert len({*names, "7-e81e785a"}) == 5 and all(name.startswith("7-") for name in names)


@pytest.mark.parametrize(
    "path, values",
    [
        ("split", ["1", "2", "True", '{"a": {"b": 1}, "c": [2, null, true]}']),  # all inside it, and itself
        ("split.a", ["1"]),
        ("split.a.b", ["1"]),
        ("split.c", ["2", "True"]),
        ("split.none", []),
        ("split.a.b.none", []),
        ("plain", ["[half"]),
        ("plain.a", []),
        ("number", ["3"]),
        ("absent", []),
    ],
)
def test_a_condition_is_compared_with_all_that_its_path_holds(path, values):
    row = {"split": '{"a": {"b": 1}, "c": [2, null, true]}', "plain": "[half", "number": 3}
    assert rows.values_at(row, path) == values


def test_conditions_take_every_form():
    forms = {"a": 1, "b": ["x", 2], "c": {"d": ("y",), "e": {"f": None}}}
    assert rows.flatten_filter(forms) == {"a": ["1"], "b": ["x", "2"], "c.d": ["y"], "c.e.f": ["None"]}


def test_every_condition_must_hold():
    table = [{"a": a, "b": b} for a in "xy" for b in "xy"]
    assert rows.filter_rows(table, {"a": "x", "b": "y"}, "d") == [1]
    assert rows.filter_rows(iter(table), {"a": ["x", "y"], "b": "y"}, "d") == [1, 3]
    with pytest.raises(
        ValueError, match=r"(?s)matches no row of d\..*a: wanted \['z'\], present: 'x' \(2\), 'y' \(2\)"
    ):
        rows.filter_rows(table, {"a": "z"}, "d")
    with pytest.raises(ValueError, match=r"a\.inner: .*present: '\(none\)' \(4\)"):
        rows.filter_rows(table, {"a.inner": "z"}, "d")


@given(st.text())
def test_normal_ignores_case_and_punctuation(text):
    assert rows.normal(text) == rows.normal(f" {text.upper().lower()}-") or text.upper().lower() != text.lower()
    assert rows.normal("VQA v2") == rows.normal("vqa_V2")


def test_filter_on_columns_and_inside_origin_split():
    table = [
        {"origin_dataset": "MS-COCO", "origin_split": json.dumps({"model": "m", "type": "Detailed_Description"})},
        {"origin_dataset": "VQA v2", "origin_split": json.dumps({"model": "m", "type": "question answering"})},
        {"origin_dataset": "mscoco", "origin_split": "not json"},
    ]
    assert rows.filter_rows(table, {"origin_dataset": ["mscoco"]}, "d") == [0, 2]
    assert rows.filter_rows(table, {"origin_split": {"type": "detailed description"}}, "d") == [0]
    assert rows.filter_rows(table, {"origin_split.type": "detailed description"}, "d") == [0]
    assert rows.filter_rows(table, {"origin_split": "question answering"}, "d") == [1]
    assert rows.filter_rows(table, {"origin_dataset": "mscoco", "origin_split": "NOT JSON"}, "d") == [2]
    with pytest.raises(ValueError, match=r"(?s)matches no row of d.*'MS-COCO' \(1\).*'VQA v2' \(1\)"):
        rows.filter_rows(table, {"origin_dataset": "okvqa"}, "d")
    with pytest.raises(ValueError, match="no column 'orgin_dataset'; its columns are origin_dataset, origin_split"):
        rows.filter_rows(table, {"orgin_dataset": "mscoco"}, "d")


@given(st.lists(st.binary(max_size=8), min_size=200, max_size=400, unique=True), st.sampled_from([0.1, 0.3]))
def test_heldout_share_and_determinism(contents, fraction):
    hashes = [images.content_hash(data) for data in contents]
    held = [rows.is_heldout(h, fraction) for h in hashes]
    assert held == [rows.is_heldout(h, fraction) for h in hashes]
    spread = 6 * (fraction * (1 - fraction) / len(held)) ** 0.5
    assert abs(sum(held) / len(held) - fraction) < spread
    assert all(rows.is_heldout(h, 0.5) for h, inside in zip(hashes, held, strict=True) if inside)  # a larger one


@pytest.mark.parametrize(
    "fraction, inside, outside",
    [
        (0.5, ["0" * 16, "7" + "f" * 15], ["8" + "0" * 15, "f" * 16]),
        (0.25, ["3" + "f" * 15], ["4" + "0" * 15]),
        (0.0, [], ["0" * 16]),
        (1.0, ["0" * 16, "f" * 16], []),
    ],
)
def test_an_image_is_held_out_when_its_hash_is_below_the_fraction(fraction, inside, outside):
    assert all(rows.is_heldout(name, fraction) for name in inside)
    assert not any(rows.is_heldout(name, fraction) for name in outside)
