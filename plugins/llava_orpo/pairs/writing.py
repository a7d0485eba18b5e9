"""Made pairs as a parquet file in RLAIF-V's schema with the images' original bytes, registered beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..data import image_store
from ..files import write_json
from ..precheck import DATASET_INFO, REMOTE_ENTRIES
from .pairing import Pair

TEXT_COLUMNS = ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")
FEATURES = datasets.Features(
    {"ds_name": datasets.Value("string"), "image": datasets.Image()}
    | {name: datasets.Value("string") for name in TEXT_COLUMNS}
)
GROUP = 64  # rows whose images are in memory at a time
PARQUET = "pairs.parquet"


def pair_row(source: Mapping[str, Any], pair: Pair, number: int, made: Mapping[str, str]) -> dict[str, Any]:
    """A row of the file.

    source: the tokenized row whose image and question the pair is about; number: of this pair among the prompt's;
    made: "model" and "scoring" as they stand in `origin_split`.
    """
    data, path = None, None
    if source["image"] is not None:
        data, path = image_store.read_bytes(source["image"]), image_store.name_of(source["image"])
    about = {
        **made,
        "type": source["question_type"],
        "chosen_score": pair.chosen.score,
        "rejected_score": pair.rejected.score,
    }
    return {
        "ds_name": "own-answers",
        "image": None if data is None else {"bytes": data, "path": path},
        "question": source["question"],
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "origin_dataset": source["source"],
        "origin_split": json.dumps(about, ensure_ascii=False),
        "idx": f"{source['pair_id']}-{number}",
        "image_path": path or "",
    }


def write_pairs(folder: Path, entries: Iterable[dict[str, Any]]) -> Path:
    """Writes pairs.parquet from rows of `pair_row`; the file is whole or not there. Returns its path."""
    schema, path = FEATURES.arrow_schema, folder / PARQUET
    part = path.with_suffix(".parquet.part")
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(part, schema) as out:
        for entry in entries:
            waiting.append(entry)
            if len(waiting) == GROUP:
                out.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting = []
        if waiting:
            out.write_table(pa.Table.from_pylist(waiting, schema=schema))
    os.replace(part, path)
    return path


def register(folder: Path, name: str, registry: Path | None, used: Iterable[str]) -> dict[str, Any]:
    """Writes a dataset_info.json that names the pairs, and the datasets `used` of the registry; returns their entry.

    So one dataset_dir holds the made pairs and the recipe's own evaluation set. Files are named relative to `folder`.
    """
    entry = {"file_name": PARQUET, "formatting": "rlaif_v", "ranking": True}
    entries: dict[str, Any] = {}
    known = json.loads(registry.read_text(encoding="utf-8")) if registry and registry.is_file() else {}
    for other in used:
        if other not in known:
            continue
        copied = dict(known[other])
        if "file_name" in copied and not any(key in copied for key in REMOTE_ENTRIES):
            copied["file_name"] = os.path.relpath(registry.parent / copied["file_name"], folder)
        entries[other] = copied
    write_json(folder / DATASET_INFO, {**entries, name: entry})
    return entry
