"""Scored answers to preference pairs: best against worst, of like length, at most so many for an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """An answer with its score (higher is better). tie: decides between equal scores; tokens: its length."""

    text: str
    score: float
    tokens: int
    tie: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt."""

    chosen: Answer
    rejected: Answer

    @property
    def margin(self) -> float:
        """By how much the chosen answer scores higher."""
        return self.chosen.score - self.rejected.score


@dataclass(frozen=True)
class Rules:
    """margin: the score difference that a pair must exceed. length_ratio: the longer answer's tokens over the
    shorter's, at most. pairs_per_image: the pairs of one image, over all its prompts, at most."""

    margin: float = 0.0
    length_ratio: float = 2.0
    pairs_per_image: int = 8


ALL_EQUAL = "all answers are the same text"
NO_MARGIN = "no two answers differ by more than the margin"
NO_LENGTH = "no two answers of like length differ by more than the margin"
FULL = "the image has its pairs already"


def normal(text: str) -> str:
    """The text with single spaces, by which two answers are the same."""
    return " ".join(text.split())


def distinct(texts: Sequence[str]) -> list[str]:
    """The texts in their order, each once."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(normal(text), text)
    return list(found.values())


def candidates(answers: Sequence[Answer], rules: Rules) -> tuple[list[Pair], str]:
    """(pairs of one prompt, each answer in at most one of them; why there is none, or "").

    The best answer goes with the worst of like length, then the second best with the worst that is left, and so on.
    """
    if len({normal(answer.text) for answer in answers}) < 2:
        return [], ALL_EQUAL
    order = sorted(answers, key=lambda answer: (-answer.score, -answer.tie))
    used: set[int] = set()
    pairs, differ = [], False
    for best in range(len(order)):
        if best in used:
            continue
        for worst in range(len(order) - 1, best, -1):
            pair = Pair(order[best], order[worst])
            if worst in used or pair.margin <= rules.margin:
                continue
            differ = True
            lengths = sorted((pair.chosen.tokens, pair.rejected.tokens))
            if lengths[1] <= rules.length_ratio * max(lengths[0], 1):
                pairs.append(pair)
                used |= {best, worst}
                break
    return pairs, "" if pairs else NO_LENGTH if differ else NO_MARGIN


def pair_up(
    prompts: Mapping[int, tuple[str, Sequence[Answer]]], rules: Rules
) -> tuple[list[tuple[int, Pair]], dict[int, str]]:
    """([(prompt, pair), …] in the order of the prompts, {prompt: why it has no pair}).

    prompts: {prompt: (name of its image, its scored answers)}. Where an image has more pairs than `pairs_per_image`,
    the first pairs of its prompts are taken before any second one, the larger margin first.
    """
    reasons: dict[int, str] = {}
    by_image: dict[str, list[tuple[int, int, Pair]]] = {}
    for prompt, (image, answers) in prompts.items():
        pairs, why = candidates(answers, rules)
        if why:
            reasons[prompt] = why
        by_image.setdefault(image or f"prompt {prompt}", []).extend(
            (number, prompt, pair) for number, pair in enumerate(pairs)
        )
    taken: dict[int, list[Pair]] = {prompt: [] for prompt in prompts}
    for found in by_image.values():
        found.sort(key=lambda entry: (entry[0], -entry[2].margin))
        for _, prompt, pair in found[: rules.pairs_per_image]:
            taken[prompt].append(pair)
    for prompt, pairs in taken.items():
        if not pairs:
            reasons.setdefault(prompt, FULL)
    return [(prompt, pair) for prompt, pairs in taken.items() for pair in pairs], reasons


def pairs_per_image(images: Sequence[str]) -> dict[int, int]:
    """{number of pairs: how many images have as many}, from the image of every pair."""
    return dict(sorted(Counter(Counter(images).values()).items()))
