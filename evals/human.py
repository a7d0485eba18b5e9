"""A blind side-by-side page for people: image, question, two answers in random order, which is better?

    python evals/human.py outputs/evals/model-generations/generations.jsonl
    python evals/human.py outputs/evals/model-generations/generations.jsonl report=true

Takes the file of evals/generate.py and key=value. The page (Gradio) is at http://127.0.0.1:7860. A rater
gives a name and votes; which model is shown on the left is random per rater and pair, and the page never holds
a model's name. Every vote is on the disk before the next pair is shown, and a rater who comes back resumes
where they stopped. Keys:

    a, b        the models to compare, by their names in the file (default, with two models: a is the second)
    max_pairs   maximum number of pairs, evenly spread over the file; all raters see the same in the same order
    seed        decides the left-right order (0)
    port        7860
    output_dir  where the votes are kept (default: votes_<a>_vs_<b>/ beside the file)
    report      true: print win rates and agreement (percent, Cohen's kappa) instead of opening the page
    judge       with report: a judge_*.json of evals/judge.py on the same file, to show its agreement as well
"""

from __future__ import annotations

import re
from pathlib import Path

from llava_orpo.recipe import read_command, run

OWN_KEYS = {
    "a": str,
    "b": str,
    "max_pairs": int,
    "seed": 0,
    "port": 7860,
    "output_dir": Path,
    "report": False,
    "judge": Path,
}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, file="generations.jsonl")
    file, own = command.file, command.own
    from llava_orpo.errors import UserError
    from llava_orpo.evaluation import voting
    from llava_orpo.evaluation.answer_pairs import read_answer_pairs
    from llava_orpo.evaluation.votes import VoteStore
    from llava_orpo.files import evenly

    a, b, pairs = read_answer_pairs(file, own["a"], own["b"])
    pairs = [pair for pair in pairs if pair.a.strip() != pair.b.strip()]  # nothing to choose
    if own["max_pairs"]:
        pairs = evenly(pairs, own["max_pairs"])
    if not pairs:
        raise UserError(f"{a} and {b} gave the same answer to every prompt: there is nothing to compare.")
    store = VoteStore(own["output_dir"] or file.parent / re.sub(r"[^\w.+-]+", "_", f"votes_{a}_vs_{b}"))
    if own["report"]:
        voting.report(a, b, pairs, store, own["judge"])
        return 0
    page = voting.make_page(pairs, store, own["seed"])
    images = sorted({str(pair.image.parent) for pair in pairs if pair.image})
    page.launch(server_name="127.0.0.1", server_port=own["port"], allowed_paths=images, show_api=False)
    return 0


if __name__ == "__main__":
    run(main)
