"""The recipe that is running: its arguments, and the names swapped while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..arguments import PluginArguments


@dataclass
class Run:
    """State of the recipe that is running."""

    arguments: PluginArguments
    recipe: dict[str, Any]
    originals: list[tuple[Any, str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    considered: int = 0
    shared_prefix: bool = True


_run: Run | None = None


def deactivate() -> None:
    """Puts every swapped name back; a recipe without the plugin then runs plain LLaMA-Factory."""
    global _run
    if _run is not None:
        for module, attribute, original in reversed(_run.originals):
            setattr(module, attribute, original)
        _run = None


def current() -> Run:
    """The running recipe's state. Raises RuntimeError outside of a recipe with the plugin."""
    if _run is None:
        raise RuntimeError("llava_orpo is not active: the recipe needs `plugins: llava_orpo`.")
    return _run
