"""Make the data of the demo_objects task: yes/no questions about pictures drawn by scripts/demo_world.py.

    python evals/tasks/demo_objects/make_data.py --out outputs/benchmarks/demo_objects.parquet

evals/benchmarks.py does this by itself. Deterministic; the pictures are in no split of
scripts/make_demo_data.py.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from datasets import Dataset, Features, Image, Value

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import demo_world  # noqa: E402

FEATURES = Features(
    {"image": Image(), **dict.fromkeys(("question_id", "question", "answer", "category"), Value("string"))}
)


def questions(count: int, seed: int = 0) -> list[dict]:
    """`count` rows, one picture each; answers alternate yes, no.

    category says what a "no" asks for: `random` (any object that is absent), or `adversarial` (an object of
    the picture with its color or shape exchanged for the one that is easily confused with it). Answer,
    category and wording are independent: every eight rows hold each combination once.
    """
    rng = random.Random(f"demo_objects/{seed}")
    rows = []
    for number in range(count):
        scene = demo_world.random_scene(rng)
        present = sorted(set(scene.objects))
        answer, category = ("yes", "no")[number % 2], ("random", "adversarial")[number // 2 % 2]
        writer = number // 4 % 2
        if answer == "yes":
            thing = rng.choice(present)
        else:
            absent = sorted({(c, s) for c in demo_world.COLORS for s in demo_world.SHAPES} - set(present))
            if category == "adversarial":
                color, shape = rng.choice(present)
                near = [(demo_world.partner(color), shape), (color, demo_world.partner(shape))]
                absent = [thing for thing in near if thing in absent] or absent
            thing = rng.choice(absent)
        rows.append(
            {"image": {"bytes": demo_world.png(demo_world.draw(scene, rng)[0]), "path": None}, "question_id": str(number),
             "question": demo_world.ask(scene, ("is there", *thing), writer), "answer": answer, "category": category}
        )  # fmt: skip
    return rows


def write(path: Path, count: int = 400, seed: int = 0) -> Path:
    """Writes the questions as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(questions(count, seed), features=FEATURES).to_parquet(path)
    return path


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
