"""Commands as a user starts them, in this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from helpers.paths import ROOT
from llava_orpo import recipe


def exit_code(main: Callable[[list[str]], int], *words: object) -> int:
    """The exit code of a command's `main` given `words`; its errors are on stderr as a user sees them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            recipe.run(main)
    return ended.value.code


def run_script(*words: object, codes: Sequence[int] = (0,), timeout: float = 3600, **environment: str) -> str:
    """What a command printed, run in the repository's root in a process of its own; fails with the end of its output.

    It sees no PYTHONPATH, and makes environments with the python of the tests.
    """
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode in codes, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
