"""Preference accuracy, log-probs and SFT loss of any model on any registered dataset: exact, per pair, resumable.

    python evals/preference.py recipes/llava16_orpo_qlora.yaml adapter_name_or_path=outputs/llava16_orpo_qlora
    python evals/preference.py recipes/tiny/llava16_orpo_qlora.yaml                      # the base model
    python evals/preference.py recipes/tiny/llava16_orpo_qlora.yaml against=outputs/tiny/orpo_qlora

Takes a recipe and overrides like llamafactory-cli. The model is the recipe's (adapter_name_or_path= for an adapter,
model_name_or_path= for a merged or quantized one), the pairs are its eval_dataset. Own keys:

    against       a second model to compare with: an adapter folder, a model folder or Hub id, or `base`
    output_dir    where to write (default outputs/evals/<model>; a second model goes to a folder of its own)
    restart       true: score again what an interrupted or earlier run has scored

Writes preference_eval.json, preference_pairs.jsonl, preference_examples.jsonl with images and, with `against`,
comparison.json. `grounding_eval=true` adds a grey and a swapped image. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import model_label, read_command, run, with_model

OWN_KEYS = {"against": str, "restart": False}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS)
    recipe, own = command.recipe, command.own
    from llava_orpo.evaluation.resume import evaluate
    from llava_orpo.files import write_json
    from llava_orpo.preference.metrics import compare

    given_output = command.given("output_dir")
    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/evals") / model_label(recipe)
    evaluation = evaluate(recipe, folder, own["restart"])
    print_summary(model_label(recipe), evaluation.name, evaluation.summary, evaluation.grounding)
    print(f"  {folder}/preference_eval.json, preference_pairs.jsonl, preference_examples.jsonl")
    if own["against"]:
        other = with_model(recipe, own["against"])
        other_folder = folder.parent / (f"{folder.name}-against" if given_output else model_label(other))
        if other_folder == folder:
            other_folder = folder.with_name(folder.name + "-against")
        against = evaluate(other, other_folder, own["restart"])
        print_summary(model_label(other), against.name, against.summary, against.grounding)
        comparison = compare(against.pairs, evaluation.pairs)
        comparison.update(a=own["against"], b=model_label(recipe))
        write_json(folder / "comparison.json", comparison)
        print_comparison(comparison)
        print(f"  {folder / 'comparison.json'}")
    return 0


def print_summary(model: str, dataset: str, summary: dict, grounding: dict | None) -> None:
    """Prints the numbers as a table."""
    low, high = summary["preference_accuracy_low"], summary["preference_accuracy_high"]
    rows = [
        ("preference accuracy", f"{summary['preference_accuracy']:.1%}  [{low:.1%}, {high:.1%}]"),
        ("  by summed log-prob", f"{summary['preference_accuracy_sum']:.1%}"),
        ("margin (nats per token)", f"{summary['logps/margin']:.4f}"),
        ("log-prob chosen / rejected", f"{summary['logps/chosen']:.4f} / {summary['logps/rejected']:.4f}"),
        ("SFT loss", f"{summary['sft_loss']:.4f}"),
        ("odds-ratio loss", f"{summary['odds_ratio_loss']:.4f}"),
    ]
    for name in ("grey", "other") if grounding else ():
        rows.append((f"accuracy, {name} image", f"{grounding[name]['preference_accuracy']:.1%}"))
    for group in ("source", "question_type"):
        subsets = summary["subsets"][group]
        if len(subsets) > 1:
            rows += [(f"  {k}", f"{m['preference_accuracy']:.1%}  (n={m['n']})") for k, m in subsets.items()]
    print(f"\n{model} on {dataset}, {summary['n']} pairs")
    for label, value in rows:
        print(f"  {label:<28}{value}")


def print_comparison(c: dict) -> None:
    """Prints the paired difference as a table."""
    interval = "" if c["difference_low"] is None else f"  [{c['difference_low']:+.1%}, {c['difference_high']:+.1%}]"
    print(f"\n{c['a']} minus {c['b']}, the same {c['n']} pairs on {c['n_images']} images")
    print(f"  accuracy      {c['accuracy_a']:.1%} - {c['accuracy_b']:.1%} = {c['difference']:+.1%}{interval}")
    print(f"  margin        {c['margin_difference']:+.4f} nats per token")
    print(f"  McNemar       p = {c['mcnemar_p']:.3g} ({c['only_a']} gained, {c['only_b']} lost)")


if __name__ == "__main__":
    run(main)
