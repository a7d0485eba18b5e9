"""Writing beside and renaming, and JSON lines: this module alone promises that a reader never sees half a file."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

Item = TypeVar("Item")


def write_atomic(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a whole file: readers see the old one or the new one, also after a crash or a power cut."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes indented JSON as `write_atomic` does; ValueError for NaN or infinity."""
    write_atomic(path, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def json_line(record: Any) -> str:
    """A record as one line of a JSON lines file, newline included; ValueError for NaN or infinity."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: str | os.PathLike, records: Iterable[Any]) -> None:
    """Writes one record per line as `write_atomic` does."""
    write_atomic(path, "".join(map(json_line, records)))


def read_jsonl(path: str | os.PathLike, remedy: str) -> list[tuple[str, Any]]:
    """[("file:line", record)] of a file that must be whole. Raises UserError naming the line that is not JSON."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # other line ends may stand inside a string
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}). {remedy}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            records.append((f"{path}:{number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}). {remedy}") from error
    return records


def inside(folder: Path, name: str, where: str) -> Path:
    """The file that a record names relative to its own folder.

    Raises UserError, starting with `where`, if it is not below that folder (symbolic links followed).
    """
    try:
        path = (folder / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise UserError(f"{where}: image path {name!r} names no file ({error}).") from error
    if folder.resolve() not in path.parents:
        raise UserError(f"{where}: image path {name!r} leaves the folder of the file.")
    return path


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items (all, if there are fewer), evenly spread over them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def whole_lines(data: bytes) -> bytes:
    """The lines of an append-only file, without a last line that an interruption cut off."""
    return data[: data.rfind(b"\n") + 1]
