"""preference/writing.py: which pairs become examples, and the files of one evaluation."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from llava_orpo.preference import writing
from llava_orpo.preference.records import ScoredPair, read_history, read_pairs
from llava_orpo.preference.scoring import ScoredRow


def scored(margins: list[float]) -> list[ScoredRow]:
    """Rows with these margins, in this order."""
    return [
        ScoredRow(
            i,
            f"p{i}",
            "d",
            ScoredPair(
                pair_id=f"p{i}",
                dataset="d",
                source="a",
                question_type="x",
                subset="a/x",
                image_hash=f"h{i}",
                image_condition="true",
                chosen_logp=margin - 50.0,
                rejected_logp=-50.0,
                chosen_tokens=1,
                rejected_tokens=1,
            ),
        )
        for i, margin in enumerate(margins)
    ]


@pytest.mark.parametrize(
    "number, count, picked",
    [
        (12, 6, [0, 1, 2, 6, 10, 11]),  # the two worst, the two best, two evenly between
        (9, 5, [0, 1, 3, 5, 8]),
        (5, 2, [0, 2]),  # too few for thirds
        (5, 1, [0]),
        (5, 0, []),
        (4, 3, [0, 1, 3]),
        (3, 3, [0, 1, 2]),
        (2, 9, [0, 1]),
        (0, 3, []),
    ],
)
def test_examples_are_spread_over_the_margin(number, count, picked):
    """Rows are those with the n-th lowest margin, in this order whatever the order of the set."""
    rows = scored([float(margin) for margin in range(number)])
    for given in (rows, rows[::-1], rows[1::2] + rows[::2]):
        assert [row.pair.margin for row in writing.pick_examples(given, count)] == picked


class Words:
    """A tokenizer whose words are numbers; 0 is special."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " " + " ".join(str(number) for number in ids if number or not skip_special_tokens) + " "


class Rows(list):
    """A tokenized set: rows by number, columns by name."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else list.__getitem__(self, key)


def evaluated() -> tuple[Rows, writing.Evaluation]:
    """Four rows, one without an image and two of one image without a hash; grey scores of two of them."""
    rows = Rows()
    for i, image_hash in enumerate(["h0", "", "", ""]):
        data = io.BytesIO()
        Image.new("RGB", (2 + i, 3), (i, 0, 0)).save(data, "BMP")
        rows.append(
            {
                "dataset": "d" if i else "b",
                "question": f"q{i}",
                "chosen_ids": [i, 7, 0],
                "rejected_ids": [8, 0],
                "image": None if i == 1 else data.getvalue(),
                "image_hash": image_hash,
            }
        )
    own = scored([3.0, 1.0, 2.0, -1.0])
    return rows, writing.Evaluation.of(rows, {"true": (own, []), "grey": (own[:2], [])}, beta=0.1, min_subset=1)


def test_an_evaluation_is_pairs_a_history_and_examples_with_their_images(tmp_path):
    rows, evaluation = evaluated()
    folder = tmp_path / "new" / "folder"
    examples = writing.write_evaluation(folder, rows, evaluation, Words(), 4, step=20, epoch=0.5)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "preference_pairs.jsonl",
        "preference_pairs_grey.jsonl",
        "preference_eval.json",
        "preference_examples.jsonl",
        "images/h0.png",
        "images/row-2.png",
        "images/row-3.png",
    }
    assert read_pairs(folder / "preference_pairs.jsonl") == evaluation.pairs
    assert [pair.pair_id for pair in read_pairs(folder / "preference_pairs_grey.jsonl")] == ["p0", "p1"]
    [entry] = read_history(folder / "preference_eval.json")
    assert (entry["step"], entry["epoch"], entry["dataset"], entry["grounding"]) == (20, 0.5, "b,d", None)
    assert entry["metrics"] == evaluation.summary
    lines = (folder / "preference_examples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == examples
    assert [(one["pair_id"], one["question"], one["chosen"], one["rejected"]) for one in examples] == [
        ("p3", "q3", "3 7", "8"),
        ("p1", "q1", "1 7", "8"),
        ("p2", "q2", "2 7", "8"),
        ("p0", "q0", "7", "8"),
    ]
    assert [one["image"] and one["image"]["path"] for one in examples] == [
        "images/row-3.png",
        None,
        "images/row-2.png",
        "images/h0.png",
    ]
    with Image.open(folder / "images" / "row-3.png") as picture:
        assert (picture.format, picture.size, picture.getpixel((0, 0))) == ("PNG", (5, 3), (3, 0, 0))


def test_a_later_evaluation_goes_into_the_same_folder(tmp_path):
    rows, evaluation = evaluated()
    for step in (40, 20, 40):  # a resumed run evaluates a step again
        examples = writing.write_evaluation(tmp_path, rows, evaluation, Words(), 2, step=step, epoch=step / 40)
        assert [one["pair_id"] for one in examples] == ["p3", "p2"]
    assert [entry["step"] for entry in read_history(tmp_path / "preference_eval.json")] == [20, 40]
    assert len((tmp_path / "preference_examples.jsonl").read_text().splitlines()) == 2
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"row-3.png", "row-2.png"}


def test_one_of_several_sets_adds_its_pairs_and_no_examples(tmp_path):
    rows, evaluation = evaluated()
    assert writing.write_evaluation(tmp_path, rows, evaluation, Words(), 4, step=1, epoch=0.1, suffix="_b") == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "preference_pairs_b.jsonl",
        "preference_pairs_b_grey.jsonl",
        "preference_eval.json",
    }
    assert writing.write_evaluation(tmp_path / "c", rows, evaluation, Words(), 0, step=1, epoch=0.1) == []
    assert not (tmp_path / "c" / "preference_examples.jsonl").exists()
