"""One self-contained HTML page about a run: numbers before and after, curves, subsets, grounding, examples.

    python evals/report.py OUTPUT_DIR [baseline=DIR] [generations=generations.jsonl] [out=report.html]

The page needs no network and no other file. It reads, from OUTPUT_DIR:

    preference_pairs*.jsonl     one line per scored pair (llava_orpo.preference.records), one file per
                                evaluation set and image condition
    preference_eval.json        evaluations over training, with grounding where the recipe asked for it
    trainer_state.json          training log; the newest checkpoint's or trainer_log.jsonl while training runs
    preference_examples.jsonl   texts of some scored pairs, one JSON object per line: {"dataset", "pair_id",
                                "question", "chosen", "rejected", "image": {"path": "images/<hash>.png"} or
                                null}; further fields are ignored, the path is relative to the file
    generations.jsonl           from evals/generate.py: the same fields and "answers": {model name: answer}

and from the baseline folder the scores "before" (usually of the base model, by evals/preference.py).
Without a baseline the first evaluation in preference_eval.json is "before": numbers, but no paired test.
If an input is missing, its section says so and names the command that makes it. Further keys:

    max_examples    most examples shown (200)
    min_subset      fewest pairs for which a subset gets numbers of its own (20)
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import read_command, run

OWN_KEYS = {"baseline": Path, "generations": Path, "out": Path, "max_examples": 200, "min_subset": 20}
OLD_FLAGS = {f"--{key.replace('_', '-')}": key for key in OWN_KEYS}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, file="OUTPUT_DIR", old=OLD_FLAGS)
    own = command.own
    from llava_orpo.files import write_atomic
    from llava_orpo.report.build import build_page
    from llava_orpo.report.inputs import read_run

    before = read_run(own["baseline"]) if own["baseline"] else None
    after = read_run(command.file)
    page = build_page(after, before, own["generations"], own["max_examples"], own["min_subset"])
    out = own["out"] or command.file / "report.html"
    write_atomic(out, page)
    print(f"{out} ({len(page.encode()) / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run(main)
