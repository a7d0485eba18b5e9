"""preference.py: hand-computed cases, references in scipy and statsmodels, and invariances."""

from __future__ import annotations

import json
import math
import random
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from llava_orpo.preference import metrics as preference
from llava_orpo.step import orpo


def make_pair(
    pair_id: str,
    chosen: float,
    rejected: float,
    chosen_tokens: int = 1,
    rejected_tokens: int = 1,
    source: str = "coco",
    question_type: str = "question answering",
    image_hash: str | None = None,
    condition: str = "true",
) -> dict:
    pair = {
        "pair_id": pair_id,
        "dataset": "demo",
        "subset": f"{source}/{question_type}",
        "source": source,
        "question_type": question_type,
        "image_hash": f"image of {pair_id}" if image_hash is None else image_hash,
        "image_condition": condition,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
    }
    return pair | {"correct": chosen / chosen_tokens > rejected / rejected_tokens}


def random_pairs(n: int, seed: int, images: int | None = None) -> list[dict]:
    rng = random.Random(seed)
    return [
        make_pair(
            f"p{i}",
            -rng.expovariate(0.2),
            -rng.expovariate(0.2),
            rng.randint(1, 9),
            rng.randint(1, 9),
            source=rng.choice(["coco", "vqa", "textvqa"]),
            image_hash=f"i{rng.randrange(images)}" if images else None,
        )
        for i in range(n)
    ]


logps = st.floats(min_value=-200.0, max_value=0.0)
lengths = st.integers(min_value=1, max_value=300)
pair_sets = st.lists(
    st.tuples(logps, logps, lengths, lengths, st.sampled_from(["coco", "vqa"])), min_size=1, max_size=40
).map(lambda rows: [make_pair(f"p{i}", c, r, m, n, source=s) for i, (c, r, m, n, s) in enumerate(rows)])


