"""POPE's kind of question on the demo world."""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from . import world

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
        scene = world.random_scene(rng)
        present = sorted(set(scene.objects))
        answer, category = ("yes", "no")[number % 2], ("random", "adversarial")[number // 2 % 2]
        writer = number // 4 % 2
        if answer == "yes":
            thing = rng.choice(present)
        else:
            absent = sorted({(c, s) for c in world.COLORS for s in world.SHAPES} - set(present))
            if category == "adversarial":
                color, shape = rng.choice(present)
                near = [(world.partner(color), shape), (color, world.partner(shape))]
                absent = [thing for thing in near if thing in absent] or absent
            thing = rng.choice(absent)
        rows.append(
            {
                "image": {"bytes": world.png(world.draw(scene, rng)[0]), "path": None},
                "question_id": str(number),
                "question": world.ask(scene, ("is there", *thing), writer),
                "answer": answer,
                "category": category,
            }
        )
    return rows


def write(path: Path, count: int = 400, seed: int = 0) -> Path:
    """Writes the questions as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(questions(count, seed), features=FEATURES).to_parquet(path)
    return path
