"""preference/metrics.py: hand-computed cases, references in scipy and statsmodels, and invariances."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from llava_orpo.preference import metrics
from llava_orpo.preference.records import ScoredPair
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
) -> ScoredPair:
    return ScoredPair(
        pair_id=pair_id,
        dataset="demo",
        subset=f"{source}/{question_type}",
        source=source,
        question_type=question_type,
        image_hash=f"image of {pair_id}" if image_hash is None else image_hash,
        image_condition=condition,
        chosen_logp=chosen,
        rejected_logp=rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )


def random_pairs(n: int, seed: int, images: int | None = None) -> list[ScoredPair]:
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
    summary = metrics.summarize(pairs, beta=beta)
    assert summary["n"] == 3
    assert summary["ties"] == 1
    assert summary["preference_accuracy"] == 1 / 3
    assert summary["preference_accuracy_sum"] == 1 / 3  # the tie's sum is the lower one: also wrong
    assert summary["rewards/accuracies"] == 1 / 3
    chosen = (math.log(1 / 2) + math.log(1 / 5) + math.log(1 / 2)) / 3
    rejected = (math.log(1 / 4) + math.log(4 / 5) + math.log(1 / 2)) / 3
    odds_loss = (math.log(1 + 1 / 3) + math.log(1 + 16) + math.log(2)) / 3  # -log sigmoid(log x) = log(1 + 1/x)
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
        assert summary[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


def test_sum_and_mean_accuracy_differ_on_length():
    pairs = [make_pair("long", -4.0, -3.0, chosen_tokens=8, rejected_tokens=2)]
    summary = metrics.summarize(pairs, beta=0.1)
    assert summary["preference_accuracy"] == 1.0
    assert summary["preference_accuracy_sum"] == 0.0


def test_accuracy_by_length_difference():
    pairs = [
        make_pair("a", -1.0, -4.0, 5, 2),
        make_pair("b", -9.0, -1.0, 3, 2),
        make_pair("c", -9.0, -1.0, 3, 2),
        make_pair("d", -1.0, -4.0, 2, 2),
    ]
    summary = metrics.summarize(pairs, beta=0.1)
    assert (summary["length/n_chosen_longer"], summary["length/accuracy_chosen_longer"]) == (3, 1 / 3)
    assert (summary["length/n_equal"], summary["length/accuracy_equal"]) == (1, 1.0)
    assert summary["length/n_chosen_shorter"] == 0
    assert "length/accuracy_chosen_shorter" not in summary


def test_metrics_against_libraries():
    pairs = random_pairs(500, seed=1)
    beta = 0.25
    summary = metrics.summarize(pairs, beta=beta)
    chosen = np.array([p.chosen_logp / p.chosen_tokens for p in pairs])
    rejected = np.array([p.rejected_logp / p.rejected_tokens for p in pairs])
    assert summary["preference_accuracy"] == np.mean(chosen > rejected)
    low, high = proportion_confint(int((chosen > rejected).sum()), 500, method="wilson")
    assert summary["preference_accuracy_low"] == pytest.approx(low, rel=1e-12)
    assert summary["preference_accuracy_high"] == pytest.approx(high, rel=1e-12)
    # scipy's logit through the probability itself: fine here, where no probability is within 1e-9 of 1
    log_odds = special.logit(np.exp(chosen)) - special.logit(np.exp(rejected))
    assert summary["log_odds"] == pytest.approx(log_odds.mean(), rel=1e-9)
    assert summary["odds_ratio_loss"] == pytest.approx(-special.log_expit(log_odds).mean(), rel=1e-9)
    assert summary["loss"] == pytest.approx((-chosen - beta * special.log_expit(log_odds)).mean(), rel=1e-9)
    for quantile, name in [(0.05, "p05"), (0.25, "p25"), (0.5, "p50"), (0.75, "p75"), (0.95, "p95")]:
        reference = stats.mstats.mquantiles(chosen - rejected, [quantile], alphap=1, betap=1)[0]
        assert summary[f"logps/margin_{name}"] == pytest.approx(reference, rel=1e-9)


@pytest.mark.parametrize(("correct", "n"), [(0, 7), (7, 7), (1, 1), (3, 4), (912, 1000)])
def test_wilson_interval_is_that_of_statsmodels(correct, n):
    expected = proportion_confint(correct, n, method="wilson")
    assert metrics.wilson_interval(correct, n) == pytest.approx(expected, abs=1e-12)


def test_log_odds_near_probability_one_and_far_below():
    logps = np.array([-1e-6, -1e-3, -0.6931, -0.6932, -50.0, -2000.0])
    got = metrics.log_odds_ratio(logps, np.full(6, math.log(0.5)))  # odds of 1/2 are 1
    getcontext().prec = 60
    for value, logp in zip(got, logps, strict=True):
        p = Decimal(float(logp)).exp()
        assert value == pytest.approx(float((p / (1 - p)).ln()), rel=1e-12)


def test_certain_responses_stay_finite():
    """A response of probability exactly 1 in float32 (log-prob 0) has large odds, not infinite ones."""
    both = metrics.summarize([make_pair("both", 0.0, 0.0)], beta=0.1)
    assert both["log_odds"] == 0.0
    assert both["odds_ratio_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert both["ties"] == 1
    one = metrics.summarize([make_pair("one", 0.0, -1.0)], beta=0.1)
    assert math.isfinite(one["log_odds"]) and one["log_odds"] > 16
    assert one["loss"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_agrees_with_the_training_loss(dtype, tolerance):
    """orpo.py is what training minimizes: torch there, numpy here. In float32 also where a response is certain."""
    pairs = random_pairs(200, seed=5)
    if dtype == torch.float32:
        pairs += [make_pair("sure", 0.0, -1.0), make_pair("both", 0.0, 0.0), make_pair("wrong", -30.0, 0.0)]
    means = torch.tensor([pair.mean_logps for pair in pairs], dtype=dtype)
    terms = orpo.orpo_loss(means[:, 0], means[:, 1], beta=0.3)
    summary = metrics.summarize(pairs, beta=0.3)
    for name, values in (
        ("loss", terms.loss),
        ("sft_loss", terms.sft),
        ("odds_ratio_loss", terms.odds_ratio),
        ("log_odds", terms.log_odds),
    ):
        assert summary[name] == pytest.approx(values.double().mean().item(), rel=tolerance), name


float32_logps = st.floats(min_value=-200.0, max_value=0.0, width=32)
EPS = torch.finfo(torch.float32).eps


@given(float32_logps, float32_logps)
def test_log_odds_are_those_of_the_training_loss(chosen, rejected):
    """metrics.py has its own log(1 - p): it must stay step.orpo.log1m_exp, and limit p where float32 does there."""
    trained = orpo.log_odds(torch.tensor([chosen]), torch.tensor([rejected])).item()
    assert metrics.log_odds_ratio(np.array([chosen]), np.array([rejected]))[0] == pytest.approx(
        trained, rel=1e-5, abs=1e-4
    )
    below = np.minimum([chosen, rejected], -EPS)  # where neither has a limit, even in float64
    exact = orpo.log_odds(*torch.tensor(below).split(1)).item()
    assert metrics.log_odds_ratio(*np.split(below, 2))[0] == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_log_of_the_rest_is_that_of_the_training_loss():
    """Also in the tail, which log-odds would hide behind the log-probs themselves."""
    edges = [0.0, -1e-30, -1e-9, -EPS / 2, -EPS, -2 * EPS, -1e-3, -0.6931, -math.log(2.0), -0.6932]
    logps = np.array(edges + [-1.5, -10.0, -50.0, -80.0] + [-(2.0**power) for power in range(20)])
    in_float32 = orpo.log1m_exp(torch.tensor(logps, dtype=torch.float32)).double().numpy()
    assert metrics._log1mexp(logps) == pytest.approx(in_float32, rel=1e-5, abs=1e-37)
    limited = np.minimum(logps, -EPS)
    assert metrics._log1mexp(logps) == pytest.approx(orpo.log1m_exp(torch.tensor(limited)).numpy(), rel=1e-13, abs=0)


def test_subsets_need_enough_pairs():
    pairs = [make_pair(f"a{i}", -1.0, -2.0, source="coco") for i in range(20)]
    pairs += [make_pair(f"b{i}", -2.0, -1.0, source="vqa") for i in range(19)]
    pairs += [make_pair("c", -1.0, -2.0, source="coco", question_type="detailed description")]
    summary = metrics.summarize(pairs, beta=0.1, min_subset=20)
    assert metrics.summarize(pairs, beta=0.1) == summary, "20 pairs unless the recipe says otherwise"
    assert set(summary["subsets"]) == set(summary["small_subsets"]) == {"source", "question_type", "subset"}
    assert summary["subsets"]["source"]["coco"]["preference_accuracy"] == 1.0
    assert summary["subsets"]["source"]["coco"]["n"] == 21
    assert summary["small_subsets"]["source"] == {"vqa": 19}
    assert summary["subsets"]["question_type"]["question answering"]["preference_accuracy"] == 20 / 39
    assert summary["small_subsets"]["question_type"] == {"detailed description": 1}
    assert set(summary["subsets"]["subset"]) == {"coco/question answering"}
    flat = {k: v for k, v in summary.items() if k not in ("subsets", "small_subsets")}
    assert set(summary["subsets"]["source"]["coco"]) <= set(flat)


@given(pair_sets, st.randoms(use_true_random=False))
def test_order_changes_nothing(pairs, rng):
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    assert metrics.summarize(shuffled, 0.1, min_subset=2) == metrics.summarize(pairs, 0.1, min_subset=2)


@given(pair_sets, st.integers(min_value=1, max_value=7))
def test_parts_weighted_by_size_give_the_whole(pairs, size):
    """What a distributed run gathers: the mean over everything, not the mean of batch means."""
    whole = metrics.summarize(pairs, beta=0.1)
    parts = [metrics.summarize(pairs[i : i + size], beta=0.1) for i in range(0, len(pairs), size)]
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
    summary = metrics.summarize(pairs, beta=0.1)
    low, high = summary["preference_accuracy_low"], summary["preference_accuracy_high"]
    assert 0 <= low <= summary["preference_accuracy"] <= high <= 1
    assert summary["preference_accuracy"] * summary["n"] + summary["ties"] <= summary["n"] + 1e-9
    assert summary["odds_ratio_loss"] >= 0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_bad_sets_are_refused():
    good = make_pair("p", -1.0, -2.0)
    with pytest.raises(ValueError, match="No scored pairs"):
        metrics.summarize([], beta=0.1)
    with pytest.raises(ValueError, match="'p'.*twice"):
        metrics.summarize([good, good], beta=0.1)
    with pytest.raises(ValueError, match="grey.*true.*mixed"):
        metrics.summarize([good, make_pair("q", -1.0, -2.0, condition="grey")], beta=0.1)


def test_compare_against_mcnemar_and_hand_counts():
    a, b = random_pairs(300, seed=2), random_pairs(300, seed=3)
    result = metrics.compare(a, b)
    right_a = np.array([p.correct for p in a])
    right_b = np.array([p.correct for p in b])
    table = [
        [(right_a & right_b).sum(), (right_a & ~right_b).sum()],
        [(~right_a & right_b).sum(), (~right_a & ~right_b).sum()],
    ]
    assert [[result["both"], result["only_a"]], [result["only_b"], result["neither"]]] == table
    assert (result["accuracy_a"], result["accuracy_b"]) == (right_a.mean(), right_b.mean())
    assert result["mcnemar_p"] == pytest.approx(mcnemar(table, exact=True).pvalue, rel=1e-9)
    assert result["difference"] == pytest.approx(right_a.mean() - right_b.mean(), abs=1e-15)
    gains = [x.margin - y.margin for x, y in zip(a, b, strict=True)]
    assert result["margin_difference"] == pytest.approx(np.mean(gains), rel=1e-9)
    assert result["n_images"] == 300


def test_compare_interval_matches_the_normal_one_when_images_differ():
    """With one pair an image the percentile bootstrap tends to the normal interval of the mean difference."""
    a, b = random_pairs(2000, seed=2), random_pairs(2000, seed=3)
    result = metrics.compare(a, b, n_boot=4000)
    differences = np.array([x.correct - y.correct for x, y in zip(a, b, strict=True)], dtype=float)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(len(differences))
    assert result["difference_low"] == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert result["difference_high"] == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_compare_resamples_images():
    """Ten copies of a pair on its image tell nothing new: the interval must not shrink, as it would by pairs."""
    a, b = random_pairs(60, seed=7), random_pairs(60, seed=8)
    copies_a = [replace(p, pair_id=f"{p.pair_id}-{c}") for p in a for c in range(10)]
    copies_b = [replace(p, pair_id=f"{p.pair_id}-{c}") for p in b for c in range(10)]
    single, tenfold = metrics.compare(a, b, seed=4), metrics.compare(copies_a, copies_b, seed=4)
    assert tenfold["n"] == 600 and tenfold["n_images"] == 60
    assert tenfold["difference_low"] == pytest.approx(single["difference_low"], abs=1e-12)
    assert tenfold["difference_high"] == pytest.approx(single["difference_high"], abs=1e-12)
    by_pairs = metrics.compare(
        [replace(p, image_hash=p.pair_id) for p in copies_a],
        [replace(p, image_hash=p.pair_id) for p in copies_b],
    )
    width = single["difference_high"] - single["difference_low"]
    assert by_pairs["difference_high"] - by_pairs["difference_low"] < width / 2


def test_compare_is_antisymmetric_seeded_and_free_of_order():
    a, b = random_pairs(80, seed=2, images=30), random_pairs(80, seed=3, images=30)
    b = [replace(p, image_hash=q.image_hash) for p, q in zip(b, a, strict=True)]
    first = metrics.compare(a, b, seed=11, n_boot=500)
    assert metrics.compare(a[::-1], b[::-1], seed=11, n_boot=500) == first
    assert metrics.compare(a, b, seed=12, n_boot=500)["margin_difference_low"] != first["margin_difference_low"]
    assert metrics.compare(b, a, n_boot=500)["difference"] == -first["difference"]
    same = metrics.compare(a, a)
    assert (same["difference"], same["difference_low"], same["difference_high"], same["mcnemar_p"]) == (
        0,
        0,
        0,
        1,
    )


def test_compare_with_one_image_has_no_interval():
    pairs = [make_pair(f"p{i}", -1.0, -2.0, image_hash="only") for i in range(5)]
    result = metrics.compare(pairs, pairs)
    assert result["difference_low"] is None and result["margin_difference_high"] is None
    without_image = [replace(p, image_hash="") for p in pairs]
    assert metrics.compare(without_image, without_image)["n_images"] == 5


def test_compare_refuses_unequal_sets_and_names_the_missing():
    pairs = random_pairs(10, seed=1)
    with pytest.raises(ValueError, match=r"2 pair\(s\) missing from the first set: 'p0', 'p9'"):
        metrics.compare(pairs[1:9], pairs)
    with pytest.raises(ValueError, match=r"1 pair\(s\) missing from the second set: 'p3'"):
        metrics.compare(pairs, pairs[:3] + pairs[4:])


def test_grounding_reports_each_condition_and_its_difference():
    true = [make_pair(f"p{i}", -1.0, -2.0) for i in range(40)]
    grey = [make_pair(f"p{i}", -1.0 - i % 2 * 2, -2.0, condition="grey") for i in range(40)]
    other = [make_pair(f"p{i}", -2.0, -2.0, condition="other") for i in range(40)]
    result = metrics.grounding(true, grey, other)
    assert [result[c]["preference_accuracy"] for c in ("true", "grey", "other")] == [1.0, 0.5, 0.0]
    assert result["other"]["ties"] == 40
    assert result["true_minus_grey"]["difference"] == 0.5
    assert result["true_minus_grey"]["difference_low"] < 0.5 < result["true_minus_grey"]["difference_high"]
    assert result["true_minus_other"]["mcnemar_p"] == pytest.approx(2 * 0.5**40, rel=1e-9)
    with pytest.raises(ValueError, match="missing from the second set: 'p7'"):
        metrics.grounding(true, grey[:7] + grey[8:], other)


def test_the_seed_is_zero_unless_given_and_stands_in_the_result():
    """Two reports of the same scores have the same bounds, and say with which seed they can be drawn again."""
    a, b = random_pairs(30, seed=2), random_pairs(30, seed=3)
    result = metrics.compare(a, b)
    assert (result["seed"], result["n_boot"]) == (0, 2000)
    assert result == metrics.compare(a, b, seed=0, n_boot=2000)
    assert result["margin_difference_low"] != metrics.compare(a, b, seed=1)["margin_difference_low"]


def test_grounding_is_two_comparisons_with_one_seed():
    true, grey, other = (
        [replace(pair, image_condition=condition) for pair in random_pairs(30, seed=seed)]
        for seed, condition in ((2, "true"), (3, "grey"), (4, "other"))
    )
    for keys in ({"seed": 5, "n_boot": 300}, {}):
        result = metrics.grounding(true, grey, other, **keys)
        assert result["true_minus_grey"] == metrics.compare(true, grey, **keys)
        assert result["true_minus_other"] == metrics.compare(true, other, **keys)


def test_an_image_is_resampled_with_its_own_pairs():
    """One side right on every pair: the difference is 1 in every resample, however unequal the images' shares are."""
    images = [f"i{image}" for image, count in enumerate((1, 5, 20)) for _ in range(count)]
    right = [make_pair(f"p{i}", -1.0, -2.0, image_hash=image) for i, image in enumerate(images)]
    wrong = [make_pair(f"p{i}", -2.0, -1.0, image_hash=image) for i, image in enumerate(images)]
    result = metrics.compare(right, wrong, n_boot=200)
    assert (result["difference_low"], result["difference"], result["difference_high"]) == (1.0, 1.0, 1.0)
    assert result["margin_difference_low"] == result["margin_difference_high"] == 2.0
