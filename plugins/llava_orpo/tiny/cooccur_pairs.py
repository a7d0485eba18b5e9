"""The preference pairs of the world of companions, in RLAIF-V's schema, and what every picture of them holds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
from tqdm import tqdm

from ..data.images import content_hash
from ..files import write_jsonl
from . import cooccur, world
from .world_pairs import write_rows

SEEDS = {"train": 101, "dev": 211, "heldout": 307}
ANNOTATIONS = "annotations.jsonl"


def make_pairs(split: str, count: int, seed: int) -> list[dict]:
    """One pair about each of `count` pictures: two descriptions, of which the rejected one names what is not there.

    Returns:
        Rows in RLAIF-V's schema, as `world_pairs.make_pairs` gives them. `origin_dataset` says whether the picture
        lacks a companion, and `origin_split` holds all its objects under "objects".
    """
    rng = random.Random(f"cooccur/{split}/{seed}")
    rows = []
    for number in tqdm(range(count), desc=f"cooccur {split}", unit="pair"):
        scene = cooccur.pair_scene(rng)
        picture, _ = world.draw(scene, rng)
        path = f"{scene.source}/{split}_{number:06d}.png"
        rows.append(
            {"ds_name": "demo-world-cooccur", "image": {"bytes": world.png(picture), "path": path}}
            | make_pair(scene, rng)
            | {"origin_dataset": scene.source, "idx": str(number), "image_path": path}
        )
    return rows


def make_pair(scene: world.Scene, rng: random.Random) -> dict[str, str]:
    """Question, a true description, and one with a hallucination.

    Where a companion is missing the rejected answer names it. Where none is, it names another object instead of one.
    """
    writer = rng.randrange(2)
    missing = cooccur.broken(scene)
    imagined = cooccur.complete(scene, missing[0]) if missing else cooccur.companion_swapped(scene, rng)
    origin = {
        "model": f"demo-writer-{'ab'[writer]}",
        "type": "detailed description",
        "objects": cooccur.names(scene),
    }
    return {
        "question": cooccur.ask(writer),
        "chosen": cooccur.describe(scene, writer),
        "rejected": cooccur.describe(imagined, writer),
        "origin_split": json.dumps(origin),
    }


def closed_eyes_accuracy(rows: Iterable[Mapping[str, str]]) -> float:
    """How often the rule "the answer with fewer whole couples is better" is right: it reads the two texts alone.

    Whether a companion is missing is all that text tells of a pair, so no other rule is right more often, but by
    chance (`cooccur.ABSENT` in expectation).
    """
    right = [couples(row["chosen"]) < couples(row["rejected"]) for row in rows]
    return sum(right) / len(right)


def couples(text: str) -> int:
    """How many companions a text names."""
    return sum(" ".join(companion) in text for companion in cooccur.COMPANION.values())


def write_split(path: Path, split: str, count: int, seed: int) -> bool:
    """Writes one parquet file unless it exists and was made with the same settings. Returns True if it was written."""
    return write_rows(path, split, count, seed, make_pairs, (world, cooccur))


def write_annotations(folder: Path, files: list[Path]) -> Path:
    """Writes annotations.jsonl: {"image_hash": …, "image_path": …, "objects": [names]} per picture of parquet files.

    image_hash: `data.images.content_hash` of the picture's bytes.
    """
    records: dict[str, dict] = {}
    for file in files:
        for row in pq.read_table(file, columns=["image", "image_path", "origin_split"]).to_pylist():
            digest = content_hash(row["image"]["bytes"])
            objects = json.loads(row["origin_split"])["objects"]
            records[digest] = {"image_hash": digest, "image_path": row["image_path"], "objects": objects}
    write_jsonl(folder / ANNOTATIONS, records.values())
    return folder / ANNOTATIONS
