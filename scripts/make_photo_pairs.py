"""Writes preference pairs on real photographs, in RLAIF-V's exact schema, for benchmarks, tests and dry runs.

    python scripts/make_photo_pairs.py --images 8 --pairs-per-image 2 --out outputs/random/photos.parquet

The photographs are those that matplotlib ships, cut and resized to many aspect ratios and saved as JPEG. The texts have
no meaning: these rows are for speed, memory and exactness, not for learning. The same flags give the same rows.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--pairs-per-image", type=int, default=1)
    parser.add_argument("--chosen-words", type=int, default=60)
    parser.add_argument("--rejected-words", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    from llava_orpo.tiny.photo_pairs import rows, write

    entries = rows(args.images, args.pairs_per_image, args.chosen_words, args.rejected_words, args.seed)
    print(f"{write(args.out, entries)}: {len(entries)} pairs on {args.images} photographs")
    return 0


if __name__ == "__main__":
    run(main)
