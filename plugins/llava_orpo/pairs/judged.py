"""Scores of several answers to a prompt by the judge of `evals/judge.py`, which compares two answers at a time.

Every answer is compared with the next `opponents` ones on a ring, in both orders; a comparison is won only if both
verdicts agree. score = (won - lost) / comparisons, in [-1, 1]. With opponents=2 that is 4 requests per answer; all
pairs of 8 answers would be 112 requests in place of 32.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UserError
from ..evaluation import judging
from ..evaluation.answer_pairs import AnswerPair
from ..serving.client import EndpointUnusable

KEPT = "Verdicts that came are kept; the same command asks for the others."
VERDICTS = "verdicts.jsonl"


def ring(count: int, opponents: int) -> list[tuple[int, int]]:
    """The pairs (a, b) of `count` answers that are compared, each once."""
    found = {tuple(sorted((i, (i + step) % count))) for i in range(count) for step in range(1, opponents + 1)}
    return sorted(pair for pair in found if pair[0] != pair[1])


def scores(
    prompts: Mapping[int, tuple[AnswerPair, Sequence[str]]],
    asking: judging.Asking,
    folder: Path,
    opponents: int,
    confirm: Mapping,
) -> tuple[dict[int, list[float]], dict[int, str]]:
    """({prompt: a score per answer}, {prompt: why it has none}).

    prompts: {prompt: (an AnswerPair with its question and image, the distinct answers)}. confirm: keys of the command
    for `judging.confirm`. Verdicts go to a file in `folder` as they come, and are not asked for again.

    Raises UserError when the judge can't be used, stops answering, or the user does not want to send.
    """
    games = {
        prompt: [(a, b, _pair(shown, answers[a], answers[b])) for a, b in ring(len(answers), opponents)]
        for prompt, (shown, answers) in prompts.items()
    }
    asked = judging.tasks([game[2] for own in games.values() for game in own], asking.model, asking.criteria)
    done = {key: record for key, record in judging.read_verdicts(folder / VERDICTS).items() if key in asked}
    waiting = {key: task for key, task in asked.items() if key not in done}
    failed: dict[str, str] = {}
    if waiting:
        judging.confirm(waiting.values(), len(done), asking.criteria, dict(confirm))
        try:
            failed = asyncio.run(judging.judge(asking, waiting, done, folder / VERDICTS))
        except EndpointUnusable as error:
            raise UserError(f"judge_url={asking.client.base_url}: {error} {KEPT}") from None
    found, missing = {}, {}
    for prompt, own in games.items():
        keys = [
            [judging.verdict_key(game[2], order, asking.model, asking.criteria) for order in judging.ORDERS]
            for game in own
        ]
        lacking = [key for both in keys for key in both if key not in done]
        if lacking:
            missing[prompt] = f"no verdict: {failed.get(lacking[0], 'it was not asked for')}"
            continue
        points, played = [0] * len(prompts[prompt][1]), [0] * len(prompts[prompt][1])
        for (a, b, _), both in zip(own, keys, strict=True):
            outcomes = {done[key]["outcome"] for key in both}
            gain = {("a",): 1, ("b",): -1}.get(tuple(outcomes), 0)
            points[a], points[b] = points[a] + gain, points[b] - gain
            played[a], played[b] = played[a] + 1, played[b] + 1
        found[prompt] = [won / max(many, 1) for won, many in zip(points, played, strict=True)]
    return found, missing


def _pair(shown: AnswerPair, a: str, b: str) -> AnswerPair:
    return AnswerPair(shown.dataset, shown.pair_id, shown.subset, shown.question, shown.image, a, b)
