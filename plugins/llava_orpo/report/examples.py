"""Which examples a report shows, and what it says about each."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..preference.records import ScoredPair
from .inputs import Key, Run, Texts


@dataclass(frozen=True)
class Example:
    """One pair as shown.

    `after` and `before` are its scores where known; `rank` is its place when best and worst cases alternate, `place`
    its place in the files.
    """

    key: Key
    texts: Texts
    after: ScoredPair | None
    before: ScoredPair | None
    rank: int
    place: int

    @property
    def subset(self) -> str:
        scored = self.after or self.before
        return scored.subset if scored else ""

    @property
    def status(self) -> str:
        return _status(self.after)

    @property
    def change(self) -> str:
        """One of fixed, broken or same; empty when one side was not scored."""
        if not (self.after and self.before):
            return ""
        now, then = _status(self.after) == "correct", _status(self.before) == "correct"
        return "same" if now == then else "fixed" if now else "broken"

    @property
    def margin(self) -> float | None:
        return self.after.margin if self.after else None

    @property
    def margin_before(self) -> float | None:
        return self.before.margin if self.before else None

    @property
    def gain(self) -> float | None:
        return self.margin - self.margin_before if self.after and self.before else None

    def responses(self) -> list[dict]:
        """Chosen and rejected: {"name", "parts": [(text, differs)], "tokens", "logp", "logp_before"}."""
        parts = mark_differences(self.texts.chosen, self.texts.rejected)
        means = self.after.mean_logps if self.after else (None, None)
        earlier = self.before.mean_logps if self.before else (None, None)
        return [
            {
                "name": name,
                "parts": parts[side],
                "tokens": getattr(self.after, f"{name}_tokens") if self.after else None,
                "logp": means[side],
                "logp_before": earlier[side],
            }
            for side, name in enumerate(("chosen", "rejected"))
        ]


def choose_examples(after: Run, before: Run | None, texts: dict[Key, Texts], limit: int) -> list[Example]:
    """At most `limit` examples: the highest and lowest margins in turn, so that a cut keeps both ends.

    The pairs that were not scored come last.
    """
    scores = {pair.key: pair for pair in after.pairs["true"]}
    earlier = {pair.key: pair for pair in before.pairs["true"]} if before else {}
    by_margin = sorted((key for key in texts if key in scores), key=lambda key: (-scores[key].margin, key))
    half = (len(by_margin) + 1) // 2
    best, worst = by_margin[:half], by_margin[half:][::-1]
    alternating = [key for pair in zip(best, worst, strict=False) for key in pair] + best[len(worst) :]
    places = {key: place for place, key in enumerate(texts)}
    order = alternating + [key for key in texts if key not in scores]
    return [
        Example(key, texts[key], scores.get(key), earlier.get(key), rank, places[key])
        for rank, key in enumerate(order[:limit])
    ]


def mark_differences(chosen: str, rejected: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts cut into (text, differs) parts by words, so that a changed word stands out in long answers.

    Texts with little in common are left whole: marking nearly everything would mark nothing.
    """
    words = [re.findall(r"\s*\S+\s*$|\s*\S+", text) or [text] for text in (chosen, rejected)]
    plain = [[word.strip() for word in side] for side in words]
    matcher = difflib.SequenceMatcher(None, plain[0], plain[1], autojunk=False)
    if matcher.ratio() < 0.5:
        return [(chosen, False)], [(rejected, False)]
    parts: tuple[list, list] = ([], [])
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        for side, (start, end) in enumerate(((a, a_end), (b, b_end))):
            if end > start:
                text = "".join(words[side][start:end])
                space = text[: len(text) - len(text.lstrip())]
                parts[side].extend([(space, False), (text.lstrip(), tag != "equal")])
    return parts


def _status(pair: ScoredPair | None) -> str:
    if pair is None:
        return "unscored"
    chosen, rejected = pair.mean_logps
    return "correct" if chosen > rejected else "tie" if chosen == rejected else "incorrect"
