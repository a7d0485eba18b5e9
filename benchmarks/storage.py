"""Images from an Arrow copy (`image_storage: arrow`) and from the parquet files themselves: disk, memory, rows/s.

    python benchmarks/storage.py                  # 2,000 JPEGs of some 140 kB; row groups of 10, 100 and 1,000 rows

Each side runs in a process of its own with an empty datasets cache, without workers: it loads a registered dataset
until its rows are in LLaMA-Factory's format (index of images included, tokenizing not), then reads images in random
order. The parquet files are packed with Snappy, as pyarrow and `datasets` write them. Under `parquet` images are read
by their places, and then with their whole row groups (none kept from image to image), which is what files of another
codec need.
The files lie in the page cache: a disk's own time comes on top, on every side.

Peak memory is that of the process without mapped files (RssAnon), above what it held before.
Writes results/storage.json.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import setting
from PIL import Image

GROUPS = (10, 100, 1000)
NOTE = "STORAGE-BENCHMARK "
BASE = 40  # different pictures; every image has a number of its own in a comment


def pictures(size: tuple[int, int] = (640, 480)) -> list[bytes]:
    """JPEGs of coloured noise at several scales, about as large as a photograph's."""
    rng, made = np.random.default_rng(0), []
    for _ in range(BASE):
        pixels = np.full((size[1], size[0], 3), 128.0)
        for scale in (1, 4, 16, 60):
            coarse = rng.normal(0, 60 * scale**0.3 / 3, (size[1] // scale, size[0] // scale, 3)).astype(np.float32)
            layers = [Image.fromarray(coarse[..., c]).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
            pixels += np.stack([np.asarray(layer) for layer in layers], -1)
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        made.append(out.getvalue())
    return made


def write_rows(folder: Path, count: int) -> None:
    """The same rows in one parquet file per size of row group, and a dataset_info.json that registers them."""
    made = pictures()
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {name: {"dtype": "string", "_type": "Value"} for name in ("question", "chosen", "rejected", "idx")}
    features["image"] = {"_type": "Image"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([(name, image if name == "image" else pa.string()) for name in features], metadata)

    def numbered(number: int) -> bytes:
        data = made[number % BASE]
        return data[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + data[2:]

    writers = {size: pq.ParquetWriter(folder / f"{size}.parquet", schema) for size in GROUPS}
    for start in range(0, count, max(GROUPS)):
        numbers = range(start, min(start + max(GROUPS), count))
        table = {name: [f"{name} {n} " + "word " * 60 for n in numbers] for name in features if name != "image"}
        table["image"] = [{"bytes": numbered(n), "path": f"{n}.jpg"} for n in numbers]
        for size, writer in writers.items():
            writer.write_table(pa.table(table, schema=schema), row_group_size=size)
    for writer in writers.values():
        writer.close()
    entry = {"formatting": "rlaif_v", "ranking": True}
    info = {str(size): {"file_name": f"{size}.parquet", **entry} for size in GROUPS}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@contextmanager
def own_memory() -> Iterator[dict[str, int]]:
    """{"peak_bytes": the most that this process holds of its own, above what it holds now}."""
    out, ended, before = {"peak_bytes": 0}, threading.Event(), measure._status("RssAnon")

    def watch() -> None:
        while not ended.wait(0.005):
            out["peak_bytes"] = max(out["peak_bytes"], measure._status("RssAnon") - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield out
    ended.set()
    thread.join()


def reading(refs: list[str], limit: float) -> dict[str, float]:
    """Rate and memory of reading these references in order, again and again, until the limit in seconds."""
    from llava_orpo.data import image_store

    done, size = 0, 0
    with own_memory() as memory:
        started = time.perf_counter()
        for ref in itertools.cycle(refs):
            image_store._groups.clear()  # of a large dataset, the row groups that are kept hold next to nothing
            size += len(image_store.read_bytes(ref))
            done += 1
            if time.perf_counter() - started > limit:
                break
        seconds = time.perf_counter() - started
    return {"images_per_second": done / seconds, "images": done, "mean_bytes": size / done, **memory}


def one_side(storage: str, size: int, folder: Path, limit: float) -> dict[str, Any]:
    """Loads, indexes and reads; runs in a process of its own."""
    from llamafactory.data import loader
    from llamafactory.hparams import get_train_args

    from llava_orpo.data import columns

    cache = folder / f"cache-{storage}-{size}"
    keys = setting.recipe("smoke", folder, dataset=str(size), image_storage=storage, cache_dir=str(cache))
    model_args, data_args, training_args, *_ = get_train_args(keys)
    (attribute,) = loader.get_dataset_list([str(size)], str(folder))
    with own_memory() as memory:
        started = time.perf_counter()
        rows = loader._load_single_dataset(attribute, model_args, data_args, training_args)
        seconds = time.perf_counter() - started
    refs = [found[0] for found in columns.values(rows, "_images")]
    order = np.random.default_rng(1).permutation(len(refs))
    refs = [refs[row] for row in order]
    out = {"load_seconds": seconds, "load_peak_bytes": memory["peak_bytes"]}
    out["cache_bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    out["in_reach"] = sum(not ref.endswith("#") for ref in refs) / len(refs)
    out["read"] = reading(refs, limit)
    if storage == "parquet":  # references without a place
        out["read_by_group"] = reading([ref[: ref.rindex("#") + 1] for ref in refs], limit)
    return out


def show(result: dict) -> str:
    """The table of a run."""
    sides = result["sides"]
    names = [*(f"parquet, {size:,} rows per group" for size in GROUPS), "arrow"]
    keys = [*(f"parquet-{size}" for size in GROUPS), f"arrow-{GROUPS[1]}"]

    def line(title: str, *path: str, scale: float = 1.0) -> list:
        cells = []
        for key in keys:
            value: Any = sides[key]
            for name in path:
                value = value.get(name, {})
            cells.append("-" if value == {} else scale * value)
        return [title, *cells]

    lines = [
        line("datasets cache, MB", "cache_bytes", scale=1e-6),
        line("load, index, convert, s", "load_seconds"),
        line("its peak memory, MB", "load_peak_bytes", scale=1e-6),
        line("random images per second", "read", "images_per_second"),
        line("its peak memory, MB", "read", "peak_bytes", scale=1e-6),
        line("the same by whole row group", "read_by_group", "images_per_second"),
        line("its peak memory, MB", "read_by_group", "peak_bytes", scale=1e-6),
    ]
    return measure.table([f"{result['rows']:,} images, {result['parquet_bytes'] / 1e6:,.0f} MB", *names], lines)


def main() -> None:
    parser = measure.parser(__doc__, smoke="a few rows: does it run")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--limit", type=float, default=5, help="seconds of each reading")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.limit = 40, 1.0
    if args.side:
        storage, size = args.side
        print("\n" + NOTE + json.dumps(one_side(storage, int(size), args.folder, args.limit)), flush=True)
        return
    setting.model_folder("smoke")
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name), args.rows)
        size = (Path(name) / f"{GROUPS[1]}.parquet").stat().st_size
        for storage, group in (("arrow", GROUPS[1]), *(("parquet", group) for group in GROUPS)):
            command = [sys.executable, __file__, "--side", storage, str(group), "--folder", name]
            command += ["--limit", str(args.limit)]
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{name}/cache"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            notes = [line[len(NOTE) :] for line in done.stdout.splitlines() if line.startswith(NOTE)]
            if done.returncode or not notes:
                raise SystemExit(f"a side failed: {' '.join(command)}\n{done.stdout[-3000:]}")
            sides[f"{storage}-{group}"] = json.loads(notes[0])
    result = {"rows": args.rows, "parquet_bytes": size, "sides": sides}
    path = measure.save("storage", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
