"""One self-contained HTML page about a run: numbers before and after, curves, subsets, grounding, examples.

    python evals/report.py OUTPUT_DIR [--baseline DIR] [--generations generations.jsonl] [--out report.html]

The page needs no network and no other file. It reads, from OUTPUT_DIR:

    preference_pairs*.jsonl     a line a scored pair (llava_orpo.scored_pairs), a file per evaluation set and
                                image condition
    preference_eval.json        evaluations over training, with grounding where the recipe asked for it
    trainer_state.json          training log; the newest checkpoint's or trainer_log.jsonl while training runs
    preference_examples.jsonl   texts of some scored pairs, one JSON object a line: {"dataset", "pair_id",
                                "question", "chosen", "rejected", "image": {"path": "images/<hash>.png"} or
                                null}; further fields are ignored, the path is relative to the file
    generations.jsonl           from evals/generate.py: the same fields and "answers": {model name: answer}

and from the --baseline folder the scores "before" (usually of the base model, by evals/preference.py).
Without --baseline the first evaluation in preference_eval.json is "before": numbers, but no paired test.
Whatever is missing, its section says so and names the command that makes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava_orpo.report.build import build_page
from llava_orpo.report.inputs import read_run


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--baseline", type=Path, help="folder with the scores before (preference_pairs.jsonl)"
    )
    parser.add_argument("--generations", type=Path, help="default: OUTPUT_DIR/generations.jsonl")
    parser.add_argument("--out", type=Path, help="default: OUTPUT_DIR/report.html")
    parser.add_argument("--max-examples", type=int, default=200)
    parser.add_argument(
        "--min-subset", type=int, default=20, help="fewest pairs for numbers of a subset's own"
    )
    given = parser.parse_args(arguments)
    before = read_run(given.baseline) if given.baseline else None
    page = build_page(
        read_run(given.output_dir), before, given.generations, given.max_examples, given.min_subset
    )
    out = given.out or given.output_dir / "report.html"
    out.write_text(page, encoding="utf-8")
    print(f"{out} ({len(page.encode()) / 1e6:.1f} MB)")
    return out


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
