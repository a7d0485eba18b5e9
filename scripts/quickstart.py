"""The four moves on the embedded tiny model, each through the command a user would type. Run by quickstart.sh.

Prints every command before it runs; its output goes to outputs/quickstart/<step>.log. A finished step leaves a
fingerprint of its inputs, and is not run again while they are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("outputs/quickstart")
RECIPE = "recipes/tiny/llava16_orpo_qlora.yaml"
MODEL, DATA, ADAPTER, MERGED = "outputs/tiny/model", "outputs/tiny/data", "outputs/tiny/orpo_qlora", "outputs/tiny/merged"
BEFORE = "outputs/evals/tiny-before"
TINY = "plugins/llava_orpo/tiny"
SOURCES = {
    "data": [f"{TINY}/world_pairs.py", f"{TINY}/world.py"],
    "model": [f"{TINY}/model.py", f"{TINY}/training.py", f"{TINY}/world.py"],
}


def fingerprint(name: str, command: str, after: list[str]) -> str:
    """Of the command, the files that decide its result, and the steps before it."""
    parts = [command, *after]
    for path in SOURCES.get(name, [RECIPE, "recipes/tiny/llava16_merge.yaml", "data_registry/dataset_info.json"]):
        parts.append(Path(path).read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Steps:
    def __init__(self) -> None:
        self.prints: list[str] = []
        self.seconds: dict[str, float] = {}

    def run(self, name: str, title: str, command: str, result: str) -> None:
        """Runs a command unless `result` exists and was made by the same command from the same inputs."""
        stamp = OUT / f"{name}.done"
        mark = fingerprint(name, command, self.prints)
        self.prints.append(mark)
        print(f"\n[{title}]\n$ {command}", flush=True)
        if Path(result).exists() and stamp.exists() and json.loads(stamp.read_text())["mark"] == mark:
            self.seconds[name] = json.loads(stamp.read_text())["seconds"]
            print(f"  done before, in {self.seconds[name]:.0f} s: {result}")
            return
        started = time.time()
        log = OUT / f"{name}.log"
        with log.open("w") as out:
            code = subprocess.run(shlex.split(command), stdout=out, stderr=subprocess.STDOUT).returncode
        if code or not Path(result).exists():
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
            raise SystemExit(f"\nThe step failed (exit code {code}); its whole output is in {log}.")
        self.seconds[name] = time.time() - started
        stamp.write_text(json.dumps({"mark": mark, "seconds": self.seconds[name]}))
        print(f"  {self.seconds[name]:.0f} s: {result}", flush=True)


def accuracies(folder: str) -> dict:
    """Metrics and grounding of the last evaluation in a folder."""
    return json.loads((Path(folder) / "preference_eval.json").read_text())["history"][-1]


def percent(entry: dict) -> str:
    m = entry["metrics"]
    return f"{m['preference_accuracy']:6.1%}  [{m['preference_accuracy_low']:.1%}, {m['preference_accuracy_high']:.1%}]"


def main() -> None:
    os.chdir(ROOT)
    OUT.mkdir(parents=True, exist_ok=True)
    steps = Steps()
    py = shlex.quote(sys.executable)
    cli = shlex.quote(str(Path(sys.executable).parent / "llamafactory-cli"))
    steps.run("data", "demo world in RLAIF-V's schema", f"{py} scripts/make_demo_data.py --out {DATA}", f"{DATA}/demo_heldout.parquet")
    steps.run("model", "tiny LLaVA-NeXT", f"{py} scripts/make_tiny_llava.py --out {MODEL}", f"{MODEL}/model.safetensors")
    evaluate = f"{py} evals/preference.py {RECIPE} grounding_eval=true output_dir={BEFORE} restart=true"
    steps.run("before", "preference accuracy before", evaluate, f"{BEFORE}/preference_pairs.jsonl")
    # training ends with the same evaluation, on the same pairs
    steps.run("train", "ORPO + QLoRA, and preference accuracy after", f"{cli} train {RECIPE} grounding_eval=true", f"{ADAPTER}/adapter_model.safetensors")
    steps.run("export", "merge and export", f"{cli} export recipes/tiny/llava16_merge.yaml", f"{MERGED}/config.json")
    steps.run("answer", "the merged model in plain transformers", f"{py} scripts/ask.py {MERGED} --row 0 --data {DATA}/demo_heldout.parquet --out {OUT}/answer.json", f"{OUT}/answer.json")
    steps.run("report", "report", f"{py} evals/report.py {ADAPTER} --baseline {BEFORE} --out {OUT}/report.html", f"{OUT}/report.html")

    before, after = accuracies(BEFORE), accuracies(ADAPTER)
    summary = {
        "accuracy_before": before["metrics"]["preference_accuracy"],
        "accuracy_after": after["metrics"]["preference_accuracy"],
        "accuracy_after_grey_image": after["grounding"]["grey"]["preference_accuracy"],
        "n_pairs": after["metrics"]["n"],
        "merged_dir": str(ROOT / MERGED),
        "adapter_dir": str(ROOT / ADAPTER),
        "seconds": round(sum(steps.seconds.values()), 1),
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    answer = json.loads((OUT / "answer.json").read_text())
    print(f"""
Held-out preference accuracy, {summary['n_pairs']} pairs on images never trained on
  before ORPO             {percent(before)}
  after ORPO              {percent(after)}
  after, every image grey {after['grounding']['grey']['preference_accuracy']:6.1%}   (near 50 %: the preference comes from the image)

The merged model, loaded by plain transformers:
  Q: {answer['question']}
  A: {answer['answer']}    (chosen: {answer['chosen']})

Made in {summary['seconds']:.0f} s:
  {MODEL}                   the tiny base model
  {DATA}                    demo_train, demo_dev and demo_heldout.parquet
  {ADAPTER}              the adapter, curves, preference_eval.json, preference_pairs.jsonl
  {MERGED}                  the merged model
  {OUT}/report.html    open it in a browser
  {OUT}/summary.json""")


if __name__ == "__main__":
    main()
