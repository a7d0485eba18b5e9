"""Parts of the preference-accuracy hook: metric names as they are logged, and rows with another image."""

from __future__ import annotations

import datasets
import pytest
from PIL import Image

from llava_orpo.preference import metrics as preference
from llava_orpo.preference import scoring as evaluation

COLUMNS = ("image", "num_image_tokens", "width", "height")


def pair(number: int, source: str = "a", kind: str = "x", correct: bool = True) -> dict:
    logps = (-4.0, -8.0) if correct else (-8.0, -4.0)
    return {
        "pair_id": str(number), "dataset": "d", "source": source, "question_type": kind, "subset": f"{source}/{kind}",
        "image_hash": f"h{number}", "image_condition": "true", "chosen_logp": logps[0], "rejected_logp": logps[1],
        "chosen_tokens": 4, "rejected_tokens": 4, "correct": correct,
    }  # fmt: skip


def row(image_hash: str, number: int) -> dict:
    """A tokenized row as far as the image goes; every number of it differs from every other row's."""
    image = f"{number}.jpg" if image_hash else None
    return {
        "pair_id": f"p{number}", "image_hash": image_hash, "image": image, "prompt_ids": [1, number],
        "num_image_tokens": 100 + number if image else 0, "width": 10 + number if image else 0,
        "height": 20 + number if image else 0,
    }  # fmt: skip


def rows(*hashes: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([row(image_hash, i) for i, image_hash in enumerate(hashes)])


def test_flat_metrics_names_every_scalar_with_the_prefix():
    summary = preference.summarize([pair(0), pair(1), pair(2, correct=False)], beta=0.1, min_subset=1)
    flat = evaluation.flat_metrics(summary, "eval_held_out")
    scalars = {key: value for key, value in summary.items() if key not in ("subsets", "small_subsets")}
    assert flat == {f"eval_held_out_{key}": value for key, value in scalars.items()}
    assert flat["eval_held_out_preference_accuracy"] == 2 / 3 and flat["eval_held_out_n"] == 3
    assert all(type(value) in (int, float) for value in flat.values())


def test_flat_metrics_gives_each_subset_its_accuracy_and_count():
    pairs = [pair(0, "a"), pair(1, "a", correct=False), pair(2, "b"), pair(3, "b"), pair(4, "b", correct=False)]
    flat = evaluation.flat_metrics(preference.summarize(pairs, beta=0.1, min_subset=1), "eval")
    assert {key: value for key, value in flat.items() if key.startswith("eval_subset/")} == {
        "eval_subset/a/accuracy": 1 / 2, "eval_subset/a/n": 2, "eval_subset/b/accuracy": 2 / 3, "eval_subset/b/n": 3,
        "eval_subset/a/x/accuracy": 1 / 2, "eval_subset/a/x/n": 2, "eval_subset/b/x/accuracy": 2 / 3,
        "eval_subset/b/x/n": 3,
    }  # fmt: skip  # question_type has one group, x: the whole set


@pytest.mark.parametrize("min_subset, names", [(1, {"a", "b", "a/x", "b/x"}), (2, set()), (3, set())])
def test_flat_metrics_leaves_out_a_single_group(min_subset, names):
    """A group that stands alone, because the other ones are too small, is left out too."""
    pairs = [pair(0, "a"), pair(1, "a"), pair(2, "b")]
    flat = evaluation.flat_metrics(preference.summarize(pairs, beta=0.1, min_subset=min_subset), "eval")
    found = {key.removeprefix("eval_subset/").removesuffix("/n") for key in flat if key.startswith("eval_subset/")}
    assert {name for name in found if not name.endswith("/accuracy")} == names


def test_true_rows_are_the_rows_at_their_positions():
    made = rows("A", "B", "", "C")
    scored = evaluation.ScoredRows(made, [3, 0, 2])
    assert len(scored) == 3
    assert [scored[i] for i in range(3)] == [dict(made[p], position=p) for p in (3, 0, 2)]


def test_grey_keeps_the_size_of_every_image():
    made = rows("A", "A", "B")
    scored = evaluation.ScoredRows(made, range(3), "grey")
    for i in range(3):
        found = scored[i]
        image = found.pop("image")
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        assert image.size == (made[i]["width"], made[i]["height"]) == (10 + i, 20 + i)
        assert image.getcolors() == [((10 + i) * (20 + i), (128, 128, 128))]
        assert found == {**{key: value for key, value in made[i].items() if key != "image"}, "position": i}


@pytest.mark.parametrize(
    "hashes, donors",
    [
        ("ABC", [1, 2, 0]),  # the next row, and the first one after the last
        ("AABB", [2, 2, 0, 0]),  # not the same image again
        ("ABA", [1, 2, 1]),  # past its own image on the way round
        (["A", "", "", "B"], [3, None, None, 0]),  # past rows without an image
    ],
)
def test_other_is_the_next_different_image(hashes, donors):
    made = rows(*hashes)
    scored = evaluation.ScoredRows(made, range(len(made)), "other")
    for i, donor in enumerate(donors):
        found = scored[i]
        own = dict(made[i], position=i)
        if donor is not None:  # image, token count and size come together; everything else stays
            own |= {key: made[donor][key] for key in COLUMNS} | {"shown_hash": made[donor]["image_hash"]}
        assert found == own, i


def test_other_does_not_depend_on_the_shard():
    made = rows(*"AABCB")
    whole = evaluation.ScoredRows(made, range(5), "other")
    for positions in ([0, 2, 4], [1, 3, 4], [4, 0]):
        part = evaluation.ScoredRows(made, positions, "other")
        assert [part[i] for i in range(len(part))] == [whole[p] for p in positions]


@pytest.mark.parametrize("hashes", [["A"], ["A", "A", "A"], ["A", "", "A"]])
def test_other_with_one_image_is_an_error(hashes):
    with pytest.raises(ValueError, match="one image only"):
        evaluation.ScoredRows(rows(*hashes), [0], "other")[0]


@pytest.mark.parametrize("condition", evaluation.CONDITIONS)
def test_a_row_without_image_stays_as_it_is(condition):
    made = rows("A", "", "B")
    assert evaluation.ScoredRows(made, [1], condition)[0] == dict(made[1], position=1)
    alone = rows("")
    assert evaluation.ScoredRows(alone, [0], condition)[0] == dict(alone[0], position=0)
