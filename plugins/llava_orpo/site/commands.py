"""docs/commands.md: what `-h` of every command prints, and what the head of every shell script says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PAGE = Path("docs") / "commands.md"
FOLDERS = ("scripts", "evals")
COLUMNS = "100"
SOURCED = "# Sourced by"  # how the head of a shell script begins that is no command
HEAD = """# Commands

The whole help of every command, as `-h` prints it, and the head of every shell script. Commands run from the
repository's root in the environment that `scripts/quickstart.sh` makes (`source .venv/bin/activate`); shell scripts
make the environment they need. `llamafactory-cli` is LLaMA-Factory's own command:
`llamafactory-cli train|export|chat|webchat|api recipe.yaml key=value`, with the keys of
[recipes/schema.json](../recipes/schema.json).

`python scripts/make_docs.py` makes this page.
"""


def page(root: Path) -> str:
    """docs/commands.md of the checkout `root`. Raises ValueError naming a command whose -h fails."""
    commands = [path for folder in FOLDERS for path in sorted((root / folder).glob("*.py"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        helps = dict(zip(commands, pool.map(lambda path: help_of(path, root), commands), strict=True))
    heads = {path: head for path in sorted((root / "scripts").glob("*.sh")) if (head := head_of(path))}
    sections = {
        "Shell scripts": heads,
        "Evaluation": {path: text for path, text in helps.items() if path.parent.name == "evals"},
        "Scripts": {path: text for path, text in helps.items() if path.parent.name == "scripts"},
    }
    parts = [HEAD]
    for name, texts in sections.items():
        parts.append(f"## {name}\n")
        for path, text in texts.items():
            place = path.relative_to(root).as_posix()
            call = "" if path.suffix == ".sh" else f"$ python {place} -h\n"
            parts.append(f"### {place}\n\n```text\n{call}{text}\n```\n")
    return "\n".join(parts).rstrip() + "\n"


def help_of(path: Path, root: Path) -> str:
    """What a Python command prints for -h."""
    imports = os.pathsep.join(filter(None, [str(root / "plugins"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1", "PYTHONPATH": imports}
    command = [sys.executable, str(path.relative_to(root)), "-h"]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise ValueError(f"{path}: -h ended with {ended.returncode}: {ended.stderr.strip()[-300:]}")
    return "\n".join(line.rstrip() for line in ended.stdout.strip().splitlines())


def head_of(path: Path) -> str:
    """The comment at the head of a shell script, "" for one that others source."""
    match = re.match(r"(?:#!.*\n)?((?:#.*\n)*)", path.read_text(encoding="utf-8"))
    if match is None or match[1].startswith(SOURCED):
        return ""
    return "\n".join(line.removeprefix("#").removeprefix(" ").rstrip() for line in match[1].splitlines())
