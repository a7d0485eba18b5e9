"""Make the data of the demo_objects task: yes/no questions about pictures drawn by llava_orpo.tiny.world.

    python evals/tasks/demo_objects/make_data.py --out outputs/benchmarks/demo_objects.parquet

evals/benchmarks.py does this by itself. Deterministic; the pictures are in no split of
scripts/make_demo_data.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_orpo.tiny.object_questions import write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/demo_objects.parquet"))
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(write(args.out, args.count, args.seed))


if __name__ == "__main__":
    main()