def test_hand_computed_metrics():
    """Probabilities with short log-odds: odds(1/2) = 1, odds(1/4) = 1/3, odds(4/5) = 4, odds(1/5) = 1/4."""
    pairs = [
        make_pair("right", 2 * math.log(1 / 2), 3 * math.log(1 / 4), 2, 3),  # log odds ratio: log 3
        make_pair("wrong", math.log(1 / 5), math.log(4 / 5)),  # log odds ratio: -log 16
        make_pair("tie", 2 * math.log(1 / 2), math.log(1 / 2), 2, 1),  # log odds ratio: 0
    ]
    beta = 0.1
    metrics = preference.summarize(pairs, beta=beta)
    assert metrics["n"] == 3
    assert metrics["ties"] == 1
    assert metrics["preference_accuracy"] == 1 / 3
    assert metrics["preference_accuracy_sum"] == 1 / 3  # the tie's sum is the lower one: also wrong
    assert metrics["rewards/accuracies"] == 1 / 3
    chosen = (math.log(1 / 2) + math.log(1 / 5) + math.log(1 / 2)) / 3
    rejected = (math.log(1 / 4) + math.log(4 / 5) + math.log(1 / 2)) / 3
    odds_loss = (
        math.log(1 + 1 / 3) + math.log(1 + 16) + math.log(2)
    ) / 3  # -log sigmoid(log x) = log(1 + 1/x)
    expected = {
        "logps/chosen": chosen,
        "logps/rejected": rejected,
        "logps/margin": chosen - rejected,
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * (chosen - rejected),
        "sft_loss": -chosen,
        "log_odds": (math.log(3) - math.log(16)) / 3,
        "odds_ratio_loss": odds_loss,
        "loss": -chosen + beta * odds_loss,
        "length/chosen": 5 / 3,
        "length/rejected": 5 / 3,
        "logps/margin_p50": 0.0,
        "logps/margin_p05": 0.9 * math.log(1 / 4) + 0.1 * 0.0,  # linear between the lowest two
        "logps/margin_p95": 0.1 * 0.0 + 0.9 * math.log(2),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_sum_and_mean_accuracy_differ_on_length():
    pairs = [make_pair("long", -4.0, -3.0, chosen_tokens=8, rejected_tokens=2)]
    metrics = preference.summarize(pairs, beta=0.1)
    assert metrics["preference_accuracy"] == 1.0
    assert metrics["preference_accuracy_sum"] == 0.0


def test_accuracy_by_length_difference():
    pairs = [
        make_pair("a", -1.0, -4.0, 5, 2),
        make_pair("b", -9.0, -1.0, 3, 2),
        make_pair("c", -9.0, -1.0, 3, 2),
        make_pair("d", -1.0, -4.0, 2, 2),
    ]
    metrics = preference.summarize(pairs, beta=0.1)
    assert (metrics["length/n_chosen_longer"], metrics["length/accuracy_chosen_longer"]) == (3, 1 / 3)
    assert (metrics["length/n_equal"], metrics["length/accuracy_equal"]) == (1, 1.0)
    assert metrics["length/n_chosen_shorter"] == 0
    assert "length/accuracy_chosen_shorter" not in metrics


def test_metrics_against_libraries():
    pairs = random_pairs(500, seed=1)
    beta = 0.25
    metrics = preference.summarize(pairs, beta=beta)
    chosen = np.array([p["chosen_logp"] / p["chosen_tokens"] for p in pairs])
    rejected = np.array([p["rejected_logp"] / p["rejected_tokens"] for p in pairs])
    assert metrics["preference_accuracy"] == np.mean(chosen > rejected)
    low, high = proportion_confint(int((chosen > rejected).sum()), 500, method="wilson")
    assert metrics["preference_accuracy_low"] == pytest.approx(low, rel=1e-12)
    assert metrics["preference_accuracy_high"] == pytest.approx(high, rel=1e-12)
    # scipy's logit through the probability itself: fine here, where no probability is within 1e-9 of 1
    log_odds = special.logit(np.exp(chosen)) - special.logit(np.exp(rejected))
    assert metrics["log_odds"] == pytest.approx(log_odds.mean(), rel=1e-9)
    assert metrics["odds_ratio_loss"] == pytest.approx(-special.log_expit(log_odds).mean(), rel=1e-9)
    assert metrics["loss"] == pytest.approx((-chosen - beta * special.log_expit(log_odds)).mean(), rel=1e-9)
    for quantile, name in [(0.05, "p05"), (0.25, "p25"), (0.5, "p50"), (0.75, "p75"), (0.95, "p95")]:
        reference = stats.mstats.mquantiles(chosen - rejected, [quantile], alphap=1, betap=1)[0]
        assert metrics[f"logps/margin_{name}"] == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (7, 7), (1, 1), (3, 4), (912, 1000)])
def test_wilson_interval_is_that_of_statsmodels(correct, n):
    expected = proportion_confint(correct, n, method="wilson")
    assert preference.wilson_interval(correct, n) == pytest.approx(expected, abs=1e-12)


def test_log_odds_near_probability_one_and_far_below():
    logps = np.array([-1e-6, -1e-3, -0.6931, -0.6932, -50.0, -2000.0])
    got = preference.log_odds_ratio(logps, np.full(6, math.log(0.5)))  # odds of 1/2 are 1
    getcontext().prec = 60
    for value, logp in zip(got, logps, strict=True):
        p = Decimal(float(logp)).exp()
        assert value == pytest.approx(float((p / (1 - p)).ln()), rel=1e-12)


