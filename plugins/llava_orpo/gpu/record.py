"""What a GPU run finds: a JSON file that is whole after every entry, and the same as a table while it goes.

The file holds card, versions and stages; a stage holds entries, and every figure of an entry its unit.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import progress
from ..files import write_json

FAILED, UNFIT, LEFT_OUT, UNMEASURED = "failed", "does not fit", "left out", "not measured"
STATES = ("ok", FAILED, UNFIT, LEFT_OUT, UNMEASURED)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "llamafactory", "bitsandbytes", "triton")
OUT_OF_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)


class LeftOut(Exception):
    """Raised by a measurement that is left out; its text says why."""


class Unmeasured(Exception):
    """Raised by a measurement that this machine cannot make; its text says why."""


@dataclass
class Entry:
    """One line of a stage. figures: {name: (value, unit)}; unit "" for a plain number."""

    what: str
    state: str = "ok"
    figures: dict[str, tuple[Any, str]] = field(default_factory=dict)
    note: str = ""

    def json(self) -> dict[str, Any]:
        figures = {name: {"value": _plain(value), "unit": unit} for name, (value, unit) in self.figures.items()}
        return {"what": self.what, "state": self.state, "figures": figures, "note": self.note}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    return value


class Record:
    """Takes entries, prints each and writes the file; the tracebacks of what failed go to another file.

    Stages that an earlier run left in the file stay, as long as it ran on the same card with the same versions: a run
    may do one stage, or be repeated for one. Of a stage that runs again nothing stays.
    """

    def __init__(
        self, path: Path, head: Mapping[str, Any], say: Callable[[str], None] = print, tracebacks: Path | None = None
    ):
        self.path, self.say, self.tracebacks = path, say, tracebacks
        self.content: dict[str, Any] = {**head, "stages": self._earlier(head)}
        self._stage, self._mine = "", []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def _earlier(self, head: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(found[key] == head[key] for key in ("card", "versions", "dry_run"))
            return dict(found["stages"]) if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # none, or not one of ours: it is written over

    @property
    def failures(self) -> int:
        """Stages and entries that failed in this run."""
        stages = [self.content["stages"][title] for title in self._mine]
        return sum(s["state"] == FAILED for s in stages) + sum(
            e["state"] == FAILED for s in stages for e in s["entries"]
        )

    @contextlib.contextmanager
    def stage(self, title: str, budget: str = "") -> Iterator[None]:
        """A stage: what ends it early is recorded with its first line, and the next stage goes on."""
        self._stage = title
        found: dict[str, Any] = {"state": "ok", "error": "", "seconds": 0.0, **when_and_how(), "entries": []}
        self.content["stages"] = dict(sorted({**self.content["stages"], title: found}.items()))
        self._mine.append(title)
        self.say(f"\n{title}{f' ({budget})' if budget else ''}")
        started = time.perf_counter()
        try:
            yield
        except LeftOut as reason:
            found.update(state=LEFT_OUT, error=str(reason))
            self.say(f"  left out: {reason}")
        except Exception as error:
            found.update(state=FAILED, error=one_line(error))
            self._keep_traceback(title, error)
            self.say(f"  failed: {one_line(error)}")
        finally:
            found["seconds"] = round(time.perf_counter() - started, 2)
            self._write()

    def add(self, entry: Entry) -> None:
        if entry.state not in STATES:
            raise ValueError(f"{entry.state!r} is no state: {STATES}")
        self.content["stages"][self._stage]["entries"].append(entry.json())
        self.say(line(entry.json()))
        self._write()

    def attempt(
        self, what: str, measure: Callable[[], Entry | dict[str, tuple[Any, str]]], shows_itself: bool = False
    ) -> Entry:
        """Adds what `measure` gives, figures or a whole entry; an exception becomes the entry's state."""
        try:
            with contextlib.nullcontext() if shows_itself else progress.waiting(f"  {what}"):
                found = measure()
            entry = found if isinstance(found, Entry) else Entry(what, figures=found)
        except LeftOut as reason:
            entry = Entry(what, LEFT_OUT, note=str(reason))
        except Unmeasured as reason:
            entry = Entry(what, UNMEASURED, note=str(reason))
        except Exception as error:
            entry = Entry(what, UNFIT if out_of_memory(error) else FAILED, note=one_line(error))
            self._keep_traceback(what, error)
        free_memory()  # only here has an exception let go of what its frames held
        self.add(entry)
        return entry

    def _keep_traceback(self, what: str, error: BaseException) -> None:
        if self.tracebacks is not None and not out_of_memory(error):
            self.tracebacks.parent.mkdir(parents=True, exist_ok=True)
            with self.tracebacks.open("a", encoding="utf-8") as file:
                file.write(f"{what}\n{''.join(traceback.format_exception(error))}\n")

    def _write(self) -> None:
        write_json(self.path, self.content)


def line(entry: Mapping[str, Any]) -> str:
    """An entry of the file as one line."""
    figures = "  ".join(f"{name} {cell(one)}" for name, one in entry["figures"].items())
    state = "" if entry["state"] == "ok" else f"{entry['state']}"
    return "  " + "  ".join(part for part in (f"{entry['what']:<52}", state, figures, entry["note"]) if part).rstrip()


def cell(figure: Mapping[str, Any]) -> str:
    """A figure of the file with its unit."""
    value, unit = figure["value"], figure["unit"]
    if isinstance(value, float):
        value = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value} {unit}".rstrip()


def one_line(error: BaseException) -> str:
    """The kind and the first line of an error, with the next one where the first only announces it."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") or "look up to see its traceback" in lines[0] else lines[0]
    return f"{type(error).__name__}: {text}"[:300]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the card's memory is full."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def free_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def versions() -> dict[str, str | None]:
    """Installed versions of what the run uses, the driver's too; None for what is not there."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    found["cudnn"] = str(cudnn) if cudnn else None
    found["driver"] = _driver()
    return found


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def card(device: torch.device) -> dict[str, Any]:
    """Name, memory and compute capability of the device."""
    if device.type != "cuda":
        return {"name": "CPU, dry run", "memory": None, "capability": None}
    found = torch.cuda.get_device_properties(device)
    memory = {"value": found.total_memory, "unit": "bytes"}
    return {"name": found.name, "memory": memory, "capability": f"sm_{found.major}{found.minor}"}


def slug(name: str) -> str:
    """A card's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def head(device: torch.device, dry_run: bool) -> dict[str, Any]:
    """What stands above the stages."""
    return {
        "label": "dry run on a CPU: nothing here is a measurement" if dry_run else "measured",
        "dry_run": dry_run,
        "card": card(device),
        "versions": versions(),
    }


def when_and_how() -> dict[str, str]:
    """The command line and the time, which stand in each stage."""
    command = shlex.join(["bash", "scripts/gpu.sh", *sys.argv[1:]])
    return {"command": command, "time": time.strftime("%Y-%m-%d %H:%M")}
