"""Errors that a user can fix, and how they are shown: one line per problem, without a traceback.

The rule: whatever the user can fix in a recipe, on a command line or in a folder is a `UserError`. Everything else,
above all a bug of this package, keeps its traceback. `LLAVA_ORPO_DEBUG=1` shows the traceback of a `UserError` too.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import NoReturn

DEBUG_VARIABLE = "LLAVA_ORPO_DEBUG"
# The modules in which LLaMA-Factory reads and checks arguments: a ValueError raised there is about the recipe.
ARGUMENT_CHECKS = "llamafactory.hparams"


class UserError(ValueError):
    """Something the user can fix. Every argument is one problem, worded as a sentence that names the remedy."""

    exit_code = 1

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.args)


class UsageError(UserError):
    """A mistake in a recipe or on a command line, found before any work was done."""

    exit_code = 2


def debugging() -> bool:
    """Whether LLAVA_ORPO_DEBUG asks for the traceback of every error."""
    return os.environ.get(DEBUG_VARIABLE, "").lower() in ("1", "true", "yes", "on")


def foreseen(error: BaseException) -> bool:
    """Whether `error` is one that the user can fix, so that a traceback would only hide its message."""
    return isinstance(error, UserError) or (isinstance(error, ValueError) and _raised_in(error, ARGUMENT_CHECKS))


def show(error: BaseException) -> None:
    """Writes every problem of `error` to stderr, each behind `error: `."""
    problems = error.args if isinstance(error, UserError) else (error,)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def stop(error: UserError) -> NoReturn:
    """Ends the process with `error` shown. Raises SystemExit, or `error` itself under LLAVA_ORPO_DEBUG."""
    if debugging():
        raise error
    show(error)
    raise SystemExit(error.exit_code)


def end_by_signal(number: int, sentence: str) -> NoReturn:
    """Ends a process that a signal stopped: one line, unless it is empty, and the exit code 128 + `number`.

    A process of torchrun ends with 0, or torchrun would report its end as a failure; `launcher` gives the code then.
    """
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    raise SystemExit(0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + number)


def hide_tracebacks_of_foreseen_errors() -> None:
    """Lets this process end on a foreseen error with its message alone; any other error is shown as before."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if foreseen(error) and not debugging():
            _end_progress_bars()
            show(error)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


def _end_progress_bars() -> None:
    """Lets what comes next start on a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _raised_in(error: BaseException, package: str) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    name = traceback.tb_frame.f_globals.get("__name__", "") if traceback is not None else ""
    return name == package or name.startswith(package + ".")
