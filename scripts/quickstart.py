"""Trains, evaluates and exports the embedded tiny model, each step through the command a user would type.

quickstart.sh runs it. Shows every command and its progress; its output goes to outputs/quickstart/<step>.log. A
finished step leaves a fingerprint of its inputs and is not run again while they are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
import time
from pathlib import Path

from llava_orpo.progress import run
from llava_orpo.recipe import flags
from llava_orpo.recipe import run as start
from llava_orpo.step_list import LogSteps, step_list

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("outputs/quickstart")
RECIPE = "recipes/tiny/llava16_orpo_qlora.yaml"
MODEL, DATA = "outputs/tiny/model", "outputs/tiny/data"
ADAPTER, MERGED = "outputs/tiny/orpo_qlora", "outputs/tiny/merged"
BEFORE = "outputs/evals/tiny-before"
TITLES = {
    "data": "demo world in RLAIF-V's schema",
    "model": "tiny LLaVA-NeXT",
    "before": "preference accuracy before",
    "train": "ORPO + QLoRA, and preference accuracy after",
    "export": "merge and export",
    "answer": "the merged model in plain transformers",
    "report": "report",
}
TINY = "plugins/llava_orpo/tiny"
SOURCES = {
    "data": [f"{TINY}/world_pairs.py", f"{TINY}/world.py"],
    "model": [f"{TINY}/model.py", f"{TINY}/training.py", f"{TINY}/world.py"],
}


def fingerprint(name: str, command: str, after: list[str]) -> str:
    """The fingerprint of the command, the files that decide its result, and the steps before it."""
    parts = [command, *after]
    for path in SOURCES.get(name, [RECIPE, "recipes/tiny/llava16_merge.yaml", "data_registry/dataset_info.json"]):
        parts.append(Path(path).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class StepFailed(Exception):
    """A step's command failed; `log` holds its whole output."""

    def __init__(self, code: int, log: Path) -> None:
        super().__init__(f"The step failed (exit code {code}); its whole output is in {log}.")
        self.log = log


class Steps:
    """Runs the steps in order and shows them in `shown`, which lists all of them."""

    def __init__(self, shown: LogSteps) -> None:
        self.shown = shown
        self.prints: list[str] = []
        self.seconds: dict[str, float] = {}

    def run(self, name: str, command: str, result: str, trainer_log: Path | None = None) -> None:
        """Runs a command unless `result` exists and was made by the same command from the same inputs.

        Raises StepFailed if the command fails or makes no `result`.
        """
        stamp = OUT / f"{name}.done"
        mark = fingerprint(name, command, self.prints)
        self.prints.append(mark)
        self.shown.begin(TITLES[name], command.replace(f"{ROOT}/", ""))
        if Path(result).exists() and stamp.exists() and json.loads(stamp.read_text())["mark"] == mark:
            self.seconds[name] = json.loads(stamp.read_text())["seconds"]
            self.shown.end(self.seconds[name], result, reused=True)
            return
        started = time.time()
        log = OUT / f"{name}.log"
        stamp.unlink(missing_ok=True)
        try:
            code = run(shlex.split(command), log, self.shown.show, trainer_log)
        except KeyboardInterrupt:
            self.shown.fail()
            raise
        if code or not Path(result).exists():
            self.shown.fail()
            raise StepFailed(code, log)
        self.seconds[name] = time.time() - started
        stamp.write_text(json.dumps({"mark": mark, "seconds": self.seconds[name]}))
        self.shown.end(self.seconds[name], result)


def accuracies(folder: str) -> dict:
    """Metrics and grounding of the last evaluation in a folder."""
    return json.loads((Path(folder) / "preference_eval.json").read_text())["history"][-1]


def percent(entry: dict) -> str:
    m = entry["metrics"]
    return f"{m['preference_accuracy']:6.1%}  [{m['preference_accuracy_low']:.1%}, {m['preference_accuracy_high']:.1%}]"


def run_steps(steps: Steps) -> None:
    """Runs all steps, each with the command a user would type. Raises StepFailed."""
    py = shlex.quote(sys.executable)
    cli = shlex.quote(str(Path(sys.executable).parent / "llamafactory-cli"))
    heldout, answer, report = f"{DATA}/demo_heldout.parquet", OUT / "answer.json", OUT / "report.html"
    steps.run("data", f"{py} scripts/make_demo_data.py --out {DATA}", heldout)
    steps.run("model", f"{py} scripts/make_tiny_llava.py --out {MODEL}", f"{MODEL}/model.safetensors")
    evaluate = f"{py} evals/preference.py {RECIPE} grounding_eval=true output_dir={BEFORE} restart=true"
    steps.run("before", evaluate, f"{BEFORE}/preference_pairs.jsonl")
    # Training ends with the same evaluation, on the same pairs.
    train = f"{cli} train {RECIPE} grounding_eval=true"
    steps.run("train", train, f"{ADAPTER}/adapter_model.safetensors", Path(ADAPTER) / "trainer_log.jsonl")
    steps.run("export", f"{cli} export recipes/tiny/llava16_merge.yaml", f"{MERGED}/config.json")
    ask = f"{py} scripts/ask.py {MERGED} --row 0 --data {heldout} --out {answer}"
    steps.run("answer", ask, str(answer))
    steps.run("report", f"{py} evals/report.py {ADAPTER} baseline={BEFORE} out={report}", str(report))


def main(argv: list[str]) -> int:
    flags(__doc__).parse_args(argv)
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        with step_list(list(TITLES.values())) as shown:
            steps = Steps(shown)
            run_steps(steps)
    except StepFailed as error:
        print("\n".join(error.log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. To resume at the unfinished step: bash scripts/quickstart.sh", file=sys.stderr)
        return 130
    print_summary(sum(steps.seconds.values()))
    return 0


def print_summary(seconds: float) -> None:
    """Writes summary.json and prints the results and the files that were made."""
    before, after = accuracies(BEFORE), accuracies(ADAPTER)
    grey = after["grounding"]["grey"]["preference_accuracy"]
    summary = {
        "accuracy_before": before["metrics"]["preference_accuracy"],
        "accuracy_after": after["metrics"]["preference_accuracy"],
        "accuracy_after_grey_image": grey,
        "n_pairs": after["metrics"]["n"],
        "merged_dir": str(ROOT / MERGED),
        "adapter_dir": str(ROOT / ADAPTER),
        "seconds": round(seconds, 1),
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    answer = json.loads((OUT / "answer.json").read_text())
    print(f"""
Held-out preference accuracy, {summary["n_pairs"]} pairs on images never trained on
  before ORPO             {percent(before)}
  after ORPO              {percent(after)}
  after, every image grey {grey:6.1%}   (near 50 %: the preference comes from the image)

The merged model, loaded by plain transformers:
  Q: {answer["question"]}
  A: {answer["answer"]}    (chosen: {answer["chosen"]})

Made in {summary["seconds"]:.0f} s:
  {MODEL}                   the tiny base model
  {DATA}                    demo_train, demo_dev and demo_heldout.parquet
  {ADAPTER}              the adapter, curves, preference_eval.json, preference_pairs.jsonl
  {MERGED}                  the merged model
  {OUT}/report.html    open it in a browser
  {OUT}/summary.json""")


if __name__ == "__main__":
    start(main)
