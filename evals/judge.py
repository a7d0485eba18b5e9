"""LLM-as-a-judge: which of two models answers better, as any OpenAI-compatible endpoint with eyes sees it.

    python evals/judge.py GENERATIONS.jsonl base_url=http://127.0.0.1:8000/v1 model=local
    python evals/judge.py GENERATIONS.jsonl base_url=https://api.openai.com/v1 model=gpt-4o price_in=2.5 price_out=10

Takes the file of evals/generate.py and key=value. Every pair is judged twice, with the answers in both
orders: a pair is won only if both verdicts agree on the winner, anything else is a tie. Keys:

    a, b          the models to compare, by their names in the file; `chosen` and `rejected` are the
                  dataset's answers (default, for a file with two models: a is the second, b the first)
    base_url      the endpoint, with /v1: a local vLLM, `llamafactory-cli api`, a cloud; it must see images
    model         the judge's name there
    api_key_env   name of the environment variable with the key (default OPENAI_API_KEY); never stored
    price_in, price_out   US dollars per million tokens, for the estimate shown before anything is sent
    yes           true: do not ask before sending
    criteria      a text file with your own criteria instead of the built-in ones
    request       fields of the request, default {temperature: 0, max_tokens: 512}; null leaves one out:
                  request.max_tokens=null request.max_completion_tokens=2000
    concurrency 4, timeout 120 (seconds), retries 6, max_pairs (evenly spread over the file)
    output_dir    where to write (default: beside the file)

Writes judge_<a>_vs_<b>.jsonl (a line a verdict) and judge_<a>_vs_<b>.json (the counts). An interrupted run,
run again, judges only what is missing.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llava_orpo.evaluation.answer_pairs import read_answer_pairs, tally_text
from llava_orpo.evaluation.judge_api import ChatClient, EndpointUnusable
from llava_orpo.evaluation.judge_prompt import CRITERIA
from llava_orpo.evaluation.judging import (
    ORDERS,
    REQUEST,
    confirm,
    identical,
    judge,
    read_verdicts,
    summarize,
    verdict_key,
)

KEYS = {
    "a": None, "b": None, "base_url": None, "model": None, "api_key_env": "OPENAI_API_KEY", "price_in": None,
    "price_out": None, "yes": False, "criteria": None, "request": {}, "concurrency": 4, "timeout": 120.0, "retries": 6,
    "max_pairs": None, "output_dir": None,
}  # fmt: skip


def main(argv: list[str]) -> int:
    file, own = read_arguments(argv)
    a, b, pairs = read_answer_pairs(file, own["a"], own["b"])
    if own["max_pairs"]:
        count = min(int(own["max_pairs"]), len(pairs))
        pairs = [pairs[i * len(pairs) // count] for i in range(count)]
    criteria = Path(own["criteria"]).read_text(encoding="utf-8").strip() if own["criteria"] else CRITERIA
    request = {key: value for key, value in {**REQUEST, **own["request"]}.items() if value is not None}
    folder = Path(own["output_dir"]) if own["output_dir"] else file.parent
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.+-]+", "_", f"judge_{a}_vs_{b}")
    verdicts = folder / f"{stem}.jsonl"

    asked = {
        verdict_key(pair, order, own["model"], criteria): (pair, order)
        for pair in pairs if not identical(pair) for order in ORDERS
    }  # fmt: skip
    done = {key: record for key, record in read_verdicts(verdicts).items() if key in asked}
    waiting = {key: task for key, task in asked.items() if key not in done}
    failed: dict[str, str] = {}
    if waiting:
        client = ChatClient(own["base_url"], own["api_key_env"], float(own["timeout"]), int(own["retries"]))
        confirm(waiting.values(), len(done), criteria, own)
        try:
            failed = asyncio.run(
                judge(
                    client, waiting, done, verdicts, own["model"], criteria, request, int(own["concurrency"])
                )
            )
        except EndpointUnusable as error:
            raise SystemExit(f"{own['base_url']} refuses: {error}\nCheck base_url, model and the key in "
                             f"{own['api_key_env']}.") from None  # fmt: skip
    summary = summarize(pairs, done, own["model"], criteria)
    summary.update(a=a, b=b, judge=own["model"], file=str(file), criteria=own["criteria"] or "built-in")
    (folder / f"{stem}.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False))
    print_summary(summary, failed)
    print(f"  {folder / stem}.json, .jsonl")
    return 0 if summary["n"] else 1


def read_arguments(argv: list[str]) -> tuple[Path, dict[str, Any]]:
    """(generations.jsonl, keys with their defaults). Raises SystemExit with the usage for anything else."""
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise SystemExit(
            f"usage: python {sys.argv[0]} generations.jsonl base_url=… model=… [key=value …]\n\n{__doc__}"
        )
    given = OmegaConf.to_container(OmegaConf.from_cli(argv[1:]))
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise SystemExit(f"Unknown: {', '.join(unknown)}. Keys are {', '.join(KEYS)}.")
    own = {**KEYS, **given}
    if not own["base_url"] or not own["model"]:
        raise SystemExit("Give base_url=… (with /v1) and model=….")
    return Path(argv[0]), own


def print_summary(summary: dict[str, Any], failed: dict[str, str]) -> None:
    """Counts, position bias and failures as text."""
    print(tally_text(summary["a"], summary["b"], summary))
    if summary["identical"]:
        print(f"  identical answers  {summary['identical']}, counted as ties and not sent")
    judged = summary["n"] - summary["identical"]
    if judged:
        print(f"  orders disagreed   {summary['orders_disagree']} of {judged}; the same place won twice in "
              f"{summary['position_bias_rate']:.1%}")  # fmt: skip
    if summary["first_place_share"] is not None:
        print(f"  first place won    {summary['first_place_share']:.1%} of the decided verdicts")
    if summary["not_judged"]:
        print(
            f"  {summary['not_judged']} pairs were not judged; run the command again to try them.",
            file=sys.stderr,
        )
    for reason, count in Counter(failed.values()).most_common(3):
        print(f"  {count} verdicts failed: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
