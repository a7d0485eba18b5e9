"""Scoring an evaluation set: metric names as they are logged, rows with another image, images that are broken."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from llava_orpo.errors import UserError
from llava_orpo.preference import metrics, scoring, writing
from llava_orpo.preference.records import CONDITIONS, ScoredPair

COLUMNS = ("image", "num_image_tokens", "width", "height")


def pair(number: int, source: str = "a", kind: str = "x", correct: bool = True) -> ScoredPair:
    logps = (-4.0, -8.0) if correct else (-8.0, -4.0)
    return ScoredPair(
        pair_id=str(number),
        dataset="d",
        source=source,
        question_type=kind,
        subset=f"{source}/{kind}",
        image_hash=f"h{number}",
        image_condition="true",
        chosen_logp=logps[0],
        rejected_logp=logps[1],
        chosen_tokens=4,
        rejected_tokens=4,
    )


def row(image_hash: str, number: int) -> dict:
    """A tokenized row as far as the image goes; every number of it differs from every other row's."""
    image = f"{number}.jpg" if image_hash else None
    return {
        "pair_id": f"p{number}",
        "image_hash": image_hash,
        "image": image,
        "prompt_ids": [1, number],
        "num_image_tokens": 100 + number if image else 0,
        "width": 10 + number if image else 0,
        "height": 20 + number if image else 0,
    }


def rows(*hashes: str) -> datasets.Dataset:
    return datasets.Dataset.from_list([row(image_hash, i) for i, image_hash in enumerate(hashes)])


def test_flat_metrics_names_every_scalar_with_the_prefix():
    summary = metrics.summarize([pair(0), pair(1), pair(2, correct=False)], beta=0.1, min_subset=1)
    flat = writing.flat_metrics(summary, "eval_held_out")
    scalars = {key: value for key, value in summary.items() if key not in ("subsets", "small_subsets")}
    assert flat == {f"eval_held_out_{key}": value for key, value in scalars.items()}
    assert flat["eval_held_out_preference_accuracy"] == 2 / 3 and flat["eval_held_out_n"] == 3
    assert all(type(value) in (int, float) for value in flat.values())


def test_flat_metrics_gives_each_subset_its_accuracy_and_count():
    pairs = [pair(0, "a"), pair(1, "a", correct=False), pair(2, "b"), pair(3, "b"), pair(4, "b", correct=False)]
    flat = writing.flat_metrics(metrics.summarize(pairs, beta=0.1, min_subset=1), "eval")
    assert {key: value for key, value in flat.items() if key.startswith("eval_subset/")} == {
        "eval_subset/a/accuracy": 1 / 2,
        "eval_subset/a/n": 2,
        "eval_subset/b/accuracy": 2 / 3,
        "eval_subset/b/n": 3,
        "eval_subset/a/x/accuracy": 1 / 2,
        "eval_subset/a/x/n": 2,
        "eval_subset/b/x/accuracy": 2 / 3,
        "eval_subset/b/x/n": 3,
    }  # question_type has one group, x: the whole set


@pytest.mark.parametrize("min_subset, names", [(1, {"a", "b", "a/x", "b/x"}), (2, set()), (3, set())])
def test_flat_metrics_leaves_out_a_single_group(min_subset, names):
    """A group that stands alone, because the other ones are too small, is left out too."""
    pairs = [pair(0, "a"), pair(1, "a"), pair(2, "b")]
    flat = writing.flat_metrics(metrics.summarize(pairs, beta=0.1, min_subset=min_subset), "eval")
    found = {key.removeprefix("eval_subset/").removesuffix("/n") for key in flat if key.startswith("eval_subset/")}
    assert {name for name in found if not name.endswith("/accuracy")} == names


def test_true_rows_are_the_rows_at_their_positions():
    made = rows("A", "B", "", "C")
    scored = scoring.ConditionedRows(made, [3, 0, 2])
    assert len(scored) == 3
    assert [scored[i] for i in range(3)] == [dict(made[p], position=p) for p in (3, 0, 2)]


def test_grey_keeps_the_size_of_every_image():
    made = rows("A", "A", "B")
    scored = scoring.ConditionedRows(made, range(3), "grey")
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
    scored = scoring.ConditionedRows(made, range(len(made)), "other")
    for i, donor in enumerate(donors):
        found = scored[i]
        own = dict(made[i], position=i)
        if donor is not None:  # image, token count and size come together; everything else stays
            own |= {key: made[donor][key] for key in COLUMNS} | {"shown_hash": made[donor]["image_hash"]}
        assert found == own, i


def test_other_does_not_depend_on_the_shard():
    made = rows(*"AABCB")
    whole = scoring.ConditionedRows(made, range(5), "other")
    for positions in ([0, 2, 4], [1, 3, 4], [4, 0]):
        part = scoring.ConditionedRows(made, positions, "other")
        assert [part[i] for i in range(len(part))] == [whole[p] for p in positions]


