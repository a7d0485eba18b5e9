"""Makes the data of the demo_objects task: yes/no questions about pictures drawn by llava_orpo.tiny.world.

    python evals/tasks/demo_objects/make_data.py --out outputs/benchmarks/demo_objects.parquet

evals/benchmarks.py does this by itself. The result is deterministic, and its pictures are in no split of
scripts/make_demo_data.py.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/demo_objects.parquet"))
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from llava_orpo.tiny.object_questions import write

    print(write(args.out, args.count, args.seed))
    return 0


if __name__ == "__main__":
    run(main)
