"""The record of one scored pair, and the two files evaluations keep: ``preference_pairs.jsonl`` and
``preference_eval.json``.

A pair is a dict, one line of ``preference_pairs.jsonl``::

    pair_id, dataset, subset, source, question_type, image_hash   str
    image_condition        "true" (the row's own image), "grey" or "other" (another row's image)
    chosen_logp            log-prob of the chosen response summed over its tokens, nats (rejected_logp alike)
    chosen_tokens          number of response tokens scored, at least 1 (rejected_tokens alike)
    correct                mean log-prob of chosen > that of rejected; a tie is not correct
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

Pair = dict
HISTORY_FORMAT = 1
_TEXT_FIELDS = ("pair_id", "dataset", "subset", "source", "question_type", "image_hash")
_CONDITIONS = ("true", "grey", "other")


def mean_logps(pair: Pair) -> tuple[float, float]:
    """Mean log-prob per response token of (chosen, rejected), in nats."""
    return pair["chosen_logp"] / pair["chosen_tokens"], pair["rejected_logp"] / pair["rejected_tokens"]


def is_correct(pair: Pair) -> bool:
    """True when the chosen response has strictly the higher mean log-prob."""
    chosen, rejected = mean_logps(pair)
    return chosen > rejected


def margin(pair: Pair) -> float:
    """Mean log-prob of chosen minus that of rejected, in nats per token."""
    chosen, rejected = mean_logps(pair)
    return chosen - rejected


def check_pair(pair: Pair, where: str) -> None:
    """ValueError, starting with ``where``, unless ``pair`` has every field of a scored pair."""
    if not isinstance(pair, dict):
        raise ValueError(f"{where}: expected an object, got {type(pair).__name__}.")
    for field in _TEXT_FIELDS:
        if not isinstance(pair.get(field), str):
            raise ValueError(f"{where}: field {field!r} must be a string, got {pair.get(field)!r}.")
    if pair.get("image_condition") not in _CONDITIONS:
        got = pair.get("image_condition")
        raise ValueError(f"{where}: image_condition must be one of {_CONDITIONS}, got {got!r}.")
    for side in ("chosen", "rejected"):
        tokens, logp = pair.get(f"{side}_tokens"), pair.get(f"{side}_logp")
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"{where}: {side}_tokens must be an integer of at least 1, got {tokens!r}.")
        if isinstance(logp, bool) or not isinstance(logp, (int, float)) or not math.isfinite(logp):
            raise ValueError(f"{where}: {side}_logp must be finite, got {logp!r}. Did the model diverge?")
        if logp > 1e-3 * tokens:  # more than rounding: not a log-prob
            raise ValueError(f"{where}: {side}_logp is {logp!r}, but a log-prob cannot be above 0.")


def write_pairs(path: str | os.PathLike, pairs: Iterable[Pair]) -> None:
    """Write ``preference_pairs.jsonl``; readers see the old file or the whole new one."""
    lines = [json.dumps(pair, ensure_ascii=False, allow_nan=False) for pair in pairs]
    _write_atomic(path, "".join(line + "\n" for line in lines))


def read_pairs(path: str | os.PathLike) -> list[Pair]:
    """Read ``preference_pairs.jsonl``.

    Raises:
        ValueError: a line that is no valid pair, named as ``file:line``.
    """
    pairs = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                pair = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}). Delete it or score the set again.") from error
            check_pair(pair, where)
            if pair.get("correct") is not is_correct(pair):
                raise ValueError(f"{where}: 'correct' is {pair.get('correct')}; its log-probs say otherwise.")
            pairs.append(pair)
    return pairs


def append_history(path: str | os.PathLike, entry: dict) -> None:
    """Add one evaluation {"step", "epoch", "dataset", "metrics", "grounding"} to ``preference_eval.json``.

    An entry of the same step and dataset is replaced: a resumed run evaluates a step again. Sorted by step.

    Raises:
        ValueError: the file there is not a preference history (named).
    """
    history = read_history(path) if os.path.exists(path) else []
    same = (entry["step"], entry["dataset"])
    history = [old for old in history if (old["step"], old["dataset"]) != same] + [entry]
    history.sort(key=lambda old: old["step"])
    content = {"format": HISTORY_FORMAT, "history": history}
    _write_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_history(path: str | os.PathLike) -> list[dict]:
    """Entries of ``preference_eval.json``, by step; ValueError names a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not JSON ({error.msg}). Move it away and run again."
        ) from error
    if not isinstance(content, dict) or content.get("format") != HISTORY_FORMAT:
        raise ValueError(
            f"{path}: no preference history of format {HISTORY_FORMAT}. Move it away and run again."
        )
    return content["history"]


def _write_atomic(path: str | os.PathLike, text: str) -> None:
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
