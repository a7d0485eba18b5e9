"""Commands as a user starts them, in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from llava_orpo import recipe


def exit_code(main: Callable[[list[str]], int], *words: object) -> int:
    """The exit code of a command's `main` given `words`; its errors are on stderr as a user sees them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            recipe.run(main)
    return ended.value.code