@pytest.mark.parametrize("hashes", [["A"], ["A", "A", "A"], ["A", "", "A"]])
def test_other_with_one_image_is_an_error(hashes):
    with pytest.raises(ValueError, match="one image only"):
        scoring.ConditionedRows(rows(*hashes), [0], "other")[0]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_row_without_image_stays_as_it_is(condition):
    made = rows("A", "", "B")
    assert scoring.ConditionedRows(made, [1], condition)[0] == dict(made[1], position=1)
    alone = rows("")
    assert scoring.ConditionedRows(alone, [0], condition)[0] == dict(alone[0], position=0)


# --- images that cannot be decoded ----------------------------------------------------------------------------


def evaluate(hashes: str, broken: str, conditions=CONDITIONS, batch_size: int = 2) -> writing.Evaluation:
    """An evaluation of one row per image; the images in `broken` cannot be decoded. Rows are right, then wrong, ..."""
    whole = datasets.Dataset.from_list(
        [
            row(image_hash, i)
            | {
                "dataset": "d",
                "source": "a",
                "question_type": "x",
                "chosen_ids": [1, 2],
                "rejected_ids": [3, 4, 5],
            }
            for i, image_hash in enumerate(hashes)
        ]
    )
    bad = {f"{i}.jpg" for i, image_hash in enumerate(hashes) if image_hash in broken}

    def collate(rows: list[dict]) -> dict:
        images = [(i, one["image"]) for i, one in enumerate(rows) if isinstance(one["image"], str)]
        return {"rows": rows, "bad_images": [(i, f"{image} is broken") for i, image in images if image in bad]}

    def score_batch(batch: dict) -> dict[str, torch.Tensor]:
        chosen = [-2.0 - 4 * (one["position"] % 2) for one in batch["rows"]]
        return {"logps": torch.tensor(chosen + [-6.0] * len(chosen))}

    merged = {
        condition: scoring.merge([scoring.score(score_batch, whole, range(len(whole)), collate, batch_size, condition)])
        for condition in conditions
    }
    return writing.Evaluation.of(whole, merged, beta=0.1, min_subset=1)


def test_grounding_covers_every_pair_when_every_image_is_whole():
    evaluation = evaluate("ABCDE", broken="")
    assert [evaluation.grounding[condition]["n"] for condition in CONDITIONS] == [5, 5, 5]
    assert evaluation.grounding["true_minus_other"]["n"] == 5 and evaluation.unusable == []
    assert evaluation.name == "d"


@pytest.mark.parametrize(
    "hashes, broken, scored, common",
    [
        # B's row is scored with grey and with C's image only; A's with its own and grey only, as it was to show B
        ("ABCDE", "B", {"true": "0234", "grey": "01234", "other": "1234"}, "234"),
        ("ABCDE", "E", {"true": "0123", "grey": "01234", "other": "0124"}, "012"),  # D was to show E
        ("ABBCD", "B", {"true": "034", "grey": "01234", "other": "1234"}, "34"),
        ("ABCDE", "BD", {"true": "024", "grey": "01234", "other": "134"}, "4"),
    ],
)
def test_grounding_is_over_pairs_scored_under_every_condition(hashes, broken, scored, common):
    """An image that cannot be decoded takes a score from its own row, and under `other` from another one."""
    evaluation = evaluate(hashes, broken)
    for condition in CONDITIONS:
        assert "".join(str(one.position) for one in evaluation.scored[condition]) == scored[condition]
    for measured in evaluation.grounding.values():
        assert measured["n"] == len(common)
    right = [position for position in common if int(position) % 2 == 0]
    assert evaluation.grounding["true"]["preference_accuracy"] == len(right) / len(common)
    assert evaluation.grounding["true_minus_other"]["difference"] == 0.0
    assert evaluation.summary["n"] == len(scored["true"]), "the summary is over all pairs with their own image"
    assert [one.position for one in evaluation.unusable] == [i for i, name in enumerate(hashes) if name in broken]
    assert all(one.bad_image == f"{one.position}.jpg is broken" for one in evaluation.unusable)


def test_grounding_is_none_when_no_pair_is_scored_under_every_condition():
    evaluation = evaluate("AB", broken="B")  # A's row is to show B, and B's has no score with its own image
    assert evaluation.grounding is None
    assert evaluation.summary["n"] == 1 and len(evaluation.unusable) == 1


def test_grounding_is_none_when_only_the_own_image_is_shown():
    evaluation = evaluate("ABC", broken="B", conditions=("true",))
    assert evaluation.grounding is None and evaluation.summary["n"] == 2
    assert [pair.pair_id for pair in evaluation.pairs] == ["p0", "p2"]


def test_an_evaluation_without_any_score_says_why():
    with pytest.raises(UserError, match="could be scored: 0.jpg is broken"):
        evaluate("AB", broken="AB", conditions=("true",))
    with pytest.raises(UserError, match="could be scored: the evaluation set is empty"):
        writing.Evaluation.of(rows("A").select([]), {"true": ([], [])}, beta=0.1, min_subset=1)


