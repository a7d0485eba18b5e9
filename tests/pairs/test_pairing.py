"""pairs/pairing.py and pairs/objects.py: which answers become pairs, and which objects an answer names."""

from __future__ import annotations

import json

import pytest

from llava_orpo.errors import UserError
from llava_orpo.pairs import judged, objects
from llava_orpo.pairs.pairing import ALL_EQUAL, FULL, NO_LENGTH, NO_MARGIN, Answer, Rules, candidates, distinct, pair_up


def answers(*scores, tokens=None):
    lengths = tokens or [10] * len(scores)
    return [Answer(f"answer {i}", score, n) for i, (score, n) in enumerate(zip(scores, lengths, strict=True))]


def texts(pairs):
    return [(pair.chosen.text[-1], pair.rejected.text[-1]) for pair in pairs]


def test_best_goes_with_worst_then_the_next_ones():
    pairs, why = candidates(answers(0.1, 0.9, 0.5, -1.0, 0.4), Rules())
    assert texts(pairs) == [("1", "3"), ("2", "0")] and why == ""  # 4 is left over


def test_margin_must_be_exceeded():
    assert texts(candidates(answers(1.0, 0.5, 0.0), Rules(margin=0.5))[0]) == [("0", "2")]
    assert candidates(answers(1.0, 0.5, 0.5), Rules(margin=0.5)) == ([], NO_MARGIN)
    assert candidates(answers(1.0, 1.0), Rules()) == ([], NO_MARGIN)


def test_lengths_are_balanced():
    found, _ = candidates(answers(1.0, 0.4, 0.0, tokens=[10, 20, 21]), Rules(length_ratio=2.0))
    assert texts(found) == [("0", "1")]  # the worst one is too long for the best
    assert candidates(answers(1.0, 0.0, tokens=[10, 21]), Rules(length_ratio=2.0)) == ([], NO_LENGTH)


def test_equal_scores_are_decided_by_the_tie_and_then_by_order():
    three = [Answer("a", 0.0, 5, 0.2), Answer("b", 0.0, 5, 0.9), Answer("c", -1.0, 5, 0.0)]
    assert candidates(three, Rules())[0][0].chosen.text == "b"


def test_equal_answers_make_no_pair():
    assert candidates([Answer("a  b", 1.0, 2), Answer("a b", 0.0, 2)], Rules()) == ([], ALL_EQUAL)
    assert distinct(["x", " x ", "y", "x\n"]) == ["x", "y"]


def test_an_image_gets_at_most_so_many_pairs_first_ones_first():
    prompts = {
        7: ("image", answers(4.0, 3.0, 1.0, 0.0)),  # 4 and 2 apart
        3: ("image", answers(1.0, 0.0)),
        5: ("image", answers(0.5, 0.0)),
        9: ("other", answers(0.5, 0.0)),
        1: ("", answers(0.5, 0.0)),  # without an image: on its own
        2: ("", answers(0.5, 0.0)),
    }
    pairs, reasons = pair_up(prompts, Rules(pairs_per_image=2))
    assert [(prompt, pair.margin) for prompt, pair in pairs] == [(7, 4.0), (3, 1.0), (9, 0.5), (1, 0.5), (2, 0.5)]
    assert reasons == {5: FULL}
    assert len(pair_up(prompts, Rules(pairs_per_image=4))[0]) == 7


def test_a_ring_compares_each_pair_once():
    assert judged.ring(5, 1) == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    assert len(judged.ring(8, 2)) == 16
    assert judged.ring(4, 9) == [(a, b) for a in range(4) for b in range(a + 1, 4)]  # all pairs, none twice
    assert judged.ring(2, 2) == [(0, 1)]


COCO = {
    "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 4, "file_name": "000000000004.jpg"}],
    "annotations": [{"image_id": 9, "category_id": i} for i in (1, 2, 3, 2)],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "hot dog"}, {"id": 3, "name": "bus"}],
}


def written(folder, content, name="annotations.json"):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text)
    return folder / name


def test_coco_annotations_and_their_vocabulary(tmp_path):
    notes = objects.read_annotations(written(tmp_path, COCO))
    there = notes.of("0123456789abcdef", "train/COCO_train2014_000000000009.jpg")
    assert there == {"person", "hot dog", "bus"}
    assert notes.of("", "000000000004.jpg") == frozenset()  # annotated as holding none
    assert notes.of("", "000000000005.jpg") is None and notes.of("", None) is None
    score = lambda answer: objects.score(answer, there, notes.phrases)  # noqa: E731
    assert score("Two women eat hot dogs.") == (0.0, pytest.approx(2 / 3))
    assert score("A man with a dog and a hot dog, and a cat.") == (-0.5, pytest.approx(2 / 3))
    assert score("Buses, but no dog, nor any cat, and not a single pizza.") == (0.0, pytest.approx(1 / 3))
    assert score("It is sunny.") == (None, 0.0)
    vocabulary = json.loads(objects.COCO_VOCABULARY.read_text())
    assert len(vocabulary) == 80 and all(isinstance(words, list) for words in vocabulary.values())


def test_other_annotations_and_vocabularies(tmp_path):
    lines = '{"image_hash": "00aa", "objects": ["Red Circle", "box"]}\n{"image": "x/b.png", "objects": []}\n'
    vocabulary = written(tmp_path, {"box": ["crate"]}, "words.json")
    notes = objects.read_annotations(written(tmp_path, lines, "a.jsonl"), vocabulary)
    assert notes.of("00aa", None) == {"red circle", "box"} and notes.of("", "b.png") == frozenset()
    assert objects.mentioned("Red circles and two crates", notes.phrases) == {"red circle", "box"}
    same_name = objects.read_annotations(written(tmp_path, {"x/a.png": ["box"], "y/a.png": ["cat"]}))
    assert same_name.of("", "x/a.png") == {"box"} and same_name.of("", "a.png") is None


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.json", "{", "not JSON"),
        ("a.json", [1], "holds list"),
        ("a.json", {}, "annotates no image"),
        ("a.json", {"x.png": "cat"}, "x.png: the objects must be a list"),
        ("a.json", {**COCO, "annotations": [{"image_id": 77, "category_id": 1}]}, "not COCO's instances"),
        ("a.jsonl", '{"image_hash": "0", "objects": []}\n{"objects": ["cat"]}\n', "a.jsonl:2: a line needs"),
    ],
)
def test_damaged_annotations_get_one_line(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said) as refused:
        objects.read_annotations(written(tmp_path, content, name))
    assert "\n" not in str(refused.value)
