"""Answers of one or more models to the held-out prompts, for reading, for the report and for a judge.

    python evals/generate.py recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora
    python evals/generate.py recipes/tiny/llava16_orpo_qlora.yaml models=base,outputs/tiny/orpo_qlora
    python evals/generate.py recipes/llava16_orpo_qlora.yaml base_url=http://127.0.0.1:8000/v1 models=base,orpo

Takes a recipe and overrides like llamafactory-cli. The prompts are those of its eval_dataset, each (image,
question) once, in exactly the text the model is trained on. A batch holds per_device_eval_batch_size. Own keys:

    models          comma-separated: `base`, adapter folders, model folders or Hub ids (default: the recipe's own).
                    Answers are filed under a folder's last name, or its whole path where two share that name
    max_prompts     maximum number of prompts, spread evenly over the set
    max_new_tokens  512
    temperature     0 is greedy; above, sampled with the recipe's `seed`
    top_p           1.0
    best_of         N: of N sampled answers the one with the highest self-reward, the mean log-prob per token that the
                    adapter gives more than its base (RLAIF-V, arXiv 2405.17220); every model must be an adapter
    output_dir      where to write (default outputs/evals/<model>-generations)
    restart         true: ask again what an interrupted or earlier run has asked

With base_url= an OpenAI-compatible server (vLLM, SGLang, `llamafactory-cli api`) answers instead of a model that is
loaded here; no weights are read then. Its prompts are compared with the recipe's by their number of tokens:

    base_url        the server's address, with /v1
    model, models   the served name to ask, or several, comma-separated; may be left out where only one is served
    api_key_env     name of the environment variable with the key (default OPENAI_API_KEY); the key is never stored
    concurrency     requests at a time (16)
    timeout         seconds for one answer (600)
    retries         tries after the first one (6)
    request         more fields of every request, null leaves one out: request.max_tokens=null

Writes generations.jsonl (one line per prompt: question, chosen, rejected and every model's answer) and images/
beside it with the original bytes. An interrupted run resumes where it stopped, and models that have answered
are not asked again. Sampled answers of a server come from the same seed per prompt, sent as `seed`, but from the
server's own random numbers.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from llava_orpo.errors import UsageError
from llava_orpo.recipe import Command, model_label, read_command, run, with_model

OWN_KEYS = {
    "models": str,
    "max_prompts": int,
    "max_new_tokens": 512,
    "temperature": 0.0,
    "top_p": 1.0,
    "best_of": int,
    "restart": False,
    "base_url": str,
    "model": str,
    "api_key_env": "OPENAI_API_KEY",
    "concurrency": 16,
    "timeout": 600.0,
    "retries": 6,
    "request": {},
}
SERVER_KEYS = ("api_key_env", "concurrency", "timeout", "retries", "request")


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS)
    recipe, own = command.recipe, command.own
    server_keys_fit(command)
    from llava_orpo.errors import UserError
    from llava_orpo.evaluation import generation, served
    from llava_orpo.evaluation.session import open_session
    from llava_orpo.files import write_jsonl
    from llava_orpo.pairs import best_of
    from llava_orpo.serving.client import Server

    if own["best_of"] is not None:
        best_of.check(own, generation.named_models(recipe, own["models"]))
    settings = generation.Settings(own["max_new_tokens"], own["temperature"], own["top_p"], int(recipe.get("seed", 0)))
    base = with_model(recipe, "base")
    given = command.given("output_dir")
    folder = Path(recipe["output_dir"] if given else f"outputs/evals/{model_label(base)}-generations")
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    names: list[str] = []
    failed: Counter = Counter()

    def keep(session, name: str, found: dict[int, dict[str, Any]], asked: int) -> None:
        names.append(name)
        for position, record in found.items():
            key = record["dataset"], record["pair_id"]
            if "bad_image" in record:
                print(f"left out {' '.join(key)}: {record['bad_image']}", file=sys.stderr)
                continue
            line = lines.setdefault(key, generation.describe(session, position, record, folder))
            line["answers"][name] = record["answer"]
        print(f"{name}: {asked} prompts of {len(session.rows)} pairs")

    if own["base_url"]:
        server = Server(own["base_url"], **{key: own[key] for key in SERVER_KEYS})
        wanted = served.names_on(server, as_list(own["models"] or own["model"]))
        with open_session(base, str(folder), need_model=False) as session:
            prompts = generation.unique_prompts(session.rows, own["max_prompts"])
            for name in wanted:
                found, missing = served.answers(server, session, prompts, folder, name, settings, own["restart"])
                failed.update(f"{name}: {reason}" for reason in missing.values())
                keep(session, name, found, len(prompts))
                if sentence := served.other_prompts(list(found.values())):
                    print(f"warning: {name}: {sentence}", file=sys.stderr)
    else:
        for name, model_recipe in generation.named_models(recipe, own["models"]).items():
            with open_session(model_recipe, str(folder), keep_adapter=own["best_of"] is not None) as session:
                prompts = generation.unique_prompts(session.rows, own["max_prompts"])
                about = session, prompts, folder, name, settings
                if own["best_of"] is None:
                    found = generation.answers(*about, own["restart"])
                else:
                    found = best_of.answers(*about, own["best_of"], own["restart"])
                keep(session, name, found, len(prompts))
    for reason, count in failed.most_common(3):
        print(f"{count} prompts got no answer, run the command again to ask them: {reason}", file=sys.stderr)
    whole = [line for line in lines.values() if len(line["answers"]) == len(names)]
    if not whole:
        raise UserError("No prompt could be answered; the reasons are above.")
    write_jsonl(folder / "generations.jsonl", whole)
    print(f"  {folder / 'generations.jsonl'}")
    return 1 if failed else 0


def server_keys_fit(command: Command) -> None:
    """Raises UsageError for keys that contradict each other."""
    own = command.own
    if own["base_url"] and own["model"] and own["models"]:
        raise UsageError("model= and models= are given; one of them names what is asked.")
    for key in ("model", *SERVER_KEYS):
        if not own["base_url"] and command.given(key):
            raise UsageError(f"{key}= is about a server, and base_url= is missing (-h shows the help).")


def as_list(names: str | None) -> list[str]:
    """Comma-separated names."""
    return [name.strip() for name in names.split(",")] if names else []


if __name__ == "__main__":
    run(main)
