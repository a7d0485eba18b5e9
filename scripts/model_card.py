"""Writes the model card (README.md) of a merged model or an adapter, and uploads the folder if asked to.

    python scripts/model_card.py recipes/llava16_orpo_qlora.yaml folder=outputs/llava16_orpo_merged \\
        evaluation=outputs/llava16_orpo_qlora/preference_eval.json
    python scripts/model_card.py recipes/llava16_orpo_qlora.yaml folder=outputs/llava16_orpo_merged \\
        push=your-name/llava-v1.6-mistral-7b-orpo public=true

The card holds the recipe, the data, the measured numbers and the licences. Without push nothing leaves the machine.
A repository is made private unless public=true is given. Takes the recipe the model was trained with. Own keys:

    folder       the merged model or the adapter
    evaluation   default: preference_eval.json in the recipe's output_dir
    name         the model's name; default: the folder's, or that of push
    licence      id of the weights' licence, where the data's is not known here
    overwrite    true: replace a README.md that exists
    push         NAME/REPO: upload the folder to this Hub repository
    public       true: with push, anyone may download it
"""

from __future__ import annotations

import json
from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import A_WORD, THE_FILE, read_command, run

OWN_KEYS = {
    "folder": Path,
    "evaluation": Path,
    "name": str,
    "licence": str,
    "overwrite": False,
    "push": str,
    "public": False,
}
OLD_FLAGS = {"--recipe": THE_FILE, A_WORD: "folder", **{f"--{key}": key for key in OWN_KEYS if key != "folder"}}


def main(argv: list[str]) -> int:
    # a card is also written on another machine than the one of the training: no file of the recipe has to be there
    command = read_command(__doc__, argv, OWN_KEYS, required=("folder",), uses=(), old=OLD_FLAGS)
    recipe, own = command.recipe, command.own
    folder, push_to = own["folder"], own["push"]
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    if own["evaluation"] and not own["evaluation"].is_file():
        raise UsageError(f"{own['evaluation']} does not exist")
    from llava_orpo.export.model_card import is_stock, make_card, origin_of, push, sources
    from llava_orpo.files import write_atomic
    from llava_orpo.preference.records import read_history

    target = folder / "README.md"
    if target.exists() and not (own["overwrite"] or is_stock(target)):
        raise UsageError(f"{target} exists; overwrite=true replaces it")
    evaluation = own["evaluation"] or Path(recipe["output_dir"]) / "preference_eval.json"
    history = read_history(evaluation) if evaluation.is_file() else []
    registry = Path(recipe.get("dataset_dir", "data")) / "dataset_info.json"
    card = make_card(
        own["name"] or push_to or folder.resolve().name,
        recipe,
        command.file.name,
        sources(recipe, json.loads(registry.read_text(encoding="utf-8"))),
        history,
        adapter=is_adapter,
        licence=own["licence"],
        origin=origin_of(target),
    )
    write_atomic(target, card)
    print(target)
    if push_to:
        print(push(folder, push_to, private=not own["public"]))
    return 0


if __name__ == "__main__":
    run(main)
