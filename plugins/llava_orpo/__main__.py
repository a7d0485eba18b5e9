"""`python -m llava_orpo train recipe.yaml …`: `llamafactory-cli` where `.pth` files are not read.

This is the case under launchers like `python -S`, in zipapps, and for a `PYTHONPATH` checkout that was never installed.
Child processes started by torchrun need the installed `.pth`, or `FORCE_TORCHRUN` unset.
"""

import sys

from . import autoload, early


def main() -> None:
    """Runs `llamafactory-cli` with this process's arguments, after the recipe was checked."""
    autoload.install()
    early.before_llamafactory(sys.argv[1:])

    from llamafactory.cli import main as cli

    cli()


if __name__ == "__main__":
    main()
