"""Per-pair scores to preference metrics: accuracy with its interval, margins, subsets, paired comparisons.

Pairs are `records.ScoredPair`. ORPO compares mean log-probs (arXiv 2403.07691, 4.1), so "margin" here is the mean
log-prob of chosen minus that of rejected, in nats per token. All sums are exact (`math.fsum`): no result depends on the
order of the pairs, on batches or on processes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from ..errors import UserError
from .records import ScoredPair

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
GROUP_KEYS = ("source", "question_type", "subset")
# Log-probs above this are moved to it, as step.orpo.log1m_exp does in float32, in which log-probs are computed: nearer
# to certainty they are below their own rounding error, and at p = 1 the odds would be infinite.
_MAX_LOGP = -(2.0**-23)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion (scipy `BinomTestResult.proportion_ci`)."""
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def summarize(pairs: Sequence[ScoredPair], beta: float, min_subset: int = 20) -> dict:
    """All metrics of one scored set.

    Args:
        pairs: scored pairs of one image condition, each (dataset, pair_id) once.
        beta: ORPO's weight of the odds-ratio term (LLaMA-Factory's `pref_beta`; lambda in the paper).
        min_subset: a group smaller than this gets only its count in `small_subsets`, not metrics.

    Returns:
        Flat floats and ints under the names LLaMA-Factory and TRL log (`rewards/*`, `logps/*`, `sft_loss`,
        `odds_ratio_loss`) beside ours: `preference_accuracy` with `_low` and `_high`, `preference_accuracy_sum` (by
        summed log-probs), `logps/margin` and `logps/margin_p05` .. `_p95`, `log_odds`, `loss`, `length/*`, `ties`,
        `n`; `length/accuracy_*` is absent where its `length/n_*` is 0. Two entries are nested: `subsets` {"source" |
        "question_type" | "subset": {name: the same flat metrics}} and `small_subsets` {"source" | ...: {name: n}}.
        The Wilson interval takes pairs as independent; where images repeat, `compare` resamples images.

    Raises:
        UserError: there are no pairs, a pair occurs twice, or image conditions are mixed.
    """
    _check_set(pairs)
    metrics = _flat_metrics(pairs, beta)
    metrics["subsets"] = {}
    metrics["small_subsets"] = {}
    for key in GROUP_KEYS:
        groups: dict[str, list[ScoredPair]] = {}
        for pair in pairs:
            groups.setdefault(getattr(pair, key), []).append(pair)
        large = {name: group for name, group in sorted(groups.items()) if len(group) >= min_subset}
        metrics["subsets"][key] = {name: _flat_metrics(group, beta) for name, group in large.items()}
        metrics["small_subsets"][key] = {
            name: len(group) for name, group in sorted(groups.items()) if name not in large
        }
    return metrics


