"""One table of all forms of a model: size on disk, preference accuracy, difference from the trained form, an answer.

    python evals/variants.py recipes/tiny/llava16_orpo_qlora.yaml trained=outputs/tiny/orpo_qlora \\
        models=outputs/tiny/model,outputs/tiny/merged,outputs/tiny/gptq,outputs/tiny/awq

Takes a recipe and overrides like llamafactory-cli. `trained` (default: the recipe's output_dir) is the adapter on the
base it was trained on, quantized as the recipe says; `models` are whole folders, loaded as they are. Accuracy and
answers are those of preference.py and generate.py, and an interrupted run resumes where it stopped. Further keys:

    prompt          number of the held-out prompt whose answer is shown (default 0)
    max_new_tokens  64
    restart         true: measure again what an interrupted or earlier run has measured
    output_dir      where to write (default outputs/evals/variants)

Writes variants.json and variants.md, and every form's own evaluation beside them.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import read_command, run, with_model

OWN_KEYS = {"models": str, "trained": str, "prompt": 0, "max_new_tokens": 64, "restart": False}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS)
    recipe, own = command.recipe, command.own
    given_output = command.given("output_dir")
    trained = own["trained"] or (None if given_output else recipe.get("output_dir"))
    if not trained or not own["models"]:
        raise UsageError("Name the folders: trained=ADAPTER models=FOLDER,FOLDER,…")
    models = [model.strip().rstrip("/") for model in own["models"].split(",")]
    names = [Path(path).name for path in (str(trained).rstrip("/"), *models)]
    if len(set(names)) < len(names):
        raise UsageError(f"{', '.join(names)}: every form needs a folder name of its own; rename one.")
    from llava_orpo.evaluation.variants import measure, row, table
    from llava_orpo.files import write_atomic, write_json
    from llava_orpo.preference.metrics import compare

    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/evals/variants")
    bits = recipe.get("quantization_bit")
    forms = {f"{names[0]}, on its {f'{bits}-bit' if bits else 'unquantized'} base": with_model(recipe, trained)}
    for name, model in zip(names[1:], models, strict=True):
        forms[name] = {**with_model(recipe, model), "quantization_bit": None}
    rows, evaluations = [], []
    for name, form in forms.items():
        evaluation, answer = measure(form, folder / name.split(",")[0], own)
        evaluations.append(evaluation)
        compared = compare(evaluation.pairs, evaluations[0].pairs)
        rows.append(row(name, form, evaluation.summary, compared, answer))
    line = f"python evals/variants.py {shlex.join(argv)}"
    write_json(folder / "variants.json", {"command": line, "forms": rows})
    page = table(rows) + f"\n`{line}`\n"
    write_atomic(folder / "variants.md", page)
    print(f"\n{page}\n  {folder}/variants.md, variants.json")
    return 0


if __name__ == "__main__":
    run(main)
