"""Records of long work in a file that an interrupted run leaves and the next one continues. Needs no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import json_line, whole_lines, write_atomic


class Saved:
    """An append-only file of records: an interrupted run leaves it, and the next run of the same work continues it.

    Its first line holds a key that names the work. `records` are those of an earlier run with the same key. The file
    starts anew for other work and for restart, and a last line that was cut off is dropped.
    """

    def __init__(self, path: Path, key: str, restart: bool = False):
        self.path = path
        self.records: list[dict[str, Any]] = [] if restart or not path.exists() else _read(path, key)
        write_atomic(path, "".join(map(json_line, [{"key": key}, *self.records])))

    @contextmanager
    def appending(self, total: int, there: int, unit: str, name: str) -> Iterator[Callable[[list[dict]], None]]:
        """A function that appends records, under a progress bar from `there` to `total`."""
        with (
            self.path.open("a", encoding="utf-8") as out,
            tqdm(total=total, initial=there, unit=unit, desc=name) as bar,
        ):

            def add(records: list[dict[str, Any]]) -> None:
                out.writelines(map(json_line, records))
                out.flush()
                bar.update(len(records))

            yield add


def _read(path: Path, key: str) -> list[dict[str, Any]]:
    first, *rest = whole_lines(path.read_bytes()).decode("utf-8").split("\n")
    try:
        return [json.loads(line) for line in rest if line] if json.loads(first).get("key") == key else []
    except (json.JSONDecodeError, AttributeError):
        return []
