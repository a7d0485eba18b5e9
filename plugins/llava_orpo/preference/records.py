"""The record of one scored pair, and the two files that evaluations keep.

These are `preference_pairs.jsonl` (one `ScoredPair` per line) and `preference_eval.json` (one entry per evaluation).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..files import read_jsonl, write_atomic, write_jsonl

PAIRS, HISTORY, EXAMPLES = "preference_pairs", "preference_eval.json", "preference_examples.jsonl"  # file names
HISTORY_FORMAT = 1
CONDITIONS = ("true", "grey", "other")  # the row's own image, a grey one, another row's
TEXT_FIELDS = ("pair_id", "dataset", "subset", "source", "question_type", "image_hash")


@dataclass(frozen=True)
class ScoredPair:
    """One preference pair with the log-probs that a model gives its two responses.

    pair_id, dataset, subset, source, question_type, image_hash   text; pair_id is unique within a dataset
    image_condition   which image was shown, one of `CONDITIONS`
    chosen_logp       log-prob of the chosen response summed over its tokens, in nats (rejected_logp alike)
    chosen_tokens     number of response tokens scored, at least 1 (rejected_tokens alike)

    Raises UserError, naming the pair, for a field of another type and for a score that cannot be.
    """

    pair_id: str
    dataset: str
    subset: str
    source: str
    question_type: str
    image_hash: str
    image_condition: str
    chosen_logp: float
    rejected_logp: float
    chosen_tokens: int
    rejected_tokens: int

    def __post_init__(self):
        if problem := _problem(self.__dict__):
            raise UserError(f"pair {self.pair_id!r}: {problem}")

    @property
    def key(self) -> tuple[str, str]:
        """The pair's name in an evaluation set."""
        return self.dataset, self.pair_id

    @property
    def mean_logps(self) -> tuple[float, float]:
        """Mean log-prob per response token of (chosen, rejected), in nats."""
        return self.chosen_logp / self.chosen_tokens, self.rejected_logp / self.rejected_tokens

    @property
    def margin(self) -> float:
        """Mean log-prob of chosen minus that of rejected, in nats per token."""
        chosen, rejected = self.mean_logps
        return chosen - rejected

    @property
    def correct(self) -> bool:
        """Whether the chosen response has strictly the higher mean log-prob; a tie is not correct."""
        chosen, rejected = self.mean_logps
        return chosen > rejected

    def to_json(self) -> dict[str, Any]:
        """The fields and `correct`: one line of preference_pairs.jsonl."""
        return {**dataclasses.asdict(self), "correct": self.correct}

    @classmethod
    def from_json(cls, content: Any, where: str) -> ScoredPair:
        """The pair of one line. Raises UserError, starting with `where`, for a missing field or a wrong value."""
        if not isinstance(content, Mapping):
            raise UserError(f"{where}: expected an object, got {type(content).__name__}.")
        fields = {field.name: content.get(field.name) for field in dataclasses.fields(cls)}
        if problem := _problem(fields):
            raise UserError(f"{where}: {problem}")
        pair = cls(**fields)
        if content.get("correct") is not pair.correct:
            raise UserError(f"{where}: 'correct' is {content.get('correct')}; its log-probs say otherwise.")
        return pair


def _problem(fields: Mapping[str, Any]) -> str:
    """What is wrong with the fields of a scored pair, or an empty string."""
    for field in TEXT_FIELDS:
        if not isinstance(fields[field], str):
            return f"field {field!r} must be a string, got {fields[field]!r}."
    if fields["image_condition"] not in CONDITIONS:
        return f"image_condition must be one of {CONDITIONS}, got {fields['image_condition']!r}."
    for side in ("chosen", "rejected"):
        tokens, logp = fields[f"{side}_tokens"], fields[f"{side}_logp"]
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            return f"{side}_tokens must be an integer of at least 1, got {tokens!r}."
        if isinstance(logp, bool) or not isinstance(logp, (int, float)) or not math.isfinite(logp):
            return f"{side}_logp must be finite, got {logp!r}. Did the model diverge?"
        if logp > 1e-3 * tokens:  # more than rounding: not a log-prob
            return f"{side}_logp is {logp!r}, but a log-prob cannot be above 0."
    return ""


def write_pairs(path: str | os.PathLike, pairs: Iterable[ScoredPair]) -> None:
    """Writes `preference_pairs.jsonl`; readers see the old file or the whole new one."""
    write_jsonl(path, (pair.to_json() for pair in pairs))


def read_pairs(path: str | os.PathLike) -> list[ScoredPair]:
    """Reads `preference_pairs.jsonl`. Raises UserError for a line that is not a valid pair, named as `file:line`."""
    lines = read_jsonl(path, "Delete it or score the set again.")
    return [ScoredPair.from_json(content, where) for where, content in lines]


def append_history(path: str | os.PathLike, entry: dict[str, Any]) -> None:
    """Adds one evaluation {"step", "epoch", "dataset", "metrics", "grounding"} to `preference_eval.json`.

    An entry of the same step and dataset is replaced: a resumed run evaluates a step again. Sorted by step.

    Raises:
        UserError: the file there is not a preference history (named).
    """
    history = read_history(path) if os.path.exists(path) else []
    same = (entry["step"], entry["dataset"])
    history = [old for old in history if (old["step"], old["dataset"]) != same] + [entry]
    history.sort(key=lambda old: old["step"])
    _write_history(path, history)


def drop_history_after(path: str | os.PathLike, step: int) -> None:
    """Drops the evaluations of later steps than `step` from `preference_eval.json`. Raises UserError as above."""
    history = read_history(path)
    kept = [entry for entry in history if entry["step"] <= step]
    if len(kept) < len(history):
        _write_history(path, kept)


def _write_history(path: str | os.PathLike, history: list[dict[str, Any]]) -> None:
    content = {"format": HISTORY_FORMAT, "history": history}
    write_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_history(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Entries of `preference_eval.json`, by step. Raises UserError naming a file that is not one."""
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}). Move it away and run again.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}). Move it away and run again.") from error
    known = isinstance(content, dict) and content.get("format") == HISTORY_FORMAT
    if not known or not isinstance(content.get("history"), list):
        raise UserError(f"{path}: no preference history of format {HISTORY_FORMAT}. Move it away and run again.")
    return content["history"]
