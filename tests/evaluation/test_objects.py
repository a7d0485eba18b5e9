"""evals/objects.py: names found in answers, CHAIR and coverage against counts by hand, bad annotations."""

from __future__ import annotations

import json
from pathlib import Path

import generate
import numpy as np
import objects as command
import pytest

from helpers.recipes import photo_rows, write_recipe, write_rows
from llava_orpo.data.images import content_hash
from llava_orpo.errors import UserError
from llava_orpo.evaluation import objects
from llava_orpo.evaluation.objects import AnswerObjects, Vocabulary

ANIMALS = Vocabulary({"dog": ["puppy", "hound"], "hot dog": [], "bus": [], "traffic light": ["stoplight"], "cat": []})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Two dogs, a bus and a Puppy.", ["dog", "bus"]),
        ("a hot dog beside three buses", ["hot dog", "bus"]),
        ("A traffic\nlight; stoplights", ["traffic light"]),
        ("There is no dog, not a cat, but a bus without a dog.", ["bus"]),
        ("There is no dog here. A dog barks.", ["dog"]),
        ("busy hotdogs and cathedrals", []),
        ("", []),
    ],
)
def test_names_in_a_text(text, named):
    assert ANIMALS.named(text) == named


def answer(image: str, held: list[str], text: str, source: str = "") -> AnswerObjects:
    return AnswerObjects.of(ANIMALS, held, text, dataset="d", pair_id=image + text, source=source, image_hash=image)


ANSWERS = [
    answer("i1", ["dog", "bus"], "A dog, a dog, a cat and a bus.", "a"),  # 1 of 3 named is not there
    answer("i1", ["dog", "bus"], "A dog.", "a"),
    answer("i2", ["cat"], "A bus and a hot dog.", "b"),  # 2 of 2
    answer("i3", ["cat", "dog", "bus"], "Nothing at all.", "b"),
]


