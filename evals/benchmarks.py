"""Hallucination benchmarks of one or more models, by lmms-eval.

    bash scripts/benchmarks.sh recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora tasks=pope
    bash scripts/benchmarks.sh recipes/tiny/llava16_orpo_qlora.yaml tasks=demo_objects

The script makes an environment of its own (.venv-benchmarks) and runs this file in it. Takes a recipe and
overrides like llamafactory-cli; models are loaded as for training and asked in exactly the prompt they are
trained on, in batches of per_device_eval_batch_size. Own keys:

    models      comma-separated: `base`, adapter folders, model folders or Hub ids (default: the recipe's own)
    tasks       comma-separated names of lmms-eval's tasks (default pope). For hallucination:
                  pope                   9,000 yes/no questions on COCO (also pope_random, pope_pop, pope_adv)
                  coco_cap_chair         CHAIR of captions; needs the data of nltk
                  amber_g                AMBER's generative part; needs the data of nltk and spaCy's en_core_web_sm
                  hallusion_bench_image  needs OPENAI_API_KEY for its judge
                  vl_rewardbench         which of two answers is better
                  demo_objects           POPE's kind of question on the demo world; no download
    limit       maximum number of questions of each task
    output_dir  where to write (default outputs/benchmarks/<model>)

Writes benchmarks.json (every model's metrics) and samples_<model>_<task>.jsonl (every answer).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from llava_orpo.errors import UserError
from llava_orpo.files import write_atomic, write_json
from llava_orpo.recipe import MODEL, model_label, read_command, run, with_model

HERE = Path(__file__).resolve().parent
OWN_KEYS = {"models": str, "tasks": "pope", "limit": int}
DEMO_TASK, DEMO_DATA = "demo_objects", Path("outputs/benchmarks/demo_objects.parquet")


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, uses=MODEL)
    recipe, own = command.recipe, command.own
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError(f"lmms-eval is not in this environment. Run: bash scripts/benchmarks.sh {' '.join(argv)}")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llava_orpo.evaluation.generation import named_models
    from llava_orpo.evaluation.lmms_model import SessionModel
    from llava_orpo.evaluation.session import open_session
    from llava_orpo.tiny import object_questions

    base = model_label(with_model(recipe, "base"))
    folder = Path(recipe["output_dir"] if command.given("output_dir") else f"outputs/benchmarks/{base}")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = own["tasks"].split(",")
    manager = TaskManager("WARNING", include_path=str(HERE / "tasks"))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"lmms-eval has no task {', '.join(unknown)}. `python -m lmms_eval tasks` lists them.")
    if DEMO_TASK in tasks and not DEMO_DATA.exists():
        object_questions.write(DEMO_DATA)

    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, model_recipe in named_models(recipe, own["models"]).items():
        with open_session(model_recipe, str(folder), need_rows=False) as session:
            found = simple_evaluate(
                model=SessionModel(session),
                tasks=tasks,
                limit=own["limit"],
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
                cli_args=argparse.Namespace(output_path=str(folder), process_with_media=False),
            )
        table[name] = {task: metrics_of(values) for task, values in found["results"].items()}
        for task, samples in found["samples"].items():
            stem = re.sub(r"[^\w.+-]+", "_", f"samples_{name}_{task}")
            write_samples(folder / f"{stem}.jsonl", samples)
        write_json(folder / "benchmarks.json", table)
    print_table(table)
    print(f"  {folder / 'benchmarks.json'}")
    return 0


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's {"<metric>,<filter>": value, …} without standard errors, names and empty entries."""
    numbers = {key.split(",")[0]: value for key, value in values.items() if isinstance(value, (int, float))}
    return {
        key: float(value) for key, value in numbers.items() if not re.search(r"_(stderr|clt|clustered)|^samples$", key)
    }


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """Writes one line per question: doc_id, target, answer and what the task made of it."""
    lines = []
    for sample in samples:
        keep = {key: value for key, value in sample.items() if key not in ("doc", "arguments", "input")}
        lines.append(json.dumps(keep, ensure_ascii=False, default=str) + "\n")
    write_atomic(path, "".join(lines))


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Prints metrics as rows and models as columns."""
    names = list(table)
    print("\n" + f"{'':<40}" + "".join(f"{name:>24}" for name in names))
    for task in table[names[0]]:
        for metric in table[names[0]][task]:
            values = "".join(f"{table[name][task][metric]:>24.4f}" for name in names)
            print(f"{task + '  ' + metric:<40}" + values)


if __name__ == "__main__":
    run(main)
