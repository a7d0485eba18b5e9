"""Whole columns of a dataset at once.

`datasets` 4 gives a lazy `Column` for `dataset[name]`: indexing it with a number reads one row from the Arrow table
(milliseconds once a table has many pieces), and iterating over it converts row by row. Whoever needs many values of a
column takes them from here.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from datasets import Dataset


def array(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """The column as Arrow holds it, in the dataset's order (a selection or a shuffle included); nothing is decoded."""
    whole = dataset.data.column(name)
    return whole if dataset._indices is None else whole.take(dataset._indices.column(0))


def values(rows: Dataset | Any, name: str) -> list[Any]:
    """The column as a list of Python values, for rows of any kind that gives a column by its name."""
    return array(rows, name).to_pylist() if isinstance(rows, Dataset) else list(rows[name])
