"""Makes the demo preference pairs: parquet files in RLAIF-V's schema, about pictures drawn by llava_orpo.tiny.world.

    python scripts/make_demo_data.py --out outputs/tiny/data

Writes demo_train.parquet, demo_dev.parquet (for tuning) and demo_heldout.parquet (for the final measure). Every
picture has several pairs and is in one file only. The same flags give the same pairs; a complete file is kept.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny/data"), help="folder for the parquet files")
    parser.add_argument("--train-pairs", type=int, default=6400)
    parser.add_argument("--dev-pairs", type=int, default=400)
    parser.add_argument("--heldout-pairs", type=int, default=400)
    args = parser.parse_args(argv)
    from llava_orpo.tiny.world_pairs import SEEDS, write_split

    for split, seed in SEEDS.items():
        path = args.out / f"demo_{split}.parquet"
        count = getattr(args, f"{split}_pairs")
        written = write_split(path, split, count, seed)
        print(f"{path}: {count} pairs{'' if written else ' (already there)'}")
    return 0


if __name__ == "__main__":
    run(main)
