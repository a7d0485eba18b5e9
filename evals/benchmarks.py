"""Hallucination benchmarks of one or more models, by lmms-eval.

    bash scripts/benchmarks.sh recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora tasks=pope
    bash scripts/benchmarks.sh recipes/tiny/llava16_orpo_qlora.yaml tasks=demo_objects

The script makes an environment of its own (.venv-benchmarks) and runs this file in it. Takes a recipe and
overrides like llamafactory-cli; models are loaded as for training and asked in exactly the prompt they are
trained on, in batches of per_device_eval_batch_size. Own keys:

    models      comma-separated: `base`, adapter folders, model folders or Hub ids (default: the recipe's own)
    tasks       comma-separated names of lmms-eval's tasks, default pope. For hallucination:
                  pope                   9,000 yes/no questions on COCO (also pope_random, pope_pop, pope_adv)
                  coco_cap_chair         CHAIR of captions; needs nltk data
                  amber_g                AMBER's generative part; needs nltk data and spaCy's en_core_web_sm
                  hallusion_bench_image  needs OPENAI_API_KEY for its judge
                  vl_rewardbench         which of two answers is better
                  demo_objects           POPE's kind of question on the demo world; no download
    limit       only so many questions of each task
    output_dir  where to write (default outputs/benchmarks/<model>)

Writes benchmarks.json (every model's metrics) and samples_<model>_<task>.jsonl (every answer).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OWN_KEYS = {"models": None, "tasks": "pope", "limit": None}
DEMO_TASK, DEMO_DATA = "demo_objects", Path("outputs/benchmarks/demo_objects.parquet")


def main(argv: list[str]) -> int:
    if importlib.util.find_spec("lmms_eval") is None:
        raise SystemExit(
            f"lmms-eval is not in this environment. Run: bash scripts/benchmarks.sh {' '.join(argv)}"
        )
    import torch
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llava_orpo.evaluation.generation import named_models
    from llava_orpo.evaluation.lmms_model import SessionModel
    from llava_orpo.evaluation.session import open_session
    from llava_orpo.recipe import model_label, read_recipe, with_model

    recipe, own = read_recipe(argv, OWN_KEYS)
    given_output = any(word.startswith("output_dir=") for word in argv)
    base = model_label(with_model(recipe, "base"))
    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/benchmarks") / base
    folder.mkdir(parents=True, exist_ok=True)
    tasks = own["tasks"].split(",") if isinstance(own["tasks"], str) else list(own["tasks"])
    manager = TaskManager("WARNING", include_path=str(HERE / "tasks"))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise SystemExit(
            f"lmms-eval has no task {', '.join(unknown)}. `python -m lmms_eval tasks` lists them."
        )
    if DEMO_TASK in tasks and not DEMO_DATA.exists():
        from llava_orpo.tiny.object_questions import write

        write(DEMO_DATA)

    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, model_recipe in named_models(recipe, own["models"]).items():
        session = open_session(model_recipe, str(folder), need_rows=False)
        found = simple_evaluate(
            model=SessionModel(session), tasks=tasks, limit=own["limit"], task_manager=manager, log_samples=True,
            bootstrap_iters=0, cli_args=argparse.Namespace(output_path=str(folder), process_with_media=False),
        )  # fmt: skip
        table[name] = {task: metrics_of(values) for task, values in found["results"].items()}
        for task, samples in found["samples"].items():
            stem = re.sub(r"[^\w.+-]+", "_", f"samples_{name}_{task}")
            write_samples(folder / f"{stem}.jsonl", samples)
        del session
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        (folder / "benchmarks.json").write_text(json.dumps(table, indent=1))
    print_table(table)
    print(f"  {folder / 'benchmarks.json'}")
    return 0


def metrics_of(values: dict[str, Any]) -> dict[str, float]:
    """lmms-eval's {"<metric>,<filter>": value, …} without standard errors, names and empty entries."""
    numbers = {key.split(",")[0]: value for key, value in values.items() if isinstance(value, (int, float))}
    return {
        key: float(value)
        for key, value in numbers.items()
        if not re.search(r"_(stderr|clt|clustered)|^samples$", key)
    }


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    """A line a question: doc_id, target, answer and what the task made of it."""
    lines = []
    for sample in samples:
        keep = {key: value for key, value in sample.items() if key not in ("doc", "arguments", "input")}
        lines.append(json.dumps(keep, ensure_ascii=False, default=str) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def print_table(table: dict[str, dict[str, dict[str, float]]]) -> None:
    """Metrics as rows, models as columns."""
    names = list(table)
    print("\n" + f"{'':<40}" + "".join(f"{name:>24}" for name in names))
    for task in table[names[0]]:
        for metric in table[names[0]][task]:
            values = "".join(f"{table[name][task][metric]:>24.4f}" for name in names)
            print(f"{task + '  ' + metric:<40}" + values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
