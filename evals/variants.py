"""One table for all forms of a model: size on disk, preference accuracy, difference from the trained form, an answer.

    python evals/variants.py recipes/tiny/llava16_orpo_qlora.yaml trained=outputs/tiny/orpo_qlora \\
        models=outputs/tiny/model,outputs/tiny/merged,outputs/tiny/gptq,outputs/tiny/awq

Takes a recipe and overrides like llamafactory-cli. `trained` (default: the recipe's output_dir) is the adapter on the
base it was trained on, quantized as the recipe says; `models` are whole folders, loaded as they are. Accuracy and answers
come from preference.py and generate.py, so an interrupted run goes on where it stopped. Own keys besides:

    prompt          number of the held-out prompt whose answer is shown (default 0)
    max_new_tokens  64
    output_dir      where to write (default outputs/evals/variants)

Writes variants.json and variants.md, and every form's own evaluation beside them.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from llava_orpo.evaluation import generation, resume
from llava_orpo.evaluation.session import Session, open_session
from llava_orpo.preference import metrics as preference
from llava_orpo.recipe import read_recipe, with_model

OWN_KEYS = {"models": None, "trained": None, "prompt": 0, "max_new_tokens": 64, "restart": False}
HEAD = ["form", "on disk", "preference accuracy", "against the trained form", "answer"]


def main(argv: list[str]) -> int:
    recipe, own = read_recipe(argv, OWN_KEYS)
    given_output = any(word.startswith("output_dir=") for word in argv)
    trained = own["trained"] or (None if given_output else recipe["output_dir"])
    if not trained or not own["models"]:
        raise SystemExit("Name the folders: trained=ADAPTER models=FOLDER,FOLDER,…")
    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/evals/variants")
    models = [model.strip().rstrip("/") for model in str(own["models"]).split(",")]
    names = [Path(path).name for path in (str(trained).rstrip("/"), *models)]
    if len(set(names)) < len(names):
        raise SystemExit(f"{', '.join(names)}: every form needs a folder name of its own; rename one.")
    bits = recipe.get("quantization_bit")
    forms = {f"{names[0]}, on its {f'{bits}-bit' if bits else 'unquantized'} base": with_model(recipe, trained)}
    for name, model in zip(names[1:], models, strict=True):
        forms[name] = {**with_model(recipe, model), "quantization_bit": None}
    rows, pairs = [], []
    for name, form in forms.items():
        place = folder / name.split(",")[0]
        scored, answer = measure(form, place, own)
        pairs.append(scored)
        rows.append(row(name, form, place, preference.compare(scored, pairs[0]), answer))
    command = f"python evals/variants.py {shlex.join(argv)}"
    (folder / "variants.json").write_text(json.dumps({"command": command, "forms": rows}, indent=1, ensure_ascii=False))
    page = table(rows) + f"\n`{command}`\n"
    (folder / "variants.md").write_text(page, encoding="utf-8")
    print(f"\n{page}\n  {folder}/variants.md, variants.json")
    return 0


def measure(form: dict[str, Any], place: Path, own: dict[str, Any]) -> tuple[list[dict], dict[str, str]]:
    """(scored pairs, `one_answer`) of a form, which is loaded once and let go."""
    place.mkdir(parents=True, exist_ok=True)
    session = open_session(form, str(place))
    return resume.evaluate_session(session, place, own["restart"]), one_answer(session, place, own)


def one_answer(session: Session, place: Path, own: dict[str, Any]) -> dict[str, str]:
    """{"question", "chosen", "answer"} of the asked prompt, greedy."""
    positions = generation.unique_prompts(session.rows)
    if not 0 <= own["prompt"] < len(positions):
        raise SystemExit(f"prompt={own['prompt']}: the held-out set has {len(positions)} prompts, counted from 0.")
    position = positions[own["prompt"]]
    settings = {**generation.OWN_KEYS, "max_new_tokens": own["max_new_tokens"], "restart": own["restart"]}
    record = generation.answers(session, [position], place, "answer", settings)[position]
    line = generation.describe(session, position, record, place)
    return {"question": line["question"], "chosen": line["chosen"], "answer": record.get("answer", "")}


def row(name: str, form: dict[str, Any], place: Path, compared: dict, answer: dict[str, str]) -> dict[str, Any]:
    adapter = form.get("adapter_name_or_path")
    metrics = json.loads((place / "preference_eval.json").read_text())["history"][-1]["metrics"]
    return {
        "form": name,
        "path": adapter or form["model_name_or_path"],
        "bytes": weight_bytes(Path(adapter or form["model_name_or_path"])),
        "n": metrics["n"],
        **{f"accuracy{bound}": metrics[f"preference_accuracy{bound}"] for bound in ("", "_low", "_high")},
        **{key: compared[key] for key in ("difference", "difference_low", "difference_high", "mcnemar_p")},
        **answer,
    }


def weight_bytes(folder: Path) -> int | None:
    """Bytes of a local folder's own weights, checkpoints below it not counted; None for a Hub id."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"{rows[0]['n']} held-out pairs. \"{rows[0]['question']}\" (chosen: \"{rows[0]['chosen']}\")", ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for number, r in enumerate(rows):
        size = "-" if r["bytes"] is None else f"{r['bytes'] / 1e6:.1f} MB" if r["bytes"] < 1e9 else f"{r['bytes'] / 1e9:.1f} GB"
        interval = f"{r['accuracy']:.1%} [{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
        bounds = "" if r["difference_low"] is None else f" [{r['difference_low']:+.1%}, {r['difference_high']:+.1%}]"
        against = f"{r['difference']:+.1%}{bounds}" if number else "-"
        text = r["answer"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {r['form']} | {size} | {interval} | {against} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
