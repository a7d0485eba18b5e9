"""Makes pairs for `preference_loss: dpo_context`: the sentences that both answers begin with become the context.

    python scripts/make_context_pairs.py outputs/tiny/data/demo_train.parquet \\
        outputs/tiny/data/demo_train_context.parquet

Reads a parquet file in RLAIF-V's schema and writes one with a column `context`, whose `chosen` and `rejected` hold what
is left of the answers. Pairs that share no whole sentence are left out.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("source", type=Path, help="parquet file with pairs")
    parser.add_argument("target", type=Path, help="parquet file to write")
    args = parser.parse_args(argv)
    from llava_orpo.data.contexts import write

    written, left_out = write(args.source, args.target)
    print(f"{args.target}: {written} pairs with a context; {left_out} that share no sentence are left out")
    return 0


if __name__ == "__main__":
    run(main)
