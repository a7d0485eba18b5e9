"""Writes the model card (README.md) of a merged model or an adapter, and uploads the folder if asked to.

    python scripts/model_card.py outputs/llava16_orpo_merged --recipe recipes/llava16_orpo_qlora.yaml \
        --evaluation outputs/llava16_orpo_qlora/preference_eval.json
    … the same with --push your-name/llava-v1.6-mistral-7b-orpo [--public]

The card holds the recipe, the data, the measured numbers and the licences. Without --push nothing leaves the machine.
A repository is made private unless --public is given.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from llava_orpo.export.model_card import is_stock, make_card, push, sources
from llava_orpo.preference.records import read_history


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the merged model or the adapter")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe it was trained with")
    parser.add_argument("--evaluation", type=Path, help="default: preference_eval.json in the recipe's output_dir")
    parser.add_argument("--name", help="the model's name; default: the folder's, or --push's")
    parser.add_argument("--licence", help="id of the weights' licence, where the data's is not known here")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md that is there")
    parser.add_argument("--push", metavar="NAME/REPO", help="upload the folder to this Hub repository")
    parser.add_argument("--public", action="store_true", help="with --push: anyone may download it")
    args = parser.parse_args(argv)
    if not ((args.folder / "config.json").is_file() or (args.folder / "adapter_config.json").is_file()):
        parser.error(f"{args.folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    target = args.folder / "README.md"
    if target.exists() and not (args.overwrite or is_stock(target)):
        parser.error(f"{target} exists; --overwrite replaces it")
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    path = args.evaluation or Path(recipe["output_dir"]) / "preference_eval.json"
    if args.evaluation and not path.is_file():
        parser.error(f"{path} does not exist")
    history = read_history(path) if path.is_file() else []
    registry = Path(recipe.get("dataset_dir", "data")) / "dataset_info.json"
    card = make_card(
        args.name or args.push or args.folder.resolve().name, recipe, args.recipe.name,
        sources(recipe, json.loads(registry.read_text(encoding="utf-8"))), history,
        adapter=(args.folder / "adapter_config.json").is_file(), licence=args.licence,
    )  # fmt: skip
    beside = target.with_name("README.md.partial")
    beside.write_text(card, encoding="utf-8")
    beside.replace(target)
    print(target)
    if args.push:
        print(push(args.folder, args.push, private=not args.public))
    return target


if __name__ == "__main__":
    main(sys.argv[1:])
