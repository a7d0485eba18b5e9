"""LLM-as-a-judge: which of two models answers better, judged by any OpenAI-compatible endpoint that accepts images.

    python evals/judge.py GENERATIONS.jsonl base_url=http://127.0.0.1:8000/v1 model=local
    python evals/judge.py GENERATIONS.jsonl base_url=https://api.openai.com/v1 model=gpt-4o price_in=2.5 price_out=10

Takes the file of evals/generate.py and key=value. Every pair is judged twice, with the answers in both
orders: a pair is won only if both verdicts agree on the winner; anything else is a tie. Keys:

    a, b          the models to compare, by their names in the file; `chosen` and `rejected` are the
                  dataset's answers (default, for a file with two models: a is the second, b the first)
    base_url      the endpoint, with /v1: a local vLLM, `llamafactory-cli api`, a cloud; it must accept images
    model         the judge's name there
    api_key_env   name of the environment variable with the key (default OPENAI_API_KEY); the key is never stored
    price_in, price_out   US dollars per million tokens, for the estimate shown before anything is sent
    yes           true: do not ask before sending
    criteria      a text file with your own criteria instead of the built-in ones
    request       fields of the request, default {temperature: 0, max_tokens: 512}; null leaves one out:
                  request.max_tokens=null request.max_completion_tokens=2000
    concurrency 4, timeout 120 (seconds), retries 6, max_pairs (evenly spread over the file)
    output_dir    where to write (default: beside the file)

Writes judge_<a>_vs_<b>.jsonl (one line per verdict) and judge_<a>_vs_<b>.json (the counts). An interrupted run
resumes: it judges only what is missing.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from llava_orpo.errors import UserError
from llava_orpo.recipe import read_command, run

OWN_KEYS = {
    "a": str,
    "b": str,
    "base_url": str,
    "model": str,
    "api_key_env": "OPENAI_API_KEY",
    "price_in": float,
    "price_out": float,
    "yes": False,
    "criteria": Path,
    "request": {},
    "concurrency": 4,
    "timeout": 120.0,
    "retries": 6,
    "max_pairs": int,
    "output_dir": Path,
}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, file="generations.jsonl", required=("base_url", "model"))
    file, own = command.file, command.own
    from llava_orpo.evaluation import judging
    from llava_orpo.evaluation.answer_pairs import read_answer_pairs
    from llava_orpo.evaluation.judge_prompt import CRITERIA
    from llava_orpo.files import evenly, write_json
    from llava_orpo.serving.client import ChatClient, EndpointUnusable

    a, b, pairs = read_answer_pairs(file, own["a"], own["b"])
    if own["max_pairs"]:
        pairs = evenly(pairs, own["max_pairs"])
    criteria = own["criteria"].read_text(encoding="utf-8").strip() if own["criteria"] else CRITERIA
    request = {key: value for key, value in {**judging.REQUEST, **own["request"]}.items() if value is not None}
    folder = own["output_dir"] or file.parent
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.+-]+", "_", f"judge_{a}_vs_{b}")
    verdicts = folder / f"{stem}.jsonl"

    asked = judging.tasks(pairs, own["model"], criteria)
    done = {key: record for key, record in judging.read_verdicts(verdicts).items() if key in asked}
    waiting = {key: task for key, task in asked.items() if key not in done}
    failed = {}
    if waiting:
        client = ChatClient(own["base_url"], own["api_key_env"], own["timeout"], own["retries"])
        judging.confirm(waiting.values(), len(done), criteria, own)
        asking = judging.Asking(client, own["model"], criteria, request, own["concurrency"])
        try:
            failed = asyncio.run(judging.judge(asking, waiting, done, verdicts))
        except EndpointUnusable as error:
            raise UserError(
                f"{own['base_url']} refuses: {error} Check base_url, model and the key in {own['api_key_env']}."
            ) from None
    summary = judging.summarize(pairs, done, own["model"], criteria)
    summary.update(a=a, b=b, judge=own["model"], file=str(file), criteria=str(own["criteria"] or "built-in"))
    write_json(folder / f"{stem}.json", summary)
    judging.print_summary(summary, failed)
    print(f"  {folder / stem}.json, .jsonl")
    return 0 if summary["n"] else 1


if __name__ == "__main__":
    run(main)
