"""Skipped rows: their list, and how many of them a recipe allows."""

from __future__ import annotations

import json
import os
from typing import Any

from llamafactory.extras import logging

from ..errors import UserError

logger = logging.get_logger("llamafactory." + __name__)
SKIPPED_FILE = "skipped_rows.jsonl"


def write_skipped(folder: str, entries: list[dict[str, Any]], rank: int = 0) -> str:
    """Appends entries to skipped_rows.jsonl (`skipped_rows.rank<k>.jsonl` on other ranks); returns the path."""
    os.makedirs(folder, exist_ok=True)
    name = SKIPPED_FILE if rank == 0 else SKIPPED_FILE.replace(".jsonl", f".rank{rank}.jsonl")
    path = os.path.join(folder, name)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    return path


def report_skipped(skipped: list[dict[str, Any]], considered: int, limit: float, folder: str, write: bool) -> None:
    """Lists skipped rows in `<folder>/skipped_rows.jsonl`, which replaces the list of an earlier run.

    Args:
        skipped: the rows, of `considered` in all; limit: the recipe's `max_skipped_fraction`.
        write: whether this process writes the file.
    Raises:
        UserError: their share is above the limit.
    """
    if not skipped:
        return
    path = os.path.join(folder, SKIPPED_FILE)
    if write:
        if os.path.exists(path):
            os.remove(path)
        write_skipped(folder, skipped)
    share = len(skipped) / max(considered, len(skipped))
    logger.warning_rank0(f"{len(skipped)} pairs skipped ({share:.2%}); each is listed in {path}.")
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
