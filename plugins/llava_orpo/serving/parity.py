"""Whether a server says what transformers says, and the cause where it does not.

Compared are prompts, greedy answers, log-probs and the preference accuracy of a recipe's held-out pairs.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.saved import Saved
from ..evaluation.session import Session, open_session
from ..files import evenly, write_json
from ..preference import metrics
from ..preference.records import PAIRS, ScoredPair, write_pairs
from ..recipe import with_model
from . import causes
from .asked import ANSWER, SIDES, Abilities, Asked
from .client import EndpointUnusable, RequestFailed, Server
from .reference import Reference, Row, gap_where_they_part, projector_state, read_rows, token_logps, with_projector

REPORT = "serve_parity.json"
# Worst difference of a token's log-prob, in nats, that counts as equal. In float32 2e-5 was measured over 15,824
# tokens; between float32 and bfloat16 0.05 over 816.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
ROUNDING = (
    "log-probs: off by no more than rounding to 16 bits makes them: the server may compute in another precision than "
    "the reference (tolerance= says what counts as equal)"
)
NOT_APPLIED = (
    "the adapter is not applied: model= names the base model, or the server has the adapter under another name"
)
WITHOUT_PROJECTOR = "the projector's part of the adapter is left out (vLLM: --enable-tower-connector-lora)"


def check(
    recipe: dict[str, Any],
    server: Server,
    model: str | None,
    folder: Path,
    max_rows: int,
    max_new_tokens: int,
    tolerance: float | None,
    restart: bool,
) -> dict[str, Any]:
    """Compares `model` on the server with the recipe's on `max_rows` held-out pairs, as serve_parity.json in `folder`.

    Answers that came before an interruption are kept in `folder` and not asked again. Returns the report.
    Raises UserError for a server that cannot be used, and for a set without a usable row.
    """
    if max_rows < 1:
        raise UserError(f"max_rows={max_rows}: must be at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    with open_session(recipe, str(folder), need_model=False) as session:
        rows, bad = read_rows(session, evenly(range(len(session.rows)), max_rows))
        if not rows:
            raise UserError(f"No row can be asked: {next(iter(bad.values()), 'the evaluation set is empty')}")
        abilities, records = ask_server(server, model, rows, folder, max_new_tokens, restart)
        reference = Reference(session, folder, max_new_tokens)
        report = None
        if not reference.missing(rows):
            report = compare(session, rows, abilities, records, reference.found, tolerance)
    if report is None or not report["equal"]:  # causes need the model too
        with open_session(recipe, str(folder)) as session:
            reference = Reference(session, folder, max_new_tokens)
            reference.compute(rows)
            report = compare(session, rows, abilities, records, reference.found, tolerance)
    if (
        recipe.get("adapter_name_or_path")
        and report["logps"]
        and report["logps"]["worst"]
        and not report["logps"]["equal"]
    ):
        report["causes"] += adapter_causes(recipe, folder, rows, records, report["tolerance"])
    report["unreadable_images"] = bad
    report["base_url"], report["model"] = server.base_url, abilities.model
    report["reference"]["model"] = recipe.get("adapter_name_or_path") or recipe["model_name_or_path"]
    answers = [records[ANSWER, row.position] for row in rows]
    report["server"]["tokens_per_second"] = _rate(answers, server.concurrency)
    write_json(folder / REPORT, report)
    if report["accuracy"]:
        write_pairs(folder / f"{PAIRS}.jsonl", server_pairs(rows, records))
    return report


def ask_server(
    server: Server, model: str | None, rows: Sequence[Row], folder: Path, max_new_tokens: int, restart: bool
) -> tuple[Abilities, dict[tuple[str, int], dict[str, Any]]]:
    """(what the server can do, {(what, position): record}), with what an interrupted run has asked already."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.position, row.image_hash, row.prompt_ids, row.answer_ids]).encode())
    parts = [server.base_url, model, max_new_tokens, digest.hexdigest()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    path = folder / ".parity_server.jsonl"
    return asyncio.run(_ask_server(server, model, rows, path, key, max_new_tokens, restart))


async def _ask_server(server, model, rows, path, key, max_new_tokens, restart):
    asked = Asked(server, model, max_new_tokens)
    try:
        try:
            abilities = await asked.greet(rows[0])
        except (EndpointUnusable, RequestFailed) as error:
            raise server.unusable(error) from None
        saved = Saved(path, key, restart)
        if saved.records and not await _still_the_same(asked, rows, saved.records):
            saved = Saved(path, key, restart=True)
        done = {(record["what"], record["position"]): record for record in saved.records}
        kinds = (ANSWER, *SIDES) if abilities.logps else (ANSWER,)
        tasks = [(what, row) for row in rows for what in kinds]
        waiting = [(what, row) for what, row in tasks if (what, row.position) not in done]
        with saved.appending(len(tasks), len(tasks) - len(waiting), "request", asked.model) as add:

            def keep(record: dict[str, Any]) -> None:
                add([record])
                done[record["what"], record["position"]] = record

            def kept() -> str:
                return f"{len(done)} of {len(tasks)} answers are kept: the same command asks for the others."

            try:
                failed = await asked.run(waiting, keep)
            except EndpointUnusable as error:
                raise server.unusable(error, kept()) from None
        if failed:
            what, why = next(iter(failed.items()))
            raise UserError(
                f"{len(failed)} of {len(tasks)} requests to {server.base_url} failed; {what}: {why} {kept()}"
            )
        path.unlink()  # a next run asks the server as it is then
        return abilities, done
    finally:
        await asked.close()


async def _still_the_same(asked: Asked, rows: Sequence[Row], records: Sequence[dict[str, Any]]) -> bool:
    """Whether the server gives a kept answer again: it may have been started anew with other options meanwhile."""
    by_position = {row.position: row for row in rows}
    old = next((record for record in records if record["what"] == ANSWER), None)
    if old is None or old["position"] not in by_position:
        return False
    new = await asked.ask((ANSWER, by_position[old["position"]]))
    return all(new[key] == old[key] for key in ("answer", "prompt_tokens", "prompt_ids"))


def compare(
    session: Session,
    rows: Sequence[Row],
    abilities: Abilities,
    records: Mapping[tuple[str, int], dict[str, Any]],
    reference: Mapping[int, dict[str, Any]],
    tolerance: float | None,
) -> dict[str, Any]:
    """The report on what the server said. session: with its model for the causes that need it."""
    precision = reference[rows[0].position]["precision"]
    tolerance = TOLERANCE.get(precision.split()[0], TOLERANCE["float32"]) if tolerance is None else tolerance
    logps = _compare_logps(rows, records, reference, tolerance) if abilities.logps else None
    lines = [
        _compare_row(session, row, records[ANSWER, row.position], reference[row.position]["answer"], logps, tolerance)
        for row in rows
    ]
    told = [line["prompt_tokens"] for line in lines if line["prompt_tokens"][0] is not None]
    counts = [there == right for there, right in told]
    ids = [line["prompt_ids_equal"] for line in lines if line["prompt_ids_equal"] is not None]
    report = {
        "n": len(rows),
        "reference": {"precision": precision, "transformers": importlib.metadata.version("transformers")},
        "server": {"kind": abilities.kind, "prompt_ids": abilities.ids, "logps": abilities.logps},
        "prompt_counts_equal": sum(counts) if counts else None,
        "prompt_ids_equal": sum(ids) if ids else None,
        "answers_equal": sum(line["answers_equal"] for line in lines),
        "tolerance": tolerance,
        "logps": {key: value for key, value in logps.items() if key != "worst_of_row"} if logps else None,
        "accuracy": _accuracy(session, rows, records, reference) if logps and logps["scored"] else None,
        "causes": _causes(session, rows, abilities, records, lines, logps, tolerance),
        "rows": lines,
    }
    n, accuracy = len(rows), report["accuracy"]
    report["equal"] = (
        report["prompt_counts_equal"] in (None, n)
        and report["prompt_ids_equal"] in (None, n)
        and report["answers_equal"] == n
        and (logps is None or logps["equal"])
        and (accuracy is None or abs(accuracy["correct"][0] - accuracy["correct"][1]) <= 1)
    )
    report["reference"]["tokens_per_second"] = _rate([reference[row.position] for row in rows], 1)
    return report


def _compare_row(session: Session, row: Row, record: Mapping, ours: str, logps: Mapping | None, tolerance: float):
    """One row's line of the report; where the answers differ, with the reason."""
    ids, count = record["prompt_ids"], record["prompt_tokens"]
    line = {
        "pair_id": row.pair_id,
        "dataset": row.dataset,
        "question": row.question,
        "prompt_tokens": [count, len(row.prompt_ids)],
        "prompt_ids_equal": None if ids is None else ids == row.prompt_ids,
        "answer": record["answer"],
        "reference_answer": ours,
        "answers_equal": record["answer"] == ours,
        "finish": record["finish"],
    }
    if logps:
        line["worst_logp_difference"] = logps["worst_of_row"][row.position]
    if not line["answers_equal"]:
        differs = line["prompt_ids_equal"] is False or (count is not None and count != len(row.prompt_ids))
        if session.model and not differs:
            line["gap"] = gap_where_they_part(session, row, ours, record["answer"])
        line["why"] = causes.answer_cause(row, record, ours, differs, line.get("gap"), tolerance)
    return line


def _causes(session: Session, rows, abilities: Abilities, records, lines, logps, tolerance: float) -> list[str]:
    """Why prompts, answers and log-probs differ, each cause once."""
    found = causes.prompt_causes(
        session.template.conversation,
        session.tokenizer,
        session.image_token_id,
        rows,
        {row.position: records[ANSWER, row.position] for row in rows},
        abilities.text_tokens,
        abilities.text_ids,
    )
    why = Counter(line["why"] for line in lines if "why" in line)
    found = found + [f"{count} answers: {cause}" for cause, count in why.most_common() if cause != causes.OTHER_PROMPT]
    if not logps or logps["equal"]:
        return list(dict.fromkeys(found))
    if session.model:
        off = [row for row in rows if logps["worst_of_row"][row.position] > tolerance]
        found += sorted({cause for row in off if (cause := causes.image_cause(row.image))})
    if not found and tolerance < (logps["worst"] or 0) < TOLERANCE["bfloat16"]:
        found.append(ROUNDING)
    return list(dict.fromkeys(found))


def _compare_logps(rows, records, reference, tolerance) -> dict[str, Any]:
    """Differences of every answer token's log-prob, in nats."""
    worst_of_row, every, same_ids, told = {}, [], 0, 0
    scored = 0
    for row in rows:
        worst = 0.0
        for side in SIDES:
            record, ours = records[side, row.position], reference[row.position]["logps"][side]
            if record["ids"] is not None:
                told += 1
                same_ids += record["ids"] == [*row.prompt_ids, *row.answer_ids[side]]
            if record["logps"] is None:
                continue
            scored += 1
            differences = [abs(a - b) for a, b in zip(record["logps"], ours, strict=True)]
            every += differences
            worst = max(worst, *differences)
        worst_of_row[row.position] = worst
    found = {
        "answers": 2 * len(rows),
        "scored": scored,
        "ids_equal": same_ids if told else None,
        "tokens": len(every),
        "worst": max(every, default=None),
        "mean": sum(every) / len(every) if every else None,
        "worst_of_row": worst_of_row,
    }
    found["equal"] = (
        scored == 2 * len(rows) and found["worst"] <= tolerance and found["ids_equal"] in (None, 2 * len(rows))
    )
    return found


def _pair(row: Row, logps: Mapping[str, Sequence[float]]) -> ScoredPair:
    return ScoredPair(
        row.pair_id,
        row.dataset,
        f"{row.source}/{row.question_type}",
        row.source,
        row.question_type,
        row.image_hash,
        "true",
        sum(logps["chosen"]),
        sum(logps["rejected"]),
        len(row.answer_ids["chosen"]),
        len(row.answer_ids["rejected"]),
    )


def server_pairs(rows: Sequence[Row], records) -> list[ScoredPair]:
    """The pairs as the server scores them, for `preference.metrics`; those that it scored whole."""
    whole = [row for row in rows if all(records[side, row.position]["logps"] is not None for side in SIDES)]
    return [_pair(row, {side: records[side, row.position]["logps"] for side in SIDES}) for row in whole]


def _accuracy(session: Session, rows, records, reference) -> dict[str, Any]:
    """Preference accuracy of (server, reference) with 95 % intervals, on the same pairs."""
    served = server_pairs(rows, records)
    named = {pair.key for pair in served}
    ours = [pair for row in rows if (pair := _pair(row, reference[row.position]["logps"])).key in named]
    both = [metrics.summarize(pairs, beta=session.beta) for pairs in (served, ours)]
    keys = ("preference_accuracy", "preference_accuracy_low", "preference_accuracy_high")
    return {
        "n": len(served),
        "correct": [sum(pair.correct for pair in pairs) for pairs in (served, ours)],
        "server": [both[0][key] for key in keys],
        "reference": [both[1][key] for key in keys],
    }


def adapter_causes(
    recipe: dict[str, Any], folder: Path, rows: Sequence[Row], records: Mapping, tolerance: float
) -> list[str]:
    """Whether the log-probs are those of the base model, or of its projector with the rest of the adapter.

    LLaMA-Factory merges an adapter that is not trained, so both are computed from the base model. One model is in
    memory at a time.
    """
    row = max(rows, key=lambda row: len(row.answer_ids["chosen"]))
    answer, theirs = row.answer_ids["chosen"], records["chosen", row.position]["logps"]

    def equal(session: Session) -> bool:
        ours = token_logps(session, row, answer)
        return theirs is not None and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= tolerance

    with open_session(with_model(recipe, "base"), str(folder), need_rows=False) as base:
        if equal(base):
            return [NOT_APPLIED]
        state = projector_state(base)
    with open_session(recipe, str(folder), need_rows=False) as session, with_projector(session, state):
        return [WITHOUT_PROJECTOR] if equal(session) else []


def _rate(records: Sequence[Mapping[str, Any]], at_a_time: int) -> float | None:
    """Answer tokens per second, None where the server counts none."""
    counts = [record["tokens"] for record in records]
    seconds = sum(record["seconds"] for record in records) / at_a_time
    return None if None in counts or not seconds else sum(counts) / seconds


def table(report: Mapping[str, Any]) -> str:
    """The report as lines for the terminal."""
    n, logps, accuracy = report["n"], report["logps"], report["accuracy"]

    def of(count: int | None, total: int) -> str:
        return "not told by this server" if count is None else f"{count} of {total} equal"

    server, ours = report["server"], report["reference"]
    lines = [
        f"{report['model']} at {report['base_url']} against {ours['model']}, "
        f"transformers {ours['transformers']}, {ours['precision']}",
        f"  {'prompt token counts':<22}{of(report['prompt_counts_equal'], n)}",
        f"  {'prompt token ids':<22}{of(report['prompt_ids_equal'], n)}",
        f"  {'greedy answers':<22}{of(report['answers_equal'], n)}",
    ]
    if logps and logps["tokens"]:
        lines.append(
            f"  {'log-probs':<22}worst token {logps['worst']:.2g}, mean {logps['mean']:.2g} nats off, "
            f"{logps['tokens']} tokens of {logps['answers']} answers (tolerance {report['tolerance']:g})"
        )
    else:
        lines.append(f"  {'log-probs':<22}not told by this server")
    if accuracy:
        shown = [
            f"{accuracy[side][0]:.1%} [{accuracy[side][1]:.1%}, {accuracy[side][2]:.1%}]"
            for side in ("server", "reference")
        ]
        lines.append(f"  {'preference accuracy':<22}{shown[0]}, transformers {shown[1]}, {accuracy['n']} pairs")
    if server["tokens_per_second"]:
        lines.append(
            f"  {'tokens per second':<22}{server['tokens_per_second']:.0f}, "
            f"transformers {ours['tokens_per_second']:.0f}"
        )
    lines += [f"  why: {cause}" for cause in report["causes"]]
    lines.append("  equal" if report["equal"] else "  DIFFERENT")
    return "\n".join(lines)
