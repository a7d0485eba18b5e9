"""Pairs for `preference_loss: dpo_context`: what both answers begin with becomes the context."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import write_atomic

COLUMNS = ("chosen", "rejected")
SENTENCE = re.compile(r".*?[.!?](?:\s+|$)|.+$", re.DOTALL)  # with the space behind it; the last may have no full stop


def split(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    """(context, chosen, rejected): the whole sentences that both answers begin with, and what is left of each.

    None where they share none, or where one answer has no more than the shared ones. Joined by a space, context and
    rest give the answer again, but for the kind of space between them. As in SENTINEL (arXiv 2507.12455) the context
    ends at the first sentence that differs.
    """
    first, second = (SENTENCE.findall(answer.strip()) for answer in (chosen, rejected))
    count = 0
    while count < min(len(first), len(second)) and first[count].strip() == second[count].strip():
        count += 1
    rests = ["".join(sentences[count:]).strip() for sentences in (first, second)]
    return ("".join(first[:count]).strip(), *rests) if count and all(rests) else None


def write(source: Path, target: Path) -> tuple[int, int]:
    """Writes the pairs of a parquet file that share a beginning, with a column `context`; (written, left out).

    All other columns, the images too, are copied as they are.

    Raises:
        UserError: the file is no parquet, a column is missing, or no pair shares a sentence.
    """
    try:
        table = pq.read_table(source)
    except pa.ArrowInvalid as error:
        raise UserError(f"{source} cannot be read as parquet: {error}.") from None
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise UserError(f"{source} has no column {', '.join(missing)}: its pairs must be rows in RLAIF-V's schema.")
    made = [_split(row) for row in table.select(COLUMNS).to_pylist()]
    kept = [place for place, found in enumerate(made) if found]
    if not kept:
        raise UserError(f"{source}: no two answers of a pair begin with the same sentence; nothing is written.")
    table = table.take(kept)
    columns = zip(*(made[place] for place in kept), strict=True)
    for name, values in zip(("context", *COLUMNS), columns, strict=True):
        array = pa.array(values, pa.string())
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, array)
        else:
            table = table.append_column(name, array)
    target.parent.mkdir(parents=True, exist_ok=True)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomic(target, buffer.getvalue().to_pybytes())
    return len(kept), len(made) - len(kept)


def _split(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    answers = [row[name] for name in COLUMNS]
    return split(*answers) if all(isinstance(answer, str) for answer in answers) else None
