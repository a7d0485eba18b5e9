"""Preference accuracy, log-probs and SFT loss of any model on any registered dataset: exact, per pair, resumable.

    python evals/preference.py recipes/llava16_orpo_qlora.yaml adapter_name_or_path=outputs/llava16_orpo_qlora
    python evals/preference.py recipes/tiny/llava16_orpo_qlora.yaml                      # the base model
    python evals/preference.py recipes/tiny/llava16_orpo_qlora.yaml against=outputs/tiny/orpo_qlora

Takes a recipe and overrides like llamafactory-cli. The model is the recipe's (adapter_name_or_path= for an adapter,
model_name_or_path= for a merged or quantized one), the pairs are its eval_dataset. Own keys:

    against       a second model to compare with: an adapter folder, a model folder or Hub id, or `base`
    output_dir    where to write (default outputs/evals/<model>; a second model goes to a folder of its own)
    restart       true: score again what an interrupted or earlier run had scored

Writes preference_eval.json, preference_pairs.jsonl, preference_examples.jsonl with images and, with `against`,
comparison.json. `grounding_eval=true` adds a grey and a swapped image. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava_orpo.evaluation.resume import evaluate
from llava_orpo.preference import metrics as preference
from llava_orpo.recipe import model_label, read_recipe, with_model

OWN_KEYS = {"against": None, "restart": False}


def main(argv: list[str]) -> int:
    given_output = any(word.startswith("output_dir=") for word in argv)
    recipe, own = read_recipe(argv, OWN_KEYS)
    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/evals") / model_label(recipe)
    pairs = evaluate(recipe, folder, own["restart"])
    if own["against"]:
        other = with_model(recipe, own["against"])
        other_folder = folder.parent / (model_label(other) if not given_output else f"{folder.name}-against")
        if other_folder == folder:
            other_folder = folder.with_name(folder.name + "-against")
        other_pairs = evaluate(other, other_folder, own["restart"])
        comparison = preference.compare(other_pairs, pairs)
        comparison.update(a=own["against"], b=model_label(recipe))
        (folder / "comparison.json").write_text(json.dumps(comparison, indent=1))
        print_comparison(comparison)
        print(f"  {folder / 'comparison.json'}")
    return 0


def print_comparison(c: dict) -> None:
    """The paired difference as a table."""
    interval = "" if c["difference_low"] is None else f"  [{c['difference_low']:+.1%}, {c['difference_high']:+.1%}]"
    print(f"\n{c['a']} minus {c['b']}, the same {c['n']} pairs on {c['n_images']} images")
    print(f"  accuracy      {c['accuracy_a']:.1%} - {c['accuracy_b']:.1%} = {c['difference']:+.1%}{interval}")
    print(f"  margin        {c['margin_difference']:+.4f} nats per token")
    print(f"  McNemar       p = {c['mcnemar_p']:.3g} ({c['only_a']} gained, {c['only_b']} lost)")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