def test_counts_by_hand():
    found = objects.summarize(ANSWERS, min_subset=2)
    assert (ANSWERS[0].true, ANSWERS[0].hallucinated, ANSWERS[0].missed) == (["dog", "bus"], ["cat"], [])
    assert (found["n"], found["n_images"], found["names_nothing"]) == (4, 3, 1)
    assert found["chair_s"] == 2 / 4 and found["hallucinated_per_answer"] == 3 / 4
    assert found["chair_i"] == 3 / 6 and found["named_per_answer"] == 6 / 4
    assert found["coverage"] == 3 / 8  # 2 + 1 + 0 + 0 named of 2 + 2 + 1 + 3 true objects
    assert found["subsets"]["a"]["chair_i"] == 1 / 4 and found["subsets"]["b"]["coverage"] == 0
    assert found["subsets"]["a"]["coverage_low"] is None  # one image: nothing to resample
    for name in ("chair_s", "chair_i", "hallucinated_per_answer", "coverage"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert objects.summarize(ANSWERS, min_subset=3)["small_subsets"] == {"a": 2, "b": 2}
    json.dumps(found, allow_nan=False)


def test_the_bootstrap_resamples_images_with_all_their_answers():
    """Against numpy's own resampling of 40 images; equal seeds are not needed, so with a tolerance."""
    rng = np.random.default_rng(3)
    answers = []
    for image in range(40):
        text = "A cat." if rng.random() < 0.4 else "A dog."
        answers += [answer(f"i{image}", ["dog"], text + " " * k) for k in range(5)]
    found = objects.summarize(answers)
    wrong = np.array([bool(a.hallucinated) for a in answers]).reshape(40, 5).mean(1)
    means = wrong[rng.integers(0, 40, (20000, 40))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert abs(found["hallucinated_per_answer_low"] - low) < 0.03
    assert abs(found["hallucinated_per_answer_high"] - high) < 0.03


def test_nothing_named_and_nothing_there():
    found = objects.summarize([answer("i1", [], ""), answer("i2", [], "")])
    assert found["chair_i"] == 0 and found["coverage"] is None and found["chair_i_low"] is None
    assert ("coverage of true objects", "-") in objects.table(found)
    with pytest.raises(UserError, match="nothing to measure"):
        objects.summarize([])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", ":2: not JSON"),
        ("[]", ":2: no annotation"),
        ('{"image_hash": "b"}', ":2: no annotation"),
        ('{"image_hash": "b", "objects": [3]}', ":2: no annotation"),
        ('{"objects": ["dog"]}', ":2: no annotation"),
        ('{"image_hash": "a", "objects": ["cat"]}', ":2: image a has other objects"),
    ],
)
def test_bad_annotations_name_their_line(tmp_path, line, said):
    file = tmp_path / "a.jsonl"
    file.write_text('{"image_hash": "a", "objects": ["Dog"]}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        objects.read_annotations(file)


def test_vocabularies(tmp_path):
    file = tmp_path / "names.json"
    for text, said in (("[1]", "no vocabulary"), ('{"a": "b"}', "no vocabulary"), ("{", "not JSON")):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            objects.read_vocabulary(file, {"i": ["dog"]})
    file.write_text('{"Dog": ["puppy"], "cat": []}')
    known = objects.read_vocabulary(file, {"i": ["dog", "bus"]})
    assert known.named("a puppy, a bus, a cat") == ["dog", "bus", "cat"]
    with pytest.raises(UserError, match="nothing to look for"):
        objects.read_vocabulary(None, {"i": []})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no annotations"):
        objects.read_annotations(tmp_path / "empty.jsonl")


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three photographs with two prompts each, and annotations of two of them."""
    folder, rows = tmp_path_factory.mktemp("objects"), photo_rows(3, 2)
    write_rows(folder, rows)
    write_recipe(folder, {"eval_dataset": "rows"})
    hashes = list(dict.fromkeys(content_hash(row["image"]["bytes"]) for row in rows))
    lines = [{"image_hash": h, "objects": ["the", "red circle"]} for h in hashes[:2]]
    (folder / "annotations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(folder: Path, out: str, *words: str) -> tuple[dict, list[dict]]:
    fixed = [str(folder / "recipe.yaml"), f"annotations={folder / 'annotations.jsonl'}", f"output_dir={folder / out}"]
    assert command.main([*fixed, "max_new_tokens=6", *words]) == 0
    lines = (folder / out / "objects_answers.jsonl").read_text().splitlines()
    return json.loads((folder / out / "objects.json").read_text()), list(map(json.loads, lines))


def test_greedy_answers_are_those_of_generate_and_are_kept(folder, capsys):
    first, answers = run(folder, "a")
    assert "2 images" in capsys.readouterr().out
    assert first["n"] == 4 and len(first["left_out"]) == 2  # the third photograph has no annotations
    assert "has no annotations" in first["left_out"][0]["reason"]
    assert generate.main([str(folder / "recipe.yaml"), f"output_dir={folder / 'g'}", "max_new_tokens=6"]) == 0
    generated = [json.loads(line) for line in (folder / "g" / "generations.jsonl").read_text().splitlines()]
    texts = {line["pair_id"]: next(iter(line["answers"].values())) for line in generated}
    assert len(texts) == 6 and all(texts[a["pair_id"]] == a["answer"] for a in answers)
    capsys.readouterr()
    again = run(folder, "a")[0]
    assert again == first and "prompt/s" not in capsys.readouterr().err  # nothing was asked a second time

    read, same = run(folder, "b", f"answers={folder / 'g' / 'generations.jsonl'}")
    assert same == answers and {**read, "model": 0} == {**first, "model": 0}


def test_answers_of_another_model_are_named(folder):
    run(folder, "a")
    file = folder / "two.jsonl"
    line = {"pair_id": "p", "dataset": "d", "subset": "s/x", "image": None, "answers": {"a": "x", "b": "y"}}
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="answers of a, b: name one"):
        run(folder, "c", f"answers={file}")
    with pytest.raises(UserError, match="nothing to measure"):  # it is about no image
        run(folder, "c", f"answers={file}", "answered_by=b")
    with pytest.raises(UserError, match="answered_by= names a model in answers="):
        run(folder, "c", "answered_by=b")