def test_certain_responses_stay_finite():
    """A response of probability exactly 1 in float32 (log-prob 0) has large odds, not infinite ones."""
    both = preference.summarize([make_pair("both", 0.0, 0.0)], beta=0.1)
    assert both["log_odds"] == 0.0
    assert both["odds_ratio_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert both["ties"] == 1
    one = preference.summarize([make_pair("one", 0.0, -1.0)], beta=0.1)
    assert math.isfinite(one["log_odds"]) and one["log_odds"] > 16
    assert one["loss"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_agrees_with_the_training_loss(dtype, tolerance):
    """orpo.py is what training minimizes: torch there, numpy here. In float32 also where a response is certain."""
    pairs = random_pairs(200, seed=5)
    if dtype == torch.float32:
        pairs += [make_pair("sure", 0.0, -1.0), make_pair("both", 0.0, 0.0), make_pair("wrong", -30.0, 0.0)]
    means = torch.tensor([preference.mean_logps(pair) for pair in pairs], dtype=dtype)
    terms = orpo.orpo_loss(means[:, 0], means[:, 1], beta=0.3)
    metrics = preference.summarize(pairs, beta=0.3)
    for name, values in (
        ("loss", terms.loss),
        ("sft_loss", terms.sft),
        ("odds_ratio_loss", terms.odds_ratio),
        ("log_odds", terms.log_odds),
    ):
        assert metrics[name] == pytest.approx(values.double().mean().item(), rel=tolerance), name


def test_subsets_need_enough_pairs():
    pairs = [make_pair(f"a{i}", -1.0, -2.0, source="coco") for i in range(20)]
    pairs += [make_pair(f"b{i}", -2.0, -1.0, source="vqa") for i in range(19)]
    pairs += [make_pair("c", -1.0, -2.0, source="coco", question_type="detailed description")]
    metrics = preference.summarize(pairs, beta=0.1, min_subset=20)
    assert set(metrics["subsets"]) == set(metrics["small_subsets"]) == {"source", "question_type", "subset"}
    assert metrics["subsets"]["source"]["coco"]["preference_accuracy"] == 1.0
    assert metrics["subsets"]["source"]["coco"]["n"] == 21
    assert metrics["small_subsets"]["source"] == {"vqa": 19}
    assert metrics["subsets"]["question_type"]["question answering"]["preference_accuracy"] == 20 / 39
    assert metrics["small_subsets"]["question_type"] == {"detailed description": 1}
    assert set(metrics["subsets"]["subset"]) == {"coco/question answering"}
    flat = {k: v for k, v in metrics.items() if k not in ("subsets", "small_subsets")}
    assert set(metrics["subsets"]["source"]["coco"]) <= set(flat)


@given(pair_sets, st.randoms(use_true_random=False))
def test_order_changes_nothing(pairs, rng):
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    assert preference.summarize(shuffled, 0.1, min_subset=2) == preference.summarize(pairs, 0.1, min_subset=2)


@given(pair_sets, st.integers(min_value=1, max_value=7))
def test_parts_weighted_by_size_give_the_whole(pairs, size):
    """What a distributed run gathers: the mean over everything, not the mean of batch means."""
    whole = preference.summarize(pairs, beta=0.1)
    parts = [preference.summarize(pairs[i : i + size], beta=0.1) for i in range(0, len(pairs), size)]
    assert sum(part["n"] for part in parts) == whole["n"]
    assert sum(part["ties"] for part in parts) == whole["ties"]
    for name in (
        "preference_accuracy",
        "preference_accuracy_sum",
        "loss",
        "sft_loss",
        "log_odds",
        "logps/margin",
    ):
        weighted = math.fsum(part[name] * part["n"] for part in parts) / whole["n"]
        assert weighted == pytest.approx(whole[name], rel=1e-9, abs=1e-9), name


@given(pair_sets)
def test_relations_between_metrics(pairs):
    metrics = preference.summarize(pairs, beta=0.1)
    low, high = metrics["preference_accuracy_low"], metrics["preference_accuracy_high"]
    assert 0 <= low <= metrics["preference_accuracy"] <= high <= 1
    assert metrics["preference_accuracy"] * metrics["n"] + metrics["ties"] <= metrics["n"] + 1e-9
    assert metrics["odds_ratio_loss"] >= 0
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_bad_sets_are_refused():
    good = make_pair("p", -1.0, -2.0)
    with pytest.raises(ValueError, match="No scored pairs"):
        preference.summarize([], beta=0.1)
    with pytest.raises(ValueError, match="'p'.*twice"):
        preference.summarize([good, good], beta=0.1)
    with pytest.raises(ValueError, match="grey.*true.*mixed"):
        preference.summarize([good, make_pair("q", -1.0, -2.0, condition="grey")], beta=0.1)
    with pytest.raises(ValueError, match="'p'.*chosen_logp.*nan"):
        preference.summarize([good | {"chosen_logp": math.nan}], beta=0.1)
    with pytest.raises(ValueError, match="'p'.*rejected_tokens.*0"):
        preference.summarize([good | {"rejected_tokens": 0}], beta=0.1)
    with pytest.raises(ValueError, match="above 0"):
        preference.summarize([good | {"chosen_logp": 0.5}], beta=0.1)


def test_compare_against_mcnemar_and_hand_counts():
    a, b = random_pairs(300, seed=2), random_pairs(300, seed=3)
    result = preference.compare(a, b)
    right_a = np.array([p["correct"] for p in a])
    right_b = np.array([p["correct"] for p in b])
    table = [
        [(right_a & right_b).sum(), (right_a & ~right_b).sum()],
        [(~right_a & right_b).sum(), (~right_a & ~right_b).sum()],
    ]
    assert [[result["both"], result["only_a"]], [result["only_b"], result["neither"]]] == table
    assert result["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert result["difference"] == pytest.approx(right_a.mean() - right_b.mean(), abs=1e-15)
    gains = [preference.margin(x) - preference.margin(y) for x, y in zip(a, b, strict=True)]
    assert result["margin_difference"] == pytest.approx(np.mean(gains), rel=1e-9)
    assert result["n_images"] == 300


def test_compare_interval_matches_the_normal_one_when_images_differ():
    """With one pair an image the percentile bootstrap tends to the normal interval of the mean difference."""
    a, b = random_pairs(2000, seed=2), random_pairs(2000, seed=3)
    result = preference.compare(a, b, n_boot=4000)
    differences = np.array([x["correct"] - y["correct"] for x, y in zip(a, b, strict=True)], dtype=float)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(len(differences))
    assert result["difference_low"] == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert result["difference_high"] == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_compare_resamples_images():
    """Ten copies of a pair on its image tell nothing new: the interval must not shrink, as it would by pairs."""
    a, b = random_pairs(60, seed=7), random_pairs(60, seed=8)
    copies_a = [p | {"pair_id": f"{p['pair_id']}-{c}"} for p in a for c in range(10)]
    copies_b = [p | {"pair_id": f"{p['pair_id']}-{c}"} for p in b for c in range(10)]
    single, tenfold = preference.compare(a, b, seed=4), preference.compare(copies_a, copies_b, seed=4)
    assert tenfold["n"] == 600 and tenfold["n_images"] == 60
    assert tenfold["difference_low"] == pytest.approx(single["difference_low"], abs=1e-12)
    assert tenfold["difference_high"] == pytest.approx(single["difference_high"], abs=1e-12)
    by_pairs = preference.compare(
        [p | {"image_hash": p["pair_id"]} for p in copies_a],
        [p | {"image_hash": p["pair_id"]} for p in copies_b],
    )
    width = single["difference_high"] - single["difference_low"]
    assert by_pairs["difference_high"] - by_pairs["difference_low"] < width / 2


def test_compare_is_antisymmetric_seeded_and_free_of_order():
    a, b = random_pairs(80, seed=2, images=30), random_pairs(80, seed=3, images=30)
    b = [p | {"image_hash": q["image_hash"]} for p, q in zip(b, a, strict=True)]
    first = preference.compare(a, b, seed=11, n_boot=500)
    assert preference.compare(a[::-1], b[::-1], seed=11, n_boot=500) == first
    assert (
        preference.compare(a, b, seed=12, n_boot=500)["margin_difference_low"]
        != first["margin_difference_low"]
    )
    assert preference.compare(b, a, n_boot=500)["difference"] == -first["difference"]
    same = preference.compare(a, a)
    assert (same["difference"], same["difference_low"], same["difference_high"], same["mcnemar_p"]) == (
        0,
        0,
        0,
        1,
    )


def test_compare_with_one_image_has_no_interval():
    pairs = [make_pair(f"p{i}", -1.0, -2.0, image_hash="only") for i in range(5)]
    result = preference.compare(pairs, pairs)
    assert result["difference_low"] is None and result["margin_difference_high"] is None
    without_image = [p | {"image_hash": ""} for p in pairs]
    assert preference.compare(without_image, without_image)["n_images"] == 5


def test_compare_refuses_unequal_sets_and_names_the_missing():
    pairs = random_pairs(10, seed=1)
    with pytest.raises(ValueError, match=r"2 pair\(s\) missing from the first set: 'p0', 'p9'"):
        preference.compare(pairs[1:9], pairs)
    with pytest.raises(ValueError, match=r"1 pair\(s\) missing from the second set: 'p3'"):
        preference.compare(pairs, pairs[:3] + pairs[4:])


def test_grounding_reports_each_condition_and_its_difference():
    true = [make_pair(f"p{i}", -1.0, -2.0) for i in range(40)]
    grey = [make_pair(f"p{i}", -1.0 - i % 2 * 2, -2.0, condition="grey") for i in range(40)]
    other = [make_pair(f"p{i}", -2.0, -2.0, condition="other") for i in range(40)]
    result = preference.grounding(true, grey, other)
    assert [result[c]["preference_accuracy"] for c in ("true", "grey", "other")] == [1.0, 0.5, 0.0]
    assert result["other"]["ties"] == 40
    assert result["true_minus_grey"]["difference"] == 0.5
    assert result["true_minus_grey"]["difference_low"] < 0.5 < result["true_minus_grey"]["difference_high"]
    assert result["true_minus_other"]["mcnemar_p"] == pytest.approx(2 * 0.5**40, rel=1e-9)
    with pytest.raises(ValueError, match="missing from the second set: 'p7'"):
        preference.grounding(true, grey[:7] + grey[8:], other)


def test_pairs_survive_the_file_exactly(tmp_path):
    pairs = random_pairs(50, seed=9) + [make_pair("naïve 漢字 </script>\u2028\n", -0.1, -1e-300)]
    path = tmp_path / "preference_pairs.jsonl"
    preference.write_pairs(path, pairs)
    assert preference.read_pairs(path) == pairs
    preference.write_pairs(path, pairs[:3])
    assert preference.read_pairs(path) == pairs[:3]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"pair_id": "cut o', "not JSON"),
        ("[1, 2]", "expected an object"),
        ("{}", "'pair_id' must be a string"),
        (json.dumps(make_pair("p", -1.0, -2.0) | {"correct": False}), "'correct' is False"),
        (json.dumps(make_pair("p", -1.0, -2.0) | {"chosen_tokens": "3"}), "chosen_tokens"),
        (json.dumps(make_pair("p", -1.0, -2.0) | {"image_condition": "gray"}), "image_condition"),
        (json.dumps(make_pair("p", -1.0, -2.0) | {"chosen_logp": math.nan}), "chosen_logp"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "preference_pairs.jsonl"
    path.write_text(json.dumps(make_pair("good", -1.0, -2.0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"preference_pairs.jsonl:2: .*{message}"):
        preference.read_pairs(path)


def test_history_appends_replaces_and_sorts(tmp_path):
    path = tmp_path / "preference_eval.json"

    def entry(step: int, accuracy: float, dataset: str = "demo") -> dict:
        metrics = {"preference_accuracy": accuracy}
        return {"step": step, "epoch": step / 10, "dataset": dataset, "metrics": metrics, "grounding": None}

    preference.append_history(path, entry(20, 0.6))
    preference.append_history(path, entry(10, 0.5))
    preference.append_history(path, entry(20, 0.7))
    preference.append_history(path, entry(20, 0.9, dataset="other"))
    history = preference.read_history(path)
    assert [(e["step"], e["dataset"], e["metrics"]["preference_accuracy"]) for e in history] == [
        (10, "demo", 0.5),
        (20, "demo", 0.7),
        (20, "other", 0.9),
    ]
    assert json.loads(path.read_text())["format"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_broken_history_is_named_and_kept(tmp_path):
    path = tmp_path / "preference_eval.json"
    for text, message in [
        ('{"format": 1,\n "hist', ":2: not JSON"),
        ('{"format": 2}', "no preference history of format 1"),
    ]:
        path.write_text(text)
        with pytest.raises(
            ValueError, match=f"preference_eval.json{message}|preference_eval.json: {message}"
        ):
            preference.append_history(
                path, {"step": 1, "epoch": 0.1, "dataset": "d", "metrics": {}, "grounding": None}
            )
        assert path.read_text() == text


def test_an_unwritable_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "preference_pairs.jsonl"
    preference.write_pairs(path, random_pairs(2, seed=0))
    before = path.read_bytes()
    with pytest.raises(ValueError):
        preference.write_pairs(path, [make_pair("p", -1.0, -2.0) | {"chosen_logp": math.inf}])
    assert path.read_bytes() == before
