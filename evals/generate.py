"""Answers of one or more models to the held-out prompts, for reading, for the report and for a judge.

    python evals/generate.py recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora
    python evals/generate.py recipes/tiny/llava16_orpo_qlora.yaml models=base,outputs/tiny/orpo_qlora

Takes a recipe and overrides like llamafactory-cli. The prompts are those of its eval_dataset, each (image,
question) once, in exactly the text the model is trained on. A batch holds per_device_eval_batch_size. Own keys:

    models          comma-separated: `base`, adapter folders, model folders or Hub ids (default: the recipe's own).
                    Answers are filed under a folder's last name, or its whole path where two share that name
    max_prompts     maximum number of prompts, spread evenly over the set
    max_new_tokens  512
    temperature     0 is greedy; above, sampled with the recipe's `seed`
    top_p           1.0
    output_dir      where to write (default outputs/evals/<model>-generations)
    restart         true: ask again what an interrupted or earlier run has asked

Writes generations.jsonl (one line per prompt: question, chosen, rejected and every model's answer) and images/
beside it with the original bytes. An interrupted run resumes where it stopped, and models that have answered
are not asked again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llava_orpo.recipe import model_label, read_command, run, with_model

OWN_KEYS = {
    "models": str,
    "max_prompts": int,
    "max_new_tokens": 512,
    "temperature": 0.0,
    "top_p": 1.0,
    "restart": False,
}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS)
    recipe, own = command.recipe, command.own
    from llava_orpo.errors import UserError
    from llava_orpo.evaluation.generation import Settings, answers, describe, named_models, unique_prompts
    from llava_orpo.evaluation.session import open_session
    from llava_orpo.files import write_jsonl

    settings = Settings(own["max_new_tokens"], own["temperature"], own["top_p"], int(recipe.get("seed", 0)))
    base = model_label(with_model(recipe, "base"))
    folder = Path(recipe["output_dir"] if command.given("output_dir") else f"outputs/evals/{base}-generations")
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for name, model_recipe in named_models(recipe, own["models"]).items():
        with open_session(model_recipe, str(folder)) as session:
            prompts = unique_prompts(session.rows, own["max_prompts"])
            found = answers(session, prompts, folder, name, settings, own["restart"])
            for position in prompts:
                record = found[position]
                key = record["dataset"], record["pair_id"]
                if "bad_image" in record:
                    print(f"left out {' '.join(key)}: {record['bad_image']}", file=sys.stderr)
                    continue
                line = lines.setdefault(key, describe(session, position, record, folder))
                line["answers"][name] = record["answer"]
            print(f"{name}: {len(prompts)} prompts of {len(session.rows)} pairs")
    if not lines:
        raise UserError("No prompt could be answered: every image is unreadable (listed above).")
    write_jsonl(folder / "generations.jsonl", lines.values())
    print(f"  {folder / 'generations.jsonl'}")
    return 0


if __name__ == "__main__":
    run(main)
