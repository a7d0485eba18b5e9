"""Hallucinated objects in a model's answers, counted against annotations: CHAIR and coverage, without a judge.

    python evals/objects.py recipes/tiny/cooccur.yaml annotations=outputs/cooccur/data/annotations.jsonl
    python evals/objects.py recipes/tiny/cooccur.yaml adapter_name_or_path=outputs/cooccur/orpo
    python evals/objects.py recipes/tiny/cooccur.yaml answers=outputs/evals/model-generations/generations.jsonl

Takes a recipe and overrides like llamafactory-cli. The model is the recipe's (adapter_name_or_path= for an adapter);
it answers the prompts of its eval_dataset, each (image, question) once, greedily. Own keys:

    annotations     JSON lines {"image_hash": …, "objects": [names]} (default: annotations.jsonl beside the demo data)
    vocabulary      JSON file {object: [other names]} for objects or names that the annotations do not hold
    answers         a generations.jsonl of evals/generate.py (of a server, or the best of several): nothing is generated
    answered_by     the model's name in that file, where it holds several
    max_prompts     maximum number of prompts, spread evenly over the set
    max_new_tokens  128
    output_dir      where to write (default outputs/evals/<model>-objects)
    restart         true: ask again what an interrupted or earlier run has asked

Writes objects.json (chair_s, hallucinated_per_answer, chair_i, coverage, each with a 95 % interval, per source)
and objects_answers.jsonl (per answer what is true, hallucinated and missed). An answer about an image without
annotations is left out, counted and listed in objects.json. An interrupted run resumes where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import model_label, read_command, run

OWN_KEYS = {
    "annotations": Path("outputs/cooccur/data/annotations.jsonl"),
    "vocabulary": Path,
    "answers": Path,
    "answered_by": str,
    "max_prompts": int,
    "max_new_tokens": 128,
    "restart": False,
}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS)
    recipe, own = command.recipe, command.own
    if own["answers"] is None and own["answered_by"]:
        raise UsageError("answered_by= names a model in answers=FILE, which is missing (-h shows the help).")
    from llava_orpo.evaluation import objects
    from llava_orpo.files import write_json, write_jsonl

    annotations = objects.read_annotations(own["annotations"])
    vocabulary = objects.read_vocabulary(own["vocabulary"], annotations)
    given = command.given("output_dir")
    folder = Path(recipe["output_dir"] if given else f"outputs/evals/{model_label(recipe)}-objects")
    folder.mkdir(parents=True, exist_ok=True)
    if own["answers"] is not None:
        name, answers = objects.read_answers(own["answers"], own["answered_by"])
    else:
        from llava_orpo.evaluation.generation import Settings
        from llava_orpo.evaluation.session import open_session

        name = model_label(recipe)
        with open_session(recipe, str(folder)) as session:
            settings = Settings(own["max_new_tokens"])
            answers = objects.ask(session, folder, name, settings, own["max_prompts"], own["restart"])
    counted, left_out = objects.count(answers, annotations, vocabulary)
    summary = objects.summarize(counted)
    write_jsonl(folder / "objects_answers.jsonl", [answer.to_json() for answer in counted])
    write_json(folder / "objects.json", {"model": name, **summary, "left_out": left_out})
    print(f"\n{name}: {summary['n']} answers about {summary['n_images']} images")
    for label, value in objects.table(summary):
        print(f"  {label:<32}{value}")
    if left_out:
        print(f"  left out                        {len(left_out)}, the first: {left_out[0]['reason']}")
    print(f"  {folder}/objects.json, objects_answers.jsonl")
    return 0


if __name__ == "__main__":
    run(main)
