"""The inputs of `evals/report.py`: an output folder (scores, history, training log), texts and images of examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..files import inside, read_jsonl
from ..preference.records import CONDITIONS, EXAMPLES, HISTORY, PAIRS, ScoredPair, read_history, read_pairs

Key = tuple[str, str]  # (dataset, pair_id)
# trainer_log.jsonl uses LLaMA-Factory's names for what trainer_state.json calls by TRL's.
_TRAINER_LOG_NAMES = {"current_steps": "step", "lr": "learning_rate", "accuracy": "rewards/accuracies"}


@dataclass(frozen=True)
class Run:
    """One output folder; whatever it lacks is empty.

    `pairs` maps an image condition to its scored pairs; `log` holds training log entries under the names of
    `trainer_state.json`.
    """

    folder: Path
    pairs: dict[str, list[ScoredPair]]
    history: list[dict]
    log: list[dict]
    facts: dict[str, str]


@dataclass(frozen=True)
class Texts:
    """The texts and the image of one pair; `answers` maps a model's name to what it generated."""

    question: str
    chosen: str
    rejected: str
    image: Path | None
    answers: dict[str, str]


def read_run(folder: Path) -> Run:
    """Reads what an evaluation or a training left in `folder`.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: a file is damaged (the line is named).
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give a recipe's or evals/preference.py's output_dir.")
    pairs: dict[str, list[ScoredPair]] = {condition: [] for condition in CONDITIONS}
    for path in sorted(folder.glob(f"{PAIRS}*.jsonl")):  # a file per evaluation set and image condition
        for pair in read_pairs(path):
            pairs[pair.image_condition].append(pair)
    history_file = folder / HISTORY
    history = read_history(history_file) if history_file.exists() else []
    return Run(folder, pairs, history, _read_training_log(folder), _read_facts(folder))


def read_texts(run: Run, generations: Path | None) -> dict[Key, Texts]:
    """Texts by (dataset, pair_id) from `preference_examples.jsonl` and `generations.jsonl`.

    Both name images relative to their own folder; `generations` defaults to the file in the run's folder.

    Raises:
        UserError: a line lacks its texts, or names an image outside the file's folder (the message has `file:line`).
    """
    texts: dict[Key, Texts] = {}
    for path in (run.folder / EXAMPLES, generations or run.folder / "generations.jsonl"):
        if not path.exists():
            if path == generations:
                raise FileNotFoundError(f"{path}: no such file. evals/generate.py writes it.")
            continue
        for where, line in _read_jsonl(path):
            for field in ("dataset", "pair_id", "question", "chosen", "rejected"):
                if not isinstance(line.get(field), str):
                    raise UserError(f"{where}: field {field!r} must be a string, got {line.get(field)!r}.")
            answers = line.get("answers") or {}
            if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
                raise UserError(f"{where}: 'answers' must map model names to strings.")
            key = (line["dataset"], line["pair_id"])
            earlier = texts.get(key)
            image = _image_path(path.parent, line.get("image"), where)
            texts[key] = Texts(
                line["question"],
                line["chosen"],
                line["rejected"],
                image or (earlier.image if earlier else None),
                (earlier.answers if earlier else {}) | answers,
            )
    return texts


def _image_path(folder: Path, image: dict | None, where: str) -> Path | None:
    if image is None:
        return None
    if not isinstance(image, dict) or not isinstance(image.get("path"), str):
        raise UserError(f"{where}: 'image' must be null or an object with a 'path'.")
    return inside(folder, image["path"], where)  # a page made to be shared shows no other file of this machine


def _read_training_log(folder: Path) -> list[dict]:
    checkpoints = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    for path in [folder / "trainer_state.json", *reversed(checkpoints)]:
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))["log_history"]
    path = folder / "trainer_log.jsonl"
    if not path.exists():
        return []
    return [{_TRAINER_LOG_NAMES.get(k, k): v for k, v in line.items()} for _, line in _read_jsonl(path)]


def _read_jsonl(path: Path) -> list[tuple[str, dict]]:
    entries = read_jsonl(path, "Delete it or make the file again.")
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object, got {type(entry).__name__}.")
    return entries


def _read_facts(folder: Path) -> dict[str, str]:
    """The few lines that tell a reader which run this was; a missing file adds no line."""
    facts = {"Output": folder.resolve().name}
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        config = json.loads(adapter.read_text(encoding="utf-8"))
        facts["Base model"] = Path(config["base_model_name_or_path"]).name
        kind = "DoRA" if config.get("use_dora") else "LoRA" if config["peft_type"] == "LORA" else config["peft_type"]
        facts["Adapter"] = f"{kind}, rank {config['r']}" if "r" in config else kind
    results = folder / "all_results.json"
    if results.exists():
        content = json.loads(results.read_text(encoding="utf-8"))
        if "train_runtime" in content:
            minutes = content["train_runtime"] / 60
            facts["Training time"] = f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    return facts
