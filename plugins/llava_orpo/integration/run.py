"""The running recipe: its arguments, and the names and variables that were changed for it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..arguments import PluginArguments

UNSET = object()


@dataclass
class Run:
    """State of a recipe with `plugins: llava_orpo`, from reading its keys until the next recipe of the process.

    arguments      the plugin's keys
    originals      (module, name, original) of every swapped name
    variables      environment variables that were set for this recipe, with their values
    skipped        rows left out so far, as skipped_rows.jsonl lists them, out of `considered` rows
    shared_prefix  whether the shared-prefix step runs: the key, and no reason against it (`training.workflow.check`)
    precision      the dtype of bf16, fp16 or pure_bf16; None where the recipe has none; unset until a model is loaded
    recipe         all keys as they were given, in a recipe file or as a dict; None for keys in flags
    resumes_named  whether the recipe names its checkpoint: LLaMA-Factory fills in the newest one where it does not
    """

    arguments: PluginArguments
    originals: list[tuple[Any, str, Any]] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    considered: int = 0
    shared_prefix: bool = True
    precision: Any = UNSET
    resumes_named: bool = False
    recipe: dict[str, Any] | None = None

    def set_default(self, variable: str, value: str) -> None:
        """Sets an environment variable for this recipe, unless the user has set it."""
        if variable not in os.environ:
            os.environ[variable] = value
            self.variables[variable] = value


_run: Run | None = None  # one per process, because the swapped functions are called without any state of ours


def start(run: Run) -> None:
    """Makes `run` the current one, after what the run before it changed was put back."""
    global _run
    deactivate()
    _run = run


def deactivate() -> None:
    """Puts every swapped name and environment variable back: the next recipe may be one without the plugin."""
    global _run
    if _run is not None:
        for module, attribute, original in reversed(_run.originals):
            setattr(module, attribute, original)
        for variable, value in _run.variables.items():
            if os.environ.get(variable) == value:  # whoever changed it since wants it so
                del os.environ[variable]
        _run = None


def current() -> Run:
    """The running recipe's state. Raises RuntimeError outside of a recipe with the plugin."""
    if _run is None:
        raise RuntimeError("llava_orpo is not active: the recipe needs `plugins: llava_orpo`.")
    return _run
