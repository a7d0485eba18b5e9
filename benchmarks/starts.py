"""From starting a training to its first step, with as many rows as RLAIF-V has: plain LLaMA-Factory and the plugin.

    python benchmarks/starts.py --rows 83132                    # both sides; LLaMA-Factory stops after ten minutes
    python benchmarks/starts.py --rows 1000000 --sides ours     # how time and memory grow with the rows

The rows have RLAIF-V's columns, answers of 70 and 57 words, two pairs per image and a held-out part; the images are
24x18-pixel PNGs, so that disk and page cache hold them. Reading 13 GB of real photographs comes on top, on both sides.
The model is the random `tiny` one: loading a 7B comes on top as well. The second start finds the caches of the first.

LLaMA-Factory's side is its alpaca format with `<image>` before each question, without workers, as in data_side.py.
Where it does not reach the first step within `--limit` seconds it is stopped, and its time is extrapolated from the
rows that it had tokenized; the result says so.

Longest silence: the longest time without a character of output, imports not counted. `cpu_seconds`: what the main
process computed for, which other programs on the machine change little. Peak memory: with the pages of memory-mapped
files (`peak_bytes`) and without (`peak_own_bytes`).

Writes results/starts_<rows>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import setting

SIDES = ("ours", "stock")
NOTE = "STARTS-BENCHMARK "
PER_FILE = 20_000
SOURCES = ("MSCOCO", "VQA v2", "TextVQA", "OK-VQA")
KINDS = ("detailed description", "question answering")


def png(number: int, width: int = 24, height: int = 18) -> bytes:
    """A small picture of noise that differs from that of every other number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, 1 + 3 * width), dtype=np.uint8)
    pixels[:, 0] = 0  # each line starts with the number of its filter: none
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(pixels.tobytes(), 1),
        b"IEND": b"",
    }
    packed = [
        struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def write_rows(folder: Path, count: int, sides: Sequence[str] = SIDES) -> None:
    """Writes the rows of each side, one file of 20,000 at a time, and a dataset_info.json that registers them."""
    rng = np.random.default_rng(0)
    words = np.asarray(setting.photo_pairs.WORDS)

    def sentences(rows: int, length: int) -> list[str]:
        return [" ".join(picked).capitalize() + "." for picked in words[rng.integers(0, len(words), (rows, length))]]

    features = {name: {"dtype": "string", "_type": "Value"} for name in setting.photo_pairs.COLUMNS}
    features["image"] = {"_type": "Image"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([(name, image if name == "image" else pa.string()) for name in features], metadata)
    for start in range(0, count, PER_FILE):
        numbers = range(start, min(start + PER_FILE, count))
        table = {
            "ds_name": ["RLAIF-V"] * len(numbers),
            "question": sentences(len(numbers), 12),
            "chosen": sentences(len(numbers), 70),
            "rejected": sentences(len(numbers), 57),
            "origin_dataset": [SOURCES[n // 2 % len(SOURCES)] for n in numbers],
            "origin_split": [json.dumps({"model": "none", "type": KINDS[n % 2]}) for n in numbers],
            "idx": [str(n) for n in numbers],
            "image_path": [""] * len(numbers),
            "image": [{"bytes": png(n // 2), "path": f"{n // 2}.png"} for n in numbers],
        }
        for side in sides:
            (folder / side).mkdir(exist_ok=True)
            mark = "<image>\n" if side == "stock" else ""
            marked = {**table, "question": [mark + question for question in table["question"]]}
            file = folder / side / f"{start // PER_FILE:04d}.parquet"
            pq.write_table(pa.table(marked, schema=schema), file, row_group_size=1000)
    ours = {"file_name": "ours", "formatting": "rlaif_v", "ranking": True}
    columns = {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "images": "image"}
    info = {
        "rows": {**ours, "llava_orpo": {"part": "train"}},
        "heldout": {**ours, "llava_orpo": {"part": "heldout"}},
        "stock": {"file_name": "stock", "ranking": True, "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def say(**facts: Any) -> None:
    print("\n" + NOTE + json.dumps(facts), flush=True)


def one_start(side: str, geometry: str, folder: Path, limit: float, started: float) -> None:
    """Trains one step; runs in a process of its own and says what happens in lines that begin with `NOTE`.

    started: time.time() of the parent before it started this process, so that this file's own imports count.
    """
    from llamafactory.data.processor import PairwiseDatasetProcessor
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    say(event="imported", seconds=time.time() - started)
    own = [0]

    def watch() -> None:
        while True:
            own[0] = max(own[0], measure._status("RssAnon"))
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()

    class FirstStep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                memory = {"peak_bytes": measure._status("VmHWM"), "peak_own_bytes": own[0]}
                say(event="first step", seconds=time.time() - started, cpu_seconds=time.process_time(), **memory)

    keys = setting.recipe(geometry, folder, max_steps=1, save_strategy="no", per_device_train_batch_size=4)
    keys.update(output_dir=str(folder / f"out-{side}"), overwrite_output_dir=True)
    if side == "stock":
        keys = setting.without_plugin(keys)
        tokenize, done = PairwiseDatasetProcessor.preprocess_dataset, {"rows": 0, "since": 0.0}

        def counted(self, examples):
            done["since"] = done["since"] or time.time()
            out = tokenize(self, examples)
            done["rows"] += len(examples["_prompt"])
            if time.time() - started > limit:
                before, tokenizing = done["since"] - started, time.time() - done["since"]
                say(event="stopped", before_tokenizing=before, tokenizing=tokenizing, rows=done["rows"])
                os._exit(0)
            return out

        PairwiseDatasetProcessor.preprocess_dataset = counted
    else:
        keys.update(eval_dataset="heldout", group_pairs_by_image=True)
    run_exp(keys, callbacks=[FirstStep()])


def watched(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs a start; {event: its facts}, with the longest silence between the imports and the first step."""
    command = [*command, "--started", str(time.time())]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    events: dict[str, dict[str, Any]] = {}
    silence, after, last, written, pending = 0.0, "", None, b"", b""
    while piece := os.read(process.stdout.fileno(), 65536):
        now = time.monotonic()
        if last is not None and "first step" not in events and now - last > silence:
            silence, after = now - last, written.decode(errors="replace").strip()[-100:]
        last = now if "imported" in events else None
        written = pending + piece
        *lines, pending = written.split(b"\n")
        for line in lines:
            if line.startswith(NOTE.encode()):
                facts = json.loads(line[len(NOTE) :])
                events[facts.pop("event")] = facts
        pending = pending[-100_000:]
    if process.wait() or not events.keys() & {"first step", "stopped"}:
        raise SystemExit(f"a start failed: {' '.join(command)}\n{pending.decode(errors='replace')}")
    return {**events, "silence": {"longest_silence_seconds": silence, "after_the_words": after}}


def result_of(rows: int, events: dict[str, Any]) -> dict[str, Any]:
    """The facts of one start; what was extrapolated is marked."""
    out = {**events["silence"], "extrapolated": "stopped" in events}
    out["imports_seconds"] = events["imported"]["seconds"]
    if "first step" in events:
        facts = events["first step"]
        if facts["cpu_seconds"] > os.cpu_count() * facts["seconds"]:
            raise ValueError(f"{facts} took more CPU time than {os.cpu_count()} cores have: the clock started late")
        seconds = facts.pop("seconds")
        return {**out, "first_step_seconds": seconds, **facts}
    seen = events["stopped"]
    whole = seen["before_tokenizing"] + rows * seen["tokenizing"] / seen["rows"]
    return {**out, "rows_tokenized": seen["rows"], "first_step_seconds": whole}


def show(result: dict) -> str:
    """The table of a run."""

    def seconds(start: dict | None) -> str:
        if start is None:
            return "-"
        mark = f" (extrapolated from {start['rows_tokenized']:,} rows)" if start["extrapolated"] else ""
        return f"{start['first_step_seconds']:,.0f}{mark}"

    sides = {side: result["sides"].get(side, {}) for side in SIDES}
    rows = [
        [f"{which} start to first step, s", *(seconds(sides[side].get(which)) for side in SIDES)]
        for which in ("first", "second")
    ]
    picked = {
        "of it imports, s": ("imports_seconds", 1.0),
        "longest silence, s": ("longest_silence_seconds", 1.0),
        "CPU time, s": ("cpu_seconds", 1.0),
        "peak memory, GB": ("peak_bytes", 1e-9),
        "without mapped files, GB": ("peak_own_bytes", 1e-9),
    }
    for name, (key, scale) in picked.items():
        found = [sides[side].get("first", {}).get(key) for side in SIDES]
        rows.append([name, *("-" if value is None else scale * value for value in found)])
    return measure.table([f"{result['rows']:,} pairs of small images", "ours", "LLaMA-Factory"], rows)


def main() -> None:
    parser = measure.parser(__doc__, smoke="a few rows: does it run")
    parser.add_argument("--rows", type=int, default=83_132)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--limit", type=float, default=600, help="seconds after which LLaMA-Factory is stopped")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.rows = 200
    geometry = "smoke" if args.smoke else "tiny"
    if args.side:
        one_start(args.side, geometry, args.folder, args.limit, args.started)
        return
    setting.model_folder(geometry)
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_rows(Path(name), args.rows, args.sides)
        for side in args.sides:
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{name}/cache-{side}"}
            command = [sys.executable, __file__, "--side", side, "--folder", name, "--limit", str(args.limit)]
            command += ["--smoke"] if args.smoke else []
            sides[side] = {}
            for which in ("first", "second"):
                sides[side][which] = result_of(args.rows, watched(command, environment))
                print(side, which, json.dumps(sides[side][which]), flush=True)
                if sides[side][which]["extrapolated"]:
                    break  # nothing was finished that a second start could find
    result = {"rows": args.rows, "sides": sides}
    path = measure.save("starts" if args.smoke else f"starts_{args.rows}", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