def compare(pairs_a: Sequence[ScoredPair], pairs_b: Sequence[ScoredPair], seed: int = 0, n_boot: int = 2000) -> dict:
    """Compares two models (or two image conditions) on the same pairs; differences are a minus b.

    The 95 % percentile bootstrap resamples images with all their pairs, since answers on one image are not
    independent; pairs without an image count as images of their own. McNemar's exact test is two-sided
    (a binomial test on the pairs only one side got right).

    Returns:
        `n`, `n_images`, `accuracy_a`, `accuracy_b`, `difference` with `difference_low` and `_high`,
        `margin_difference` (nats per token) with `_low` and `_high`; `both`, `only_a`, `only_b`, `neither` (counts of
        correct pairs); `mcnemar_p`, `seed`, `n_boot`. The bounds are None when all pairs share one image, because
        there is nothing to resample.

    Raises:
        UserError: the two sides do not hold the same pairs (missing ids named), or one is not a valid set.
    """
    _check_set(pairs_a)
    _check_set(pairs_b)
    side_a = {pair.key: pair for pair in pairs_a}
    side_b = {pair.key: pair for pair in pairs_b}
    _check_same_pairs(side_a, side_b)
    counts = Counter((side_a[key].correct, side_b[key].correct) for key in side_a)
    only_a, only_b = counts[True, False], counts[False, True]

    images: dict[tuple, list[tuple]] = {}
    for key, pair in side_a.items():
        images.setdefault((pair.image_hash,) if pair.image_hash else key, []).append(key)
    clusters = [images[image] for image in sorted(images)]
    sizes = np.array([len(keys) for keys in clusters], dtype=np.float64)
    hits = np.array([sum(side_a[k].correct - side_b[k].correct for k in keys) for keys in clusters])
    gains = np.array([math.fsum(side_a[k].margin - side_b[k].margin for k in keys) for keys in clusters])
    n = len(side_a)
    hit_low, hit_high = cluster_bootstrap(hits.astype(np.float64), sizes, seed, n_boot)
    gain_low, gain_high = cluster_bootstrap(gains, sizes, seed, n_boot)
    return {
        "n": n,
        "n_images": len(clusters),
        "accuracy_a": (counts[True, True] + only_a) / n,
        "accuracy_b": (counts[True, True] + only_b) / n,
        "difference": (only_a - only_b) / n,
        "difference_low": hit_low,
        "difference_high": hit_high,
        "margin_difference": math.fsum(side_a[k].margin - side_b[k].margin for k in side_a) / n,
        "margin_difference_low": gain_low,
        "margin_difference_high": gain_high,
        "both": counts[True, True],
        "only_a": only_a,
        "only_b": only_b,
        "neither": counts[False, False],
        "mcnemar_p": float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
        "seed": seed,
        "n_boot": n_boot,
    }


def grounding(
    true: Sequence[ScoredPair],
    grey: Sequence[ScoredPair],
    other: Sequence[ScoredPair],
    seed: int = 0,
    n_boot: int = 2000,
) -> dict:
    """How much of the preference comes from the image (the question mDPO asks, arXiv 2406.11839).

    Args:
        true, grey, other: the same pairs scored with their own image, a grey one, and another row's.

    Returns:
        `true`, `grey`, `other`: each with `preference_accuracy` (`_low`, `_high`), `ties`, `n`, `logps/margin`;
        `true_minus_grey` and `true_minus_other` as from `compare`.
    """
    result: dict = {}
    for name, pairs in (("true", true), ("grey", grey), ("other", other)):
        _check_set(pairs)
        result[name] = _accuracy_metrics(pairs)
    result["true_minus_grey"] = compare(true, grey, seed=seed, n_boot=n_boot)
    result["true_minus_other"] = compare(true, other, seed=seed, n_boot=n_boot)
    return result


def grounding_of_common(true: Sequence[ScoredPair], grey: Sequence[ScoredPair], other: Sequence[ScoredPair]):
    """`grounding` over the pairs that all three sets hold; None if there is no such pair.

    A pair may be scored under some conditions only: its own image is damaged but a grey one is made, or its own can be
    decoded but the image that it should show under `other` cannot.
    """
    common = {pair.key for pair in true} & {pair.key for pair in grey} & {pair.key for pair in other}
    if not common:
        return None
    return grounding(*([pair for pair in pairs if pair.key in common] for pairs in (true, grey, other)))


