"""The demo preference pairs: rows in RLAIF-V's schema about pictures of the tiny world."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import datasets
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from . import world

SEEDS = {"train": 11, "dev": 23, "heldout": 37}
TEXT_COLUMNS = ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")
FEATURES = datasets.Features(
    {"ds_name": datasets.Value("string"), "image": datasets.Image()}
    | {name: datasets.Value("string") for name in TEXT_COLUMNS}
)
SETTINGS_KEY = b"demo_world"  # where a file's own schema metadata says how it was made


def make_pairs(split: str, count: int, seed: int) -> list[dict]:
    """Draws pictures and writes 3 to 5 pairs about each, until there are `count` pairs.

    Returns:
        Rows in RLAIF-V's schema: `image` is {"bytes": PNG, "path": str}, everything else a string. `origin_split` is
        JSON with the writer's name under "model" and the question type under "type".
    """
    rng = random.Random(f"{split}/{seed}")
    rows, pictures = [], 0
    with tqdm(total=count, desc=f"demo {split}", unit="pair") as bar:
        while len(rows) < count:
            scene = world.random_scene(rng)
            picture, _ = world.draw(scene, rng)
            path = f"{scene.source}/{split}_{pictures:06d}.png"
            image = {"bytes": world.png(picture), "path": path}
            pictures += 1
            texts = [_pair(scene, rng, detailed=k == 0) for k in range(rng.randint(3, 5))]
            for pair in texts[: count - len(rows)]:
                rows.append(
                    {"ds_name": "demo-world", "image": image, **pair}
                    | {"origin_dataset": scene.source, "idx": str(len(rows)), "image_path": path}
                )
                bar.update()
    return rows


def _pair(scene: world.Scene, rng: random.Random, detailed: bool) -> dict[str, str]:
    other = world.counterfactual(scene, rng, changes=rng.randint(1, 3) if detailed else 1)
    key = ("describe",) if detailed else world.choose_question(scene, other, rng)
    writer = rng.randrange(2)
    kind = "detailed description" if detailed else "question answering"
    return {
        "question": world.ask(scene, key, writer),
        "chosen": world.answer(scene, key, world.facts(scene)[key], writer),
        "rejected": world.answer(scene, key, world.facts(other)[key], writer),
        "origin_split": json.dumps({"model": f"demo-writer-{'ab'[writer]}", "type": kind}),
    }


def settings(split: str, count: int, seed: int, make: Callable, modules: Iterable[ModuleType]) -> bytes:
    """What a file's content depends on, as canonical JSON: the flags, this code and the drawing library."""
    code = hashlib.sha256()
    for file in (*(module.__file__ for module in modules), inspect.getfile(make)):
        code.update(Path(file).read_bytes())
    made = {"split": split, "pairs": count, "seed": seed, "code": code.hexdigest(), "pillow": PIL.__version__}
    return json.dumps(made, sort_keys=True).encode()


def write_split(path: Path, split: str, count: int, seed: int) -> bool:
    """Writes one parquet file unless it exists and was made with the same settings. Returns True if it was written."""
    return write_rows(path, split, count, seed, make_pairs, (world,))


def write_rows(
    path: Path, split: str, count: int, seed: int, make: Callable[..., list[dict]], modules: Iterable[ModuleType]
) -> bool:
    """`write_split` for the rows that make(split, count, seed) gives. modules: whose code they depend on as well."""
    made = settings(split, count, seed, make, modules)
    if path.exists() and (pq.read_schema(path).metadata or {}).get(SETTINGS_KEY) == made:
        return False
    schema = FEATURES.arrow_schema
    table = pa.Table.from_pylist(make(split, count, seed), schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".parquet.part")
    pq.write_table(table.replace_schema_metadata({**schema.metadata, SETTINGS_KEY: made}), part, row_group_size=500)
    os.replace(part, path)
    return True