def test_batches_change_no_score():
    whole = evaluate("ABCDE", broken="B", batch_size=5)
    assert evaluate("ABCDE", broken="B", batch_size=1) == evaluate("ABCDE", broken="B", batch_size=3) == whole


def test_a_scored_row_survives_json():
    evaluation = evaluate("ABC", broken="B")
    for one in [*evaluation.scored["true"], *evaluation.unusable]:
        assert scoring.ScoredRow.from_json(json.loads(json.dumps(one.to_json()))) == one


# --- rows of several processes, names, batches ----------------------------------------------------------------


@pytest.mark.parametrize(
    "positions, world_size, shares",
    [
        ([4, 2, 7, 1], 2, [[4, 7], [2, 1]]),
        ([4, 2, 7, 1, 3], 2, [[4, 7, 3], [2, 1, 3]]),  # all ranks step equally often: the last one repeats
        ([5], 3, [[5], [5], [5]]),
        ([5, 6], 1, [[5, 6]]),
        ([], 2, [[], []]),
    ],
)
def test_ranks_share_the_positions_in_turn(positions, world_size, shares):
    assert [scoring.shard(positions, rank, world_size) for rank in range(world_size)] == shares


def test_ranks_share_whole_batches_so_that_image_groups_survive():
    positions = list(range(16))  # four pairs per image, in the order of their groups
    shares = [scoring.shard(positions, rank, 2, batch_size=4) for rank in range(2)]
    assert shares == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert [scoring.shard(list(range(9)), rank, 2, 4) for rank in range(2)] == [[0, 1, 2, 3, 8], [4, 5, 6, 7, 8]]
    assert [scoring.shard(list(range(5)), rank, 2, 8) for rank in range(2)] == [[0, 1, 2], [3, 4]], "less than a round"


def test_merged_rows_are_each_there_once_in_the_order_of_the_set():
    good, bad = (
        [scoring.ScoredRow(i, str(i), "d", pair(i)) for i in range(4)],
        scoring.ScoredRow(4, "4", "d", None, "x"),
    )
    assert scoring.merge([[good[3], good[1], bad], [good[0], bad], [good[2], good[3]]]) == (good, [bad])
    assert scoring.merge([[], []]) == ([], [])


def test_names_are_unique_within_their_dataset():
    named = {"dataset": ["d", "d", "d", "e", "d", "e"], "pair_id": ["a", "a", "", "a", "a", ""]}
    assert scoring.unique_ids(named) == ["a", "a#2", "row-2", "a", "a#3", "row-5"]
    made = datasets.Dataset.from_dict(named)
    assert scoring.unique_ids(made) == scoring.unique_ids(named)


def test_pairs_of_one_image_come_together_only_where_the_recipe_and_the_condition_allow():
    made, order = rows(*"ABABAC"), [5, 4, 3, 2, 1, 0]

    def arranged(condition: str, group: bool = True, at_most: int = 2) -> list[int]:
        arguments = SimpleNamespace(group_pairs_by_image=group, max_pairs_per_image=at_most)
        return scoring.in_groups(made, order, 2, condition, arguments)

    for condition in ("true", "grey"):
        assert arranged(condition) == [4, 2, 3, 1, 5, 0]
        assert arranged(condition, group=False) == arranged(condition, at_most=1) == order
    assert arranged("other") == order


def test_the_loader_is_the_one_asked_for_and_progress_is_by_batch():
    made = (
        datasets.Dataset.from_list(
            [row("A", i) | {"dataset": "d", "source": "a", "question_type": "x"} for i in range(5)]
        )
        .add_column("chosen_ids", [[1]] * 5)
        .add_column("rejected_ids", [[2, 3]] * 5)
    )
    loaders, progress = [], []

    def score_batch(batch: dict) -> dict[str, torch.Tensor]:
        places = torch.tensor([-1.0 - one["position"] for one in batch["rows"]])
        return {"logps": torch.cat([places, 2 * places]).requires_grad_(), "loss": -places.half()}

    def collate(batch: list[dict]) -> dict:
        return {"rows": batch, "bad_images": []}

    def score(positions, **keys):
        return scoring.score(score_batch, made, positions, collate, 2, on_loader=loaders.append, **keys)

    scored = score([4, 0, 3, 2, 1], on_batch=progress.append)
    assert [[one.position for one in part] for part in progress] == [[4, 0], [3, 2], [1]]
    assert scored == [one for part in progress for one in part]
    for one in scored:
        assert (one.pair.chosen_logp, one.pair.rejected_logp) == (-1.0 - one.position, -2.0 - 2 * one.position)
        assert (one.pair.chosen_tokens, one.pair.rejected_tokens, one.loss) == (1, 2, 1.0 + one.position)
        assert (one.pair.subset, one.pair.image_condition) == ("a/x", "true")
    assert score([], num_workers=1) == []
    assert [(loader.batch_size, loader.num_workers) for loader in loaders] == [(2, 0), (2, 1)]
