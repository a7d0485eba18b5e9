"""JSON and JSONL files of pairs, row by row, so that one odd row is one skipped row.

`datasets` reads such files with a parser that wants one type per column: a number among the answers, or one cut line,
stops the whole file, and half a character (a lone surrogate) is silently taken out of a text. Here every row becomes
strings; a row that cannot be one carries the reason in the column `rows.UNREADABLE` and is skipped like any bad row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, Value

from ..errors import UserError
from . import image_store, rows

SUFFIXES = (".json", ".jsonl")
TEXTS = ("question", "chosen", "rejected")
VERSION = 2  # part of the cache key: raise it when a file gives other rows


def files_of(dataset_attr, dataset_dir: str) -> list[str]:
    """The JSON files of a registered dataset, sorted; [] for any other dataset."""
    if dataset_attr.load_from != "file" or dataset_attr.split not in (None, "train"):
        return []
    place = os.path.join(dataset_dir, dataset_attr.dataset_name)
    files = sorted(os.path.join(place, name) for name in os.listdir(place)) if os.path.isdir(place) else [place]
    return files if all(os.path.isfile(file) and file.endswith(SUFFIXES) for file in files) else []


def load(
    files: Sequence[str], image_column: str | None, cache_dir: str | None, texts: Sequence[str] = TEXTS
) -> Dataset:
    """The rows of the files as one dataset of text columns, kept in the cache of `datasets` while the files stay.

    image_column: the column that holds an image's path, `{path}`, or a list of one; "image" where an entry names none.
    texts: the columns that must hold text; lists and objects in others become JSON texts.
    Raises UserError for files without any row.
    """
    image_column = image_column or "image"
    columns: dict[str, None] = {}
    for file in files:
        for value in read(file):
            columns.update(dict.fromkeys(value) if isinstance(value, dict) else {})
    names = [name for name in columns if name != rows.UNREADABLE]
    if not names:
        raise UserError(f"{', '.join(files)}: there is no JSON object in it, so no pair.")
    features = Features({name: Value("large_string") for name in (*names, rows.UNREADABLE)})
    stamps = [(os.path.abspath(file), os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in files]
    return Dataset.from_generator(
        _generate,
        features=features,
        cache_dir=cache_dir,
        gen_kwargs={
            "stamps": stamps,
            "names": names,
            "image_column": image_column,
            "texts": list(texts),
            "version": VERSION,
        },
    )


def read(file: str) -> Iterator[Any]:
    """The values of a file: of a JSON array, of an object of columns, or of one line each.

    A line that is not JSON gives a ValueError (as a value, not raised).
    """
    if file.endswith(".json"):
        with open(file, "rb") as f:
            whole = parsed(f.read())
        if isinstance(whole, list):
            yield from whole
            return
        if isinstance(whole, dict):
            yield from _rows_of_columns(whole)
            return
    with open(file, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                value = parsed(line)
                yield ValueError(f"line {number} is {value}") if isinstance(value, ValueError) else value


def parsed(data: bytes) -> Any:
    """The JSON value, or a ValueError that says what is wrong."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error.reason} at byte {error.start})")
    except RecursionError:
        return ValueError("not readable JSON (nested too deeply)")
    except ValueError as error:
        return ValueError(f"not JSON ({error})")


def as_texts(
    value: Any, names: Sequence[str], image_column: str, texts: Sequence[str] = TEXTS
) -> dict[str, str | None]:
    """One row of a file as text columns, with the reason in `rows.UNREADABLE` if it cannot be used."""
    row: dict[str, str | None] = dict.fromkeys((*names, rows.UNREADABLE))
    if isinstance(value, ValueError):
        return {**row, rows.UNREADABLE: str(value)}
    if not isinstance(value, dict):
        return {**row, rows.UNREADABLE: f"the row is not a JSON object but {type(value).__name__}"}
    reason = None
    for name in names:
        item = value.get(name)
        try:
            if name in texts and item is not None and not isinstance(item, str):
                raise rows.RowError(f"`{name}` is not text but {type(item).__name__}")
            text = _path_of(item) if name == image_column else _text(item)
            if text is not None and any("\ud800" <= ch <= "\udfff" for ch in text):
                raise rows.RowError(f"`{name}` holds half a character (a lone surrogate)")
            row[name] = text
        except rows.RowError as error:
            reason = reason or str(error)
    return {**row, rows.UNREADABLE: reason}


def _generate(stamps, names, image_column, texts, version):
    for file, *_ in stamps:
        for value in read(file):
            yield as_texts(value, names, image_column, texts)


def _rows_of_columns(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """{"a": [1, 2]} as [{"a": 1}, {"a": 2}]; any other object is one row."""
    lengths = {len(values) if isinstance(values, list) else -1 for values in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        return [columns]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _text(item: Any) -> str | None:
    if item is None or isinstance(item, str):
        return item
    return json.dumps(item) if isinstance(item, dict | list) else str(item)


def _path_of(item: Any) -> str | None:
    """The path of an image, which may be the only one of a list; bytes have no place in JSON."""
    if isinstance(item, list):
        if len(item) > 1:
            raise rows.RowError(image_store.TOO_MANY.format(len(item)))
        item = item[0] if item else None
    if isinstance(item, dict):
        if item.get("bytes") is not None:
            raise rows.RowError("the image holds `bytes`, which JSON cannot: write it to a file and name the path")
        item = item.get("path")
    if item is not None and not isinstance(item, str):
        raise rows.RowError(f"the image is not a path but {type(item).__name__}")
    return item
