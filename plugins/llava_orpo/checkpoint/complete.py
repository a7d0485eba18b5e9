"""Whether a training's checkpoint is whole, told from its files alone.

While a checkpoint is written, its folder holds `.saving`; at the end `complete.json` lists every file with its size,
and `.saving` goes. A folder with neither was written by another program: it is whole if its trainer_state.json is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from ..files import write_json

SAVING = ".saving"
MANIFEST = "complete.json"
STATE = "trainer_state.json"  # the last file that transformers' Trainer writes
PREFIX = "incomplete-"  # before the name: transformers counts every folder `checkpoint-*` among the checkpoints
_NAME = re.compile(r"checkpoint-(\d+)")


def begin(folder: str | Path) -> None:
    """Notes that the checkpoint is being written."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SAVING).touch()


def finish(folder: str | Path) -> None:
    """Notes that the checkpoint is whole, after its files have reached the disk."""
    folder = Path(folder)
    sizes = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in (SAVING, MANIFEST):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
            sizes[name] = file.stat().st_size
    write_json(folder / MANIFEST, {"files": sizes})
    (folder / SAVING).unlink(missing_ok=True)


def problem(folder: str | Path) -> str:
    """What the checkpoint lacks, as the end of a sentence; "" if it is whole."""
    folder = Path(folder)
    if (folder / SAVING).exists():
        return "it was being written when the training ended"
    name = MANIFEST if (folder / MANIFEST).exists() else STATE
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError):
        return f"{name} cannot be read"
    if name == STATE:
        return ""
    for file, size in content["files"].items():
        path = folder / file
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != size:
            return f"{file} has {path.stat().st_size} bytes in place of {size}"
    return ""


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>`, the newest step first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: str | Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(_NAME.fullmatch(Path(folder).name)[1])


def newest_whole(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint."""
    return next((path for path in checkpoints(output_dir) if not problem(path)), None)


def set_aside(folder: Path) -> Path:
    """Renames an incomplete checkpoint, in place of one of the same name that was set aside earlier."""
    aside = folder.with_name(PREFIX + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    return folder.rename(aside)
