"""One evaluation of one model, resumed where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..data.skipped import EVALUATION, stop_at_bad_row, summarize_skipped, write_skipped
from ..preference import scoring
from ..preference.records import CONDITIONS
from ..preference.scoring import ScoredRow
from ..preference.writing import Evaluation, write_evaluation
from .saved import Saved
from .session import Session, open_session

FROM_RECIPE = (
    "model_name_or_path",
    "adapter_name_or_path",
    "quantization_bit",
    "eval_dataset",
    "cutoff_len",
    "dataset_filter",
    "heldout_fraction",
    "anyres_max_tiles",
    "template",
    "max_samples",
    "bf16",
    "fp16",
    "quantize_vision",
    "quantization_type",
    "quantization_method",
    "double_quantization",
    "infer_dtype",
)
ROW_KEYS = ("image_hash", "num_image_tokens", "prompt_ids", "chosen_ids", "rejected_ids")  # what a score depends on


def evaluate(recipe: dict[str, Any], folder: Path, restart: bool = False) -> Evaluation:
    """Scores the recipe's model on its eval_dataset into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_session(recipe, str(folder)) as session:
        return evaluate_session(session, folder, restart)


def evaluate_session(session: Session, folder: Path, restart: bool = False) -> Evaluation:
    """`evaluate` with a model that is loaded already."""
    conditions = CONDITIONS if session.arguments.grounding_eval else ("true",)
    merged = {condition: scoring.merge([score(session, folder, condition, restart)]) for condition in conditions}
    evaluation = Evaluation.of(session.rows, merged, session.beta, session.arguments.eval_min_subset)
    list_left_out(session, folder, evaluation)
    count = session.arguments.eval_examples
    write_evaluation(folder, session.rows, evaluation, session.tokenizer, count, step=0, epoch=0.0)
    return evaluation


def list_left_out(session: Session, folder: Path, evaluation: Evaluation) -> None:
    """Adds the pairs whose image did not decode to skipped_rows.jsonl, and logs how many pairs it lists.

    Raises UserError for the first of them under `bad_rows: error`.
    """
    named = session.rows.select_columns(["dataset", "row", "pair_id"])
    entries = [
        {"stage": EVALUATION, **named[row.position], "reason": f"bad image: {row.bad_image}"}
        for row in evaluation.unusable
    ]
    write_skipped(str(folder), entries)
    stop_at_bad_row(entries, session.arguments.bad_rows)
    summarize_skipped(str(folder))


def score(session: Session, folder: Path, condition: str, restart: bool) -> list[ScoredRow]:
    """Scores all rows; those in `<folder>/.scored_<condition>.jsonl` from an earlier run are not scored again."""
    saved = Saved(folder / f".scored_{condition}.jsonl", fingerprint(session), restart)
    done = [ScoredRow.from_json(record) for record in saved.records]
    seen = {row.position for row in done}
    waiting = [i for i in range(len(session.rows)) if i not in seen]
    if not waiting:
        return done
    size = session.batch_size
    with saved.appending(len(session.rows), len(done), "pair", condition) as add:
        return done + scoring.score(
            session.score_batch,
            session.rows,
            scoring.in_groups(session.rows, waiting, size, condition, session.arguments),
            session.collator,
            size,
            condition,
            num_workers=session.num_workers,
            on_batch=lambda rows: add([row.to_json() for row in rows]),
        )


def fingerprint(session: Session) -> str:
    """A name of what was scored: model, adapter files, data and every key that changes a score."""
    parts: dict[str, Any] = {key: session.recipe.get(key) for key in FROM_RECIPE}
    for key in ("model_name_or_path", "adapter_name_or_path"):
        root = Path(str(parts[key]))
        if root.is_dir():
            weights = sorted(root.glob("*.safetensors"))
            parts[key + "/files"] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights]
    parts["rows"] = rows_digest(session.rows)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rows_digest(rows) -> str:
    """A name of tokenized pairs: everything of them that an answer or a score depends on."""
    found = hashlib.sha256()
    for row, name in zip(rows.select_columns(list(ROW_KEYS)), scoring.unique_ids(rows), strict=True):
        found.update(json.dumps([name, *row.values()]).encode())
    return found.hexdigest()
