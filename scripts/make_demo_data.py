"""Makes the demo preference pairs: parquet files in RLAIF-V's schema, about pictures drawn by llava_orpo.tiny.world.

    python scripts/make_demo_data.py --out outputs/tiny/data

Writes demo_train.parquet, demo_dev.parquet (for tuning) and demo_heldout.parquet (for the final measure). Every
picture has several pairs and is in one file only. The same flags give the same pairs; a complete file is kept.

    python scripts/make_demo_data.py --world cooccur

Writes cooccur_train.parquet, cooccur_dev.parquet and cooccur_heldout.parquet to outputs/cooccur/data, about the world
in which some objects nearly always come together (llava_orpo.tiny.cooccur): one pair per picture, and what every
picture holds in annotations.jsonl, for evals/objects.py.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--world", choices=("shapes", "cooccur"), default="shapes")
    parser.add_argument("--out", type=Path, help="folder (default outputs/tiny/data or outputs/cooccur/data)")
    parser.add_argument("--train-pairs", type=int, help="default 6400 or 3200")
    parser.add_argument("--dev-pairs", type=int, default=400)
    parser.add_argument("--heldout-pairs", type=int, default=400)
    args = parser.parse_args(argv)
    import pyarrow.parquet as pq

    from llava_orpo.tiny import cooccur_pairs, world_pairs

    cooccur = args.world == "cooccur"
    name, pairs = ("cooccur", cooccur_pairs) if cooccur else ("demo", world_pairs)
    out = args.out or Path("outputs/cooccur/data" if cooccur else "outputs/tiny/data")
    if args.train_pairs is None:
        args.train_pairs = 3200 if cooccur else 6400
    files = []
    for split, seed in pairs.SEEDS.items():
        files.append(out / f"{name}_{split}.parquet")
        count = getattr(args, f"{split}_pairs")
        written = pairs.write_split(files[-1], split, count, seed)
        print(f"{files[-1]}: {count} pairs{'' if written else ' (already there)'}")
    if cooccur:
        rows = pq.read_table(files[-1], columns=["chosen", "rejected"]).to_pylist()
        share = cooccur_pairs.closed_eyes_accuracy(rows)
        print(f"{files[-1]}: {share:.1%} of its pairs can be told by their texts alone")
        print(f"{cooccur_pairs.write_annotations(out, files)}: the objects of every picture")
    return 0


if __name__ == "__main__":
    run(main)
