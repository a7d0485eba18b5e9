"""Answers of one or more models to the held-out prompts, for reading, for the report and for a judge.

    python evals/generate.py recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora
    python evals/generate.py recipes/tiny/llava16_orpo_qlora.yaml models=base,outputs/tiny/orpo_qlora

Takes a recipe and overrides like llamafactory-cli. The prompts are those of its eval_dataset, each (image,
question) once, in exactly the text the model is trained on. Batches are per_device_eval_batch_size. Own keys:

    models          comma-separated: `base`, adapter folders, model folders or Hub ids (default: the recipe's own).
                    Answers are filed under a folder's last name, under its whole path where two share that
                    name
    max_prompts     at most so many prompts, spread evenly over the set
    max_new_tokens  512
    temperature     0 is greedy; above, sampled with the recipe's `seed`
    top_p           1.0
    output_dir      where to write (default outputs/evals/<model>-generations)
    restart         true: ask again what an interrupted or earlier run had asked

Writes generations.jsonl (a line a prompt: question, chosen, rejected and every model's answer) and images/
beside it, the original bytes. An interrupted run goes on where it stopped, and models that have answered are
not asked again.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from llava_orpo.evaluation.generation import OWN_KEYS, answers, describe, named_models, unique_prompts
from llava_orpo.evaluation.session import open_session
from llava_orpo.recipe import model_label, read_recipe, with_model


def main(argv: list[str]) -> int:
    recipe, own = read_recipe(argv, OWN_KEYS)
    given_output = any(word.startswith("output_dir=") for word in argv)
    base = model_label(with_model(recipe, "base"))
    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/evals") / f"{base}-generations"
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for name, model_recipe in named_models(recipe, own["models"]).items():
        session = open_session(model_recipe, str(folder))
        prompts = unique_prompts(session.rows, own["max_prompts"])
        found = answers(session, prompts, folder, name, own)
        for position in prompts:
            record = found[position]
            if "bad_image" in record:
                print(
                    f"left out {record['dataset']} {record['pair_id']}: {record['bad_image']}",
                    file=sys.stderr,
                )
                continue
            line = lines.setdefault(
                (record["dataset"], record["pair_id"]), describe(session, position, record, folder)
            )
            line["answers"][name] = record["answer"]
        print(f"{name}: {len(prompts)} prompts of {len(session.rows)} pairs")
        del session
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not lines:
        raise SystemExit("No prompt could be answered: every image is unreadable (listed above).")
    target = folder / "generations.jsonl"
    beside = target.with_suffix(".jsonl.partial")
    beside.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()), encoding="utf-8"
    )
    beside.replace(target)
    print(f"  {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
