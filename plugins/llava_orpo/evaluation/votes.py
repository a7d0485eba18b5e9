"""Votes of people on answer pairs: how they are kept, and their counts."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..preference.metrics import wilson_interval
from .answer_pairs import OUTCOMES, AnswerPair, tally

CHOICES = ("left", "tie", "right")
RATER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


class VoteStore:
    """One append-only file per rater, `<folder>/<rater>.jsonl`; a vote is on the disk when `add` returns.

    Votes name the pair by content (`AnswerPair.key`), so votes on answers that were generated anew do not count. A
    later vote on the same pair replaces an earlier one; nothing is ever erased.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, rater: str) -> Path:
        """The rater's file. Raises UserError for a name that is not 1 to 40 of A-Z a-z 0-9 _ . -"""
        if not RATER.fullmatch(rater):
            raise UserError(
                "A rater's name has 1 to 40 letters, digits, '_', '.' or '-', and starts with a letter or digit."
            )
        return self.folder / f"{rater}.jsonl"

    def add(self, rater: str, pair: AnswerPair, choice: str, flipped: bool) -> None:
        """Appends a vote and waits until it is on the disk.

        Args:
            choice: "left", "right" or "tie"; flipped: model b was shown on the left.
        """
        if choice not in CHOICES:
            raise UserError(f"A choice is one of {', '.join(CHOICES)}; got {choice!r}.")
        outcome = "tie" if choice == "tie" else "ab"[(choice == "right") != flipped]
        vote = {
            "key": pair.key,
            "dataset": pair.dataset,
            "pair_id": pair.pair_id,
            "choice": choice,
            "flipped": flipped,
            "outcome": outcome,
            "time": round(time.time(), 3),
        }
        with self.path(rater).open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the same rater in two windows, or two servers
            _drop_cut_line(file)
            file.write(json.dumps(vote).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def outcomes(self, rater: str, pairs: Sequence[AnswerPair]) -> dict[str, str]:
        """{pair key: "a" | "b" | "tie"} of the rater's last vote on each of these pairs.

        Raises UserError for a damaged line, and names it.
        """
        path, wanted = self.path(rater), {pair.key for pair in pairs}
        if not path.exists():
            return {}
        data = path.read_bytes()
        votes: dict[str, str] = {}
        whole = data[: data.rfind(b"\n") + 1]  # without a last line that was cut off
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                vote = json.loads(line)
                key, outcome = vote["key"], vote["outcome"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}: not a vote ({error}). Repair or delete the line.") from error
            if outcome not in OUTCOMES:
                raise UserError(f"{path}:{number}: outcome {outcome!r} is none of {', '.join(OUTCOMES)}.")
            if key in wanted:
                votes[key] = outcome
        return votes

    def raters(self) -> list[str]:
        """The names of all raters who have a file."""
        return sorted(path.stem for path in self.folder.glob("*.jsonl"))


def _drop_cut_line(file) -> None:
    """Removes what a crash left of a vote that was never confirmed to its rater."""
    file.seek(0)
    data = file.read()
    if data and not data.endswith(b"\n"):
        file.truncate(data.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)


def flipped(seed: int, rater: str, pair: AnswerPair) -> bool:
    """Whether model b is shown on the left: a fair coin, the same whenever this rater sees this pair."""
    text = json.dumps([seed, rater, pair.key])
    return bool(hashlib.blake2b(text.encode(), digest_size=1).digest()[0] & 1)


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa (1960) of two raters' categories; None without pairs or where chance agreement is 1."""
    n = len(first)
    if not n:
        return None
    observed = sum(x == y for x, y in zip(first, second, strict=True)) / n
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][category] * counts[1][category] for category in counts[0]) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def majority(votes: Sequence[str]) -> str:
    """The category with the most votes; a tie if several share them."""
    (best, most), *rest = Counter(votes).most_common()
    return "tie" if rest and rest[0][1] == most else best


def summarize(
    pairs: Sequence[AnswerPair], votes: Mapping[str, Mapping[str, str]], humans: Sequence[str]
) -> dict[str, Any]:
    """Win rates and agreement.

    Args:
        votes: {rater: {pair key: outcome}}; humans: the raters that are people (the others count for agreement, but
            have no vote).

    Returns:
        raters {name: `tally` of that rater}, majority (`tally` over pairs, one vote per pair; pairs without a vote are
        left out), agreement [{raters, n, agreement (same category), agreement_low, _high, kappa}] for every two raters
        with common pairs.
    """
    decided = [found for pair in pairs if (found := [votes[r][pair.key] for r in humans if pair.key in votes[r]])]
    agreement = []
    for one, other in itertools.combinations(votes, 2):
        common = [pair.key for pair in pairs if pair.key in votes[one] and pair.key in votes[other]]
        if common:
            sides = [votes[one][key] for key in common], [votes[other][key] for key in common]
            same = sum(x == y for x, y in zip(*sides, strict=True))
            low, high = wilson_interval(same, len(common))
            agreement.append(
                {
                    "raters": [one, other],
                    "n": len(common),
                    "agreement": same / len(common),
                    "agreement_low": low,
                    "agreement_high": high,
                    "kappa": cohens_kappa(*sides),
                }
            )
    return {
        "n_pairs": len(pairs),
        "raters": {rater: tally(list(found.values())) for rater, found in votes.items()},
        "majority": tally([majority(found) for found in decided]),
        "agreement": agreement,
    }
