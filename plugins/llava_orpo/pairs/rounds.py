"""Rounds of alignment on a model's own answers: make pairs, train, evaluate, and again with the model that came out.

Every step is a command that could be typed, in a folder of its own:

    start/eval                    the model that the rounds begin with, on the recipe's eval_dataset
    round_<r>/pairs|model|eval    the pairs of round r, the adapter trained on them, and its evaluation on the same set

A finished step is not run again while its command, the recipe and the steps before it are the same; an interrupted one
goes on inside, as its command does. A step of other inputs starts in an empty folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_json
from ..progress import run
from ..step_list import LogSteps, step_list

TABLE = "rounds.json"
START = "start"


@dataclass(frozen=True)
class Step:
    """A step: its title, its command, its own folder, and the file that it leaves when it is done."""

    title: str
    command: tuple[str, ...]
    folder: Path
    result: str
    trainer_log: Path | None = None


def steps(recipe_file: Path, recipe: Mapping[str, Any], overrides: Sequence[str], out: Path, root: Path) -> list[Step]:
    """The steps of all rounds of a recipe.

    overrides: the words key=value that were given with the recipe; every command gets them. root: of the repository,
    whose commands are run.
    """
    python = sys.executable
    cli = str(Path(sys.executable).with_name("llamafactory-cli"))
    given = [str(recipe_file), *overrides]
    first = recipe.get("adapter_name_or_path")
    previous = recipe.get("round_reference", "previous") == "previous"
    own = recipe.get("make_pairs") or {}
    by_self = own.get("scoring", "self") == "self"

    def evaluate(title: str, adapter: str | None, folder: Path) -> Step:
        words = [f"adapter_name_or_path={adapter or 'null'}", f"output_dir={folder}"]
        command = (python, str(root / "evals/preference.py"), *given, *words)
        return Step(f"{title}: evaluation", command, folder, "preference_pairs.jsonl")

    found = [evaluate(START, first, out / START / "eval")]
    models = [first]
    for number in range(1, recipe.get("rounds", 2) + 1):
        folder, name = out / f"round_{number}", f"round_{number}"
        current = models[-1] or "null"
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in own.items()]
        words += [f"seed={int(recipe.get('seed', 42)) + number}", f"adapter_name_or_path={current}"]
        words += [f"out={folder / 'pairs'}", f"name={name}"]
        if by_self and previous and len(models) > 1 and models[-2]:
            words.append(f"reference={models[-2]}")
        command = (python, str(root / "scripts/make_pairs.py"), *given, *words)
        found.append(Step(f"round {number}: pairs", command, folder / "pairs", "pairs.parquet"))
        start = current if previous else first or "null"
        words = [f"dataset_dir={folder / 'pairs'}", f"dataset={name}", f"output_dir={folder / 'model'}"]
        words += [f"adapter_name_or_path={start}", "overwrite_output_dir=false"]
        command = (cli, "train", *given, *words)
        log = folder / "model" / "trainer_log.jsonl"
        found.append(Step(f"round {number}: training", command, folder / "model", "adapter_model.safetensors", log))
        models.append(str(folder / "model"))
        found.append(evaluate(f"round {number}", models[-1], folder / "eval"))
    return found


def run_all(planned: Sequence[Step], recipe: Mapping[str, Any], shown: LogSteps | None = None) -> dict[str, float]:
    """Runs the steps that are not done; returns {title: seconds}, those of earlier runs included.

    Raises UserError naming the log of a step that failed, KeyboardInterrupt when it was stopped.
    """
    mark = _mark({key: value for key, value in recipe.items() if key != "rounds"})
    seconds: dict[str, float] = {}
    with shown or step_list([step.title for step in planned]) as shown:
        for step in planned:
            mark = _mark([mark, step.command])
            seconds[step.title] = _run(step, mark, shown)
    return seconds


def _run(step: Step, mark: str, shown: LogSteps) -> float:
    stamp = step.folder.with_suffix(".step")
    state = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}
    result = step.folder / step.result
    shown.begin(step.title, " ".join(step.command))
    if state.get("mark") == mark and state.get("done") and result.exists():
        shown.end(state["seconds"], str(result), reused=True)
        return state["seconds"]
    if state.get("mark") != mark:
        state = {"mark": mark, "command": list(step.command), "seconds": 0.0}
        shutil.rmtree(step.folder, ignore_errors=True)
    step.folder.mkdir(parents=True, exist_ok=True)
    write_json(stamp, {**state, "done": False})
    log = step.folder.with_suffix(".log")
    started = time.monotonic()

    def ended(done: bool) -> float:
        state["seconds"] += time.monotonic() - started
        write_json(stamp, {**state, "done": done})
        return state["seconds"]

    try:
        code = run(list(step.command), log, shown.show, step.trainer_log)
    except KeyboardInterrupt:
        shown.fail()
        ended(False)
        raise
    if code or not result.exists():
        shown.fail()
        ended(False)
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")] or lines[-1:]
        raise UserError(
            f"{step.title}: the command ended with code {code}; its output is in {log}. The same command goes on.",
            *(line.removeprefix("error: ") for line in errors),
        )
    seconds = ended(True)
    shown.end(seconds, str(result))
    return seconds


def table(out: Path, rounds: int, seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """One entry for the start and for each round: its evaluation, its pairs and the seconds of its steps."""
    entries = []
    for number in range(rounds + 1):
        folder = out / (f"round_{number}" if number else START)
        last = json.loads((folder / "eval" / "preference_eval.json").read_text(encoding="utf-8"))["history"][-1]
        entry: dict[str, Any] = {"round": number, "n": last["metrics"]["n"]}
        for key in ("preference_accuracy", "preference_accuracy_low", "preference_accuracy_high", "logps/margin"):
            entry[key] = last["metrics"][key]
        entry["grounding"] = last["grounding"]
        if number:
            made = json.loads((folder / "pairs" / "pairs.json").read_text(encoding="utf-8"))
            entry["made"] = {key: made[key] for key in ("pairs", "images", "pairs_per_image", "mean_score", "left_out")}
        prefix = f"round {number}: " if number else f"{START}: "
        entry["seconds"] = {
            title.removeprefix(prefix): round(value, 1) for title, value in seconds.items() if title.startswith(prefix)
        }
        entries.append(entry)
    return entries


def print_table(entries: Sequence[Mapping[str, Any]]) -> None:
    """Prints the entries of `table`."""
    print(
        f"\n{'round':<8}{'pairs':>7}{'per image':>11}{'accuracy':>10}  {'95 % interval':<18}{'margin':>8}{'seconds':>9}"
    )
    for entry in entries:
        made = entry.get("made")
        low, high = entry["preference_accuracy_low"], entry["preference_accuracy_high"]
        pairs, per_image = (str(made["pairs"]), f"{made['pairs_per_image']:.2f}") if made else ("", "")
        print(
            f"{entry['round'] or START:<8}{pairs:>7}{per_image:>11}{entry['preference_accuracy']:>10.1%}  "
            f"{f'[{low:.1%}, {high:.1%}]':<18}{entry['logps/margin']:>8.4f}{sum(entry['seconds'].values()):>9.0f}"
        )
    print(f"Accuracy: held-out preference pairs, the same {entries[0]['n']} in every row.")


def _mark(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
