"""Two models' answers to the same prompts, side by side, and the counts of a series of verdicts on them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from ..errors import UserError
from ..files import inside, read_jsonl
from ..preference.metrics import wilson_interval

OUTCOMES = ("a", "tie", "b")  # which answer is better
DATASET_ANSWERS = ("chosen", "rejected")  # may be given in place of a model's name


@dataclass(frozen=True)
class AnswerPair:
    """One prompt with the answers of models a and b; `image` is an existing file or None."""

    dataset: str
    pair_id: str
    subset: str
    question: str
    image: Path | None
    a: str
    b: str

    @property
    def key(self) -> str:
        """Names prompt and answers by content: changed answers are another pair."""
        image = self.image.name if self.image else None  # images are named by the hash of their bytes
        text = json.dumps([self.dataset, self.pair_id, image, self.question, self.a, self.b])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_answer_pairs(path: Path, a: str | None, b: str | None) -> tuple[str, str, list[AnswerPair]]:
    """(name of a, name of b, pairs) out of generations.jsonl.

    Args:
        a, b: model names as in "answers", or `chosen` / `rejected` for the dataset's own. If the file has two models
            and neither is given, b is the first one (usually the base) and a the second.
    Raises:
        UserError: there is no such file or model (the remedy is named); a line is damaged, or its image is missing or
            outside the file's folder (the line is named).
    """
    if not path.is_file():
        raise UserError(f"There is no {path}. evals/generate.py writes generations.jsonl.")
    lines = read_jsonl(path, "Make the file again with evals/generate.py.")
    models = list(dict.fromkeys(name for _, line in lines for name in line["answers"]))
    if a is None and b is None and len(models) == 2:
        b, a = models
    known = [*models, *DATASET_ANSWERS]
    if a not in known or b not in known or a == b:
        raise UserError(f"Name the two sides with a=… and b=…, out of: {', '.join(known)}. Got a={a}, b={b}.")
    pairs = []
    for where, line in lines:
        sides = [line[name] if name in DATASET_ANSWERS else line["answers"].get(name) for name in (a, b)]
        if None in sides:  # a model that was run without this prompt
            continue
        image = _image(path.parent, line["image"], where)
        pairs.append(AnswerPair(line["dataset"], line["pair_id"], line["subset"], line["question"], image, *sides))
    if not pairs:
        raise UserError(f"{path}: no prompt was answered by both {a} and {b}.")
    return a, b, pairs


def _image(folder: Path, image: dict[str, str] | None, where: str) -> Path | None:
    if image is None:
        return None
    path = inside(folder, image["path"], where)  # what is sent to a server or shown is this file's own
    if not path.is_file():
        raise UserError(f"{where}: the image {path} is gone. Make the file again with evals/generate.py.")
    return path


def tally(outcomes: Sequence[str]) -> dict[str, Any]:
    """Counts of "a", "b" and "tie" as win, tie and loss of a, with 95 % Wilson intervals and a sign test.

    Returns:
        n, win, tie, loss; `win_rate` (wins out of all), `loss_rate`, `decided_rate` (wins out of the pairs without a
        tie), each with `_low` and `_high`; `sign_test_p` (two-sided binomial test on the decided pairs). A rate is
        None if there is nothing to count.
    """
    counts = Counter(outcomes)
    n, win, loss = len(outcomes), counts["a"], counts["b"]
    result: dict[str, Any] = {"n": n, "win": win, "tie": counts["tie"], "loss": loss}
    for name, hits, of in (("win_rate", win, n), ("loss_rate", loss, n), ("decided_rate", win, win + loss)):
        low, high = wilson_interval(hits, of) if of else (None, None)
        result.update({name: hits / of if of else None, f"{name}_low": low, f"{name}_high": high})
    result["sign_test_p"] = float(stats.binomtest(win, win + loss).pvalue) if win + loss else None
    return result


def tally_text(a: str, b: str, counts: dict[str, Any]) -> str:
    """The counts of `tally` as a few printable lines."""

    def rate(name: str) -> str:
        if counts[name] is None:
            return "none"
        return f"{counts[name]:.1%}  [{counts[f'{name}_low']:.1%}, {counts[f'{name}_high']:.1%}]"

    p = "" if counts["sign_test_p"] is None else f"   sign test p = {counts['sign_test_p']:.3g}"
    return (
        f"{a} against {b}, {counts['n']} prompts: {counts['win']} won, {counts['tie']} tied, {counts['loss']} lost\n"
        f"  won                {rate('win_rate')}\n"
        f"  lost               {rate('loss_rate')}\n"
        f"  won of decided     {rate('decided_rate')}{p}"
    )
