"""The pages and drawings of docs/ that are made from the code, so that they cannot say anything else."""

from __future__ import annotations

from pathlib import Path

from . import commands, drawings, messages


def contents(root: Path) -> dict[Path, str]:
    """{path: text} of every generated file of docs/ but keys.md (see `schema`)."""
    return {
        root / commands.PAGE: commands.page(root),
        root / messages.PAGE: messages.page(root),
        root / "docs" / "concepts" / "shared_prefix.svg": drawings.shared_prefix(),
        root / "docs" / "concepts" / "anyres.svg": drawings.anyres(),
    }


def write(root: Path) -> list[Path]:
    """Writes them; returns their paths."""
    written = contents(root)
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(written)
