"""Tokenizing, collating and disk: stock LLaMA-Factory on rows like RLAIF-V's, against the plugin.

    python benchmarks/data_side.py                # 400 pairs on 400 photographs of eight aspect ratios

LLaMA-Factory runs without the plugin: its alpaca format, its llava_next plugin and template, `<image>` and a newline
put before each question (its own rlaif_v entry stops at the first row without it). Each side runs in a process of its
own with an empty datasets cache, without workers; both collators include image preprocessing. Tokenizing counts the
time inside the processor's `preprocess_dataset`; ours adds the reading of image headers, which happens before. The
first row of a process is tokenized apart (`first_row_seconds`: ours prepares its tokenizer once, about a second).
Writes results/data_side.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import setting

SIDES = ("stock", "ours")


def clock(owner, name: str, seconds: dict[str, float]) -> None:
    """Adds the time spent in owner.name to seconds[name]."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def run(*args, **kwargs):
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    setattr(owner, name, run)


def one_side(side: str, geometry: str, folder: Path, collate: int) -> dict:
    """Tokenizes and collates; runs in a process of its own."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from llamafactory.train.dpo import workflow

    keys = setting.recipe(geometry, folder, preprocessing_num_workers=1)
    if side == "stock":
        keys = setting.without_plugin(keys)
    model_args, data_args, training_args, _, _ = get_train_args(keys)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)

    seconds: dict[str, float] = {}
    if side == "ours":
        from llava_orpo.data import pairs, rlaif_v

        clock(pairs.PairProcessor, "preprocess_dataset", seconds)
        clock(rlaif_v, "index_images", seconds)
    else:
        from llamafactory.data.processor import PairwiseDatasetProcessor

        clock(PairwiseDatasetProcessor, "preprocess_dataset", seconds)
    cache = Path(os.environ["HF_DATASETS_CACHE"])
    started = time.perf_counter()
    one_row = copy.copy(data_args)
    one_row.max_samples = 1
    workflow.get_dataset(template, model_args, one_row, training_args, stage="rm", **module)
    once = seconds.pop("preprocess_dataset")
    rows = workflow.get_dataset(template, model_args, data_args, training_args, stage="rm", **module)["train_dataset"]
    whole = time.perf_counter() - started

    if side == "ours":
        from llava_orpo.step.collator import SharedPrefixCollator

        collator = SharedPrefixCollator(module["processor"], module["tokenizer"].convert_tokens_to_ids("<image>"))
    else:
        from llamafactory.data import PairwiseDataCollatorWithPadding

        collator = PairwiseDataCollatorWithPadding(template=template, pad_to_multiple_of=8, **module)
    collator([rows[0]])
    each = [measure.timed(lambda i=i: collator([rows[i]])) for i in range(collate)]
    tokenizing = sum(seconds.values())
    return {
        "rows": len(rows),
        "tokenizing_seconds": tokenizing,
        "rows_per_second": len(rows) / tokenizing,
        "first_row_seconds": once,
        "get_dataset_seconds": whole,
        "collate_milliseconds_per_pair": 1000 * measure.median(each),
        "cache_bytes": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
    }


def ratios(sides: dict[str, dict]) -> dict[str, float]:
    """The stock figure over ours; above 1 ours is faster, or writes less."""
    stock, ours = sides["stock"], sides["ours"]
    return {
        "tokenizing": ours["rows_per_second"] / stock["rows_per_second"],
        "get_dataset": stock["get_dataset_seconds"] / ours["get_dataset_seconds"],
        "collate": stock["collate_milliseconds_per_pair"] / ours["collate_milliseconds_per_pair"],
        "disk": stock["cache_bytes"] / ours["cache_bytes"],
    }


def show(result: dict) -> str:
    """The table of a run."""
    picked = {
        "rows tokenized per second": ("tokenizing", lambda side: side["rows_per_second"]),
        "first row of a process, s": (None, lambda side: side["first_row_seconds"]),
        "load + convert + tokenize, s": ("get_dataset", lambda side: side["get_dataset_seconds"]),
        "collate, ms per pair": ("collate", lambda side: side["collate_milliseconds_per_pair"]),
        "datasets cache, MB": ("disk", lambda side: side["cache_bytes"] / 1e6),
    }
    rows = [
        [name, *(pick(result["sides"][side]) for side in SIDES), result["ratios"].get(ratio, "")]
        for name, (ratio, pick) in picked.items()
    ]
    what = f"{result['rows']} pairs, {result['parquet_bytes'] / 1e6:.1f} MB of parquet"
    return measure.table([what, "LLaMA-Factory", "ours", "ratio"], rows)


def main() -> None:
    parser = measure.parser(__doc__, smoke="a few rows: does it run")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--collate", type=int, default=40, help="pairs to collate for the median")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.rows, args.collate = 8, 2
    if args.side:
        print(json.dumps(one_side(args.side, "smoke" if args.smoke else "tiny", args.folder, args.collate)))
        return
    sides = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting.write_rows(folder, args.rows, 1, sizes=setting.photo_pairs.SIZES)
        size = (folder / "rows.parquet").stat().st_size
        for side in SIDES:
            environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"cache-{side}")}
            command = [sys.executable, __file__, "--side", side, "--folder", name, "--collate", str(args.collate)]
            command += ["--smoke"] if args.smoke else []
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
    result = {"rows": args.rows, "parquet_bytes": size, "sides": sides, "ratios": ratios(sides)}
    path = measure.save("data_side", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
