"""Writes recipes/schema.json and docs/keys.md again, after a change of the plugin's keys or of LLaMA-Factory's version.

    python scripts/make_schema.py

Imports LLaMA-Factory, which takes about 15 seconds.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo import recipe


def main(argv: list[str]) -> int:
    recipe.flags(__doc__).parse_args(argv)
    from llava_orpo import schema

    for path in schema.write(Path(__file__).parent.parent):
        print(path)
    return 0


if __name__ == "__main__":
    recipe.run(main)
