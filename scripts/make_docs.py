"""Writes the generated pages of the documentation again, after a change of a command, an error or a drawing.

    python scripts/make_docs.py
    python scripts/make_docs.py --site outputs/site/pages

Without a flag: docs/commands.md (the help of every command), docs/troubleshooting.md (every error by its message, with
the remedies of docs/troubleshooting.json) and the drawings in docs/concepts/. docs/keys.md comes from
scripts/make_schema.py. With --site: the folder of pages that the site is built from (`bash scripts/docs.sh`).
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo import recipe

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    parser = recipe.flags(__doc__)
    parser.add_argument("--site", type=Path, metavar="DIR", help="write the site's pages into this folder instead")
    parser.add_argument("--watch", action="store_true", help="with --site: and again whenever one of them changes")
    args = parser.parse_args(argv)
    if args.site:
        from llava_orpo.site import staging

        print(f"{args.site}: {len(staging.stage(ROOT, args.site.absolute()))} pages")
        if args.watch:
            staging.watch(ROOT, args.site.absolute())
        return 0
    from llava_orpo.site import generated

    for path in generated.write(ROOT):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    recipe.run(main)
