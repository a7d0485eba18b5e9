"""Rows that are left out: the list of them, and how many a recipe allows."""

from __future__ import annotations

import json
import os
from typing import Any

SKIPPED_FILE = "skipped_rows.jsonl"


def write_skipped(folder: str, entries: list[dict[str, Any]], rank: int = 0) -> str:
    """Appends entries to skipped_rows.jsonl (`skipped_rows.rank<k>.jsonl` on other ranks); returns the path."""
    os.makedirs(folder, exist_ok=True)
    name = SKIPPED_FILE if rank == 0 else SKIPPED_FILE.replace(".jsonl", f".rank{rank}.jsonl")
    path = os.path.join(folder, name)
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    return path
