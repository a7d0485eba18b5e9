"""Skipped rows: their list, how many of them a recipe allows, and the recipe that allows none."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamafactory.extras import logging

from ..errors import UserError

logger = logging.get_logger("llamafactory." + __name__)
SKIPPED_FILE = "skipped_rows.jsonl"
RANK_FILES = "skipped_rows.rank*.jsonl"
TRAINING = "training"  # the stage of a row whose image turned out not to decode when it was used
EVALUATION = "evaluation"  # the same, in a command of evals/
WORDS = {
    "reading": "while reading",
    "tokenizing": "while tokenizing",
    TRAINING: "when the image was decoded",
    EVALUATION: "when the image was decoded",
}


def stop_at_bad_row(entries: list[dict[str, Any]], bad_rows: str) -> None:
    """Raises UserError that names the first of the entries if the recipe says `bad_rows: error`."""
    if bad_rows == "error" and entries:
        first = entries[0]
        named = [f"dataset {first['dataset']}"] if first.get("dataset") else []
        named += [f"row {first['row']}"] if first.get("row", -1) >= 0 else []
        named += [f"pair {first['pair_id']}"] if first.get("pair_id") else []
        reason = " ".join(str(first["reason"]).split()).rstrip(".")
        raise UserError(
            f"{', '.join(named)}: {reason}. Mend or remove the row, or set `bad_rows: skip` to leave such rows out."
        )


def write_skipped(folder: str, entries: list[dict[str, Any]], rank: int = 0) -> str:
    """Appends entries to skipped_rows.jsonl (`skipped_rows.rank<k>.jsonl` on other ranks); returns the path.

    What any of these files lists already, from another epoch, rank or start of the run, is not written again.
    """
    os.makedirs(folder, exist_ok=True)
    name = SKIPPED_FILE if rank == 0 else SKIPPED_FILE.replace(".jsonl", f".rank{rank}.jsonl")
    path = os.path.join(folder, name)
    known = {_key(entry) for entry in read_skipped(folder)}
    if new := [entry for entry in once(entries) if _key(entry) not in known]:
        _write(path, new, "a")
    return path


def read_skipped(folder: str | Path) -> list[dict[str, Any]]:
    """All entries in a folder, those of rank 0 first, each row once. A line cut off by an interruption is left out."""
    found = []
    for file in _files(folder):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return once(found)


def report_skipped(
    skipped: list[dict[str, Any]], considered: int, limit: float, folder: str, write: bool, keep_training: bool = False
) -> None:
    """Lists skipped rows in `<folder>/skipped_rows.jsonl`, which replaces the list of an earlier run.

    Args:
        skipped: the rows, of `considered` in all; limit: the recipe's `max_skipped_fraction`.
        write: whether this process writes the file.
        keep_training: keep what an earlier start of the same run found while training.
    Raises:
        UserError: their share is above the limit.
    """
    path = os.path.join(folder, SKIPPED_FILE)
    if write:
        kept = [entry for entry in read_skipped(folder) if keep_training and entry.get("stage") == TRAINING]
        for file in _files(folder):
            file.unlink()
        if skipped or kept:
            write_skipped(folder, [*skipped, *kept])
    if not skipped:
        return
    share = len(skipped) / max(considered, len(skipped))
    logger.warning_rank0(f"{len(once(skipped))} pairs skipped ({share:.2%}); each is listed in {path}.")
    if share > limit:
        too_long = sum("cutoff_len" in entry["reason"] for entry in skipped)
        advice = (
            f"{too_long} of them do not fit cutoff_len: raise it (LLaVA-1.6 needs up to 2,928 tokens for an image; "
            "4096 is safe) or set anyres_max_tiles"
            if too_long
            else "look at the listed reasons"
        )
        raise UserError(
            f"{len(skipped)} of {considered} pairs ({share:.1%}) would be skipped, more than "
            f"max_skipped_fraction: {limit}. {advice[0].upper() + advice[1:]}, or raise max_skipped_fraction. "
            f"The list: {path}"
        )


def summarize_skipped(folder: str) -> dict[str, int]:
    """Puts the lists of all ranks into skipped_rows.jsonl, each row once, and logs how many there are; {stage: count}.

    For one process, when the others have finished writing.
    """
    entries = read_skipped(folder)
    if not entries:
        return {}
    path = os.path.join(folder, SKIPPED_FILE)
    _write(path + ".partial", entries, "w")
    os.replace(path + ".partial", path)
    for file in Path(folder).glob(RANK_FILES):
        file.unlink()
    counts = dict(Counter(entry.get("stage", "") for entry in entries))
    parts = ", ".join(f"{count} {WORDS.get(stage, stage)}" for stage, count in counts.items())
    logger.warning_rank0(f"Left out of this run: {len(entries)} pairs ({parts}), each listed once in {path}.")
    return counts


def once(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries without those of a row that came before."""
    first: dict[tuple, dict[str, Any]] = {}
    for entry in entries:
        first.setdefault(_key(entry), entry)
    return list(first.values())


def _key(entry: dict[str, Any]) -> tuple:
    """What tells a row from all others: its number, or (pairs of other formats have none later on) its id."""
    row = entry.get("row", -1)
    return (entry.get("dataset"), entry.get("pair_id"), row if row is not None and row >= 0 else None)


def _files(folder: str | Path) -> list[Path]:
    own = Path(folder, SKIPPED_FILE)
    return [*([own] if own.exists() else []), *sorted(Path(folder).glob(RANK_FILES))]


def _write(path: str, entries: list[dict[str, Any]], mode: str) -> None:
    with open(path, mode, encoding="utf-8", errors="backslashreplace") as f:
        f.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