def _flat_metrics(pairs: Sequence[ScoredPair], beta: float) -> dict:
    chosen, rejected = np.array([pair.mean_logps for pair in pairs], dtype=np.float64).T
    margins = chosen - rejected
    chosen_tokens = np.array([pair.chosen_tokens for pair in pairs])
    rejected_tokens = np.array([pair.rejected_tokens for pair in pairs])
    log_odds = log_odds_ratio(chosen, rejected)
    odds_ratio_loss = np.logaddexp(0.0, -log_odds)  # -log sigmoid
    metrics = _accuracy_metrics(pairs)
    by_sum = sum(pair.chosen_logp > pair.rejected_logp for pair in pairs)
    metrics["preference_accuracy_sum"] = by_sum / len(pairs)
    metrics |= {
        "rewards/chosen": _mean(beta * chosen),
        "rewards/rejected": _mean(beta * rejected),
        "rewards/margins": _mean(beta * margins),
        "rewards/accuracies": float(np.mean(beta * chosen > beta * rejected)),
        "logps/chosen": _mean(chosen),
        "logps/rejected": _mean(rejected),
        "sft_loss": _mean(-chosen),
        "odds_ratio_loss": _mean(odds_ratio_loss),
        "log_odds": _mean(log_odds),
        "loss": _mean(-chosen + beta * odds_ratio_loss),
        "length/chosen": _mean(chosen_tokens),
        "length/rejected": _mean(rejected_tokens),
    }
    for quantile, value in zip(QUANTILES, np.quantile(margins, QUANTILES), strict=True):
        metrics[f"logps/margin_p{round(100 * quantile):02d}"] = float(value)
    relations = {
        "chosen_longer": chosen_tokens > rejected_tokens,
        "equal": chosen_tokens == rejected_tokens,
        "chosen_shorter": chosen_tokens < rejected_tokens,
    }
    for name, members in relations.items():
        metrics[f"length/n_{name}"] = int(members.sum())
        if members.any():
            metrics[f"length/accuracy_{name}"] = float(np.mean(chosen[members] > rejected[members]))
    return metrics


def _accuracy_metrics(pairs: Sequence[ScoredPair]) -> dict:
    correct = sum(pair.correct for pair in pairs)
    low, high = wilson_interval(correct, len(pairs))
    return {
        "n": len(pairs),
        "preference_accuracy": correct / len(pairs),
        "preference_accuracy_low": low,
        "preference_accuracy_high": high,
        "ties": sum(chosen == rejected for chosen, rejected in (pair.mean_logps for pair in pairs)),
        "logps/margin": _mean(pair.margin for pair in pairs),
    }


def log_odds_ratio(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """log(odds(chosen) / odds(rejected)) of mean log-probs, odds p = p / (1 - p); float64, (n,) each."""
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: np.ndarray) -> np.ndarray:
    """log(1 - exp(x)) for x <= 0 without cancellation at either end (Maechler 2012, eq. 7)."""
    x = np.minimum(x, _MAX_LOGP)
    near_zero = x > -math.log(2.0)
    result = np.log1p(-np.exp(np.where(near_zero, -1.0, x)))
    result[near_zero] = np.log(-np.expm1(x[near_zero]))
    return result


def _mean(values: Iterable[float]) -> float:
    values = [float(value) for value in values]
    return math.fsum(values) / len(values)


def cluster_bootstrap(
    totals: np.ndarray, sizes: np.ndarray, seed: int, n_boot: int
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of sum(totals) / sum(sizes) under resampling of clusters; both (clusters,)."""
    if len(sizes) < 2:
        return None, None

    def ratio(totals: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        return totals.sum(axis=axis) / sizes.sum(axis=axis)

    result = stats.bootstrap(
        (totals, sizes),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=n_boot,
        method="percentile",
        batch=max(1, 4_000_000 // len(sizes)),  # bounds memory
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _check_set(pairs: Sequence[ScoredPair]) -> None:
    if not pairs:
        raise UserError("No scored pairs: the evaluation set is empty.")
    seen = set()
    for pair in pairs:
        if pair.key in seen:
            raise UserError(f"Pair {pair.pair_id!r} of dataset {pair.dataset!r} is in one set twice.")
        seen.add(pair.key)
    conditions = sorted({pair.image_condition for pair in pairs})
    if len(conditions) > 1:
        raise UserError(f"Image conditions {conditions} are mixed in one set: summarize one at a time.")


def _check_same_pairs(side_a: dict, side_b: dict) -> None:
    absent = {"first": side_b.keys() - side_a.keys(), "second": side_a.keys() - side_b.keys()}
    for name, missing in absent.items():
        if missing:
            ids = ", ".join(repr(pair_id) for _, pair_id in sorted(missing)[:5])
            more = ", ..." if len(missing) > 5 else ""
            raise UserError(
                f"{len(missing)} pair(s) missing from the {name} set: {ids}{more}."
                " Score both on the same dataset and split."
            )
