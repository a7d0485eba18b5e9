"""One evaluation of one model, resumed where an earlier run stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.skipped import EVALUATION, stop_at_bad_row, summarize_skipped, write_skipped
from ..preference import scoring
from ..preference.fingerprint import fingerprint as of_recipe
from ..preference.records import CONDITIONS
from ..preference.scoring import ScoredRow
from ..preference.writing import Evaluation, write_evaluation
from .saved import Saved
from .session import Session, open_session


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
    return of_recipe(session.recipe, session.rows)
