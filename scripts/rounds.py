"""Rounds of alignment on a model's own answers: sample, score, pair, train, evaluate; then again with what came out.

    python scripts/rounds.py recipes/tiny/llava16_rounds.yaml
    python scripts/rounds.py recipes/llava16_rounds.yaml rounds=4 make_pairs.answers=10

Takes a recipe and overrides like llamafactory-cli. These keys of it are about rounds (docs/keys.md):

    rounds             2
    make_pairs         keys of scripts/make_pairs.py (its -h shows them): {answers: 8, scoring: self, ...}
    round_reference    previous (default): round r trains on with the adapter of round r-1 and its self-reward compares
                       that adapter with the one of round r-2 (in round 1: the recipe's adapter with the base model).
                       base: every round trains from where the recipe starts, a new adapter or adapter_name_or_path,
                       and the self-reward compares the model of round r-1 with the base model

Prompts are those of the recipe's `dataset`. Before the first round the model is the recipe's; scoring: self needs it to
have an adapter (adapter_name_or_path). Own key:

    out                where to write (default outputs/rounds/<recipe>)

Each step is a command of its own: scripts/make_pairs.py, llamafactory-cli train and evals/preference.py, on the same
held-out pairs every time, with its log beside its folder. Stopped or failed, the same command goes on: finished steps
are reused, the others resume inside. Writes rounds.json, and prints it as a table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llava_orpo.pairs import options, rounds
from llava_orpo.recipe import read_command, run

ROOT = Path(__file__).resolve().parent.parent
OWN_KEYS = {"out": Path}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, uses=None)
    recipe = command.recipe
    options.check_mapping(recipe)
    out = command.own["out"] or Path("outputs/rounds") / command.file.stem
    overrides = [word for word in argv[1:] if not word.startswith("out=")]
    planned = rounds.steps(command.file, recipe, overrides, out, ROOT)
    try:
        seconds = rounds.run_all(planned, recipe)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on at the unfinished step.", file=sys.stderr)
        return 130
    entries = rounds.table(out, recipe.get("rounds", 2), seconds)
    rounds.write_json(out / rounds.TABLE, {"recipe": str(command.file), "overrides": overrides, "rounds": entries})
    rounds.print_table(entries)
    print(f"  {out / rounds.TABLE}")
    return 0


if __name__ == "__main__":
    run(main)
