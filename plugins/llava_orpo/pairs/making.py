"""Pairs out of a model's own answers: sampled, scored, paired and written, with a list of whatever is left out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..data import columns, image_store
from ..errors import UserError
from ..evaluation import generation, judging, served
from ..evaluation.answer_pairs import AnswerPair
from ..evaluation.judge_prompt import CRITERIA
from ..evaluation.session import Session, open_session
from ..files import evenly, write_json, write_jsonl
from ..precheck import DATASET_INFO, names
from ..recipe import model_label
from ..serving.client import ChatClient, Server
from . import judged, objects, pairing, sampling, self_reward, writing
from .options import SERVER_KEYS

SUMMARY, LEFT_OUT, ANSWERS = "pairs.json", "left_out.jsonl", "answers.jsonl"
TOO_FEW = "fewer than two whole answers"
NO_OBJECTS = "fewer than two answers name an object"
NOT_ANNOTATED = "the image is not annotated"


@dataclass
class Made:
    """What is known of the prompts so far. answers: distinct whole ones; scores: theirs, None where there is none."""

    answers: dict[int, list[str]] = field(default_factory=dict)
    scores: dict[int, list[float | None]] = field(default_factory=dict)
    ties: dict[int, list[float]] = field(default_factory=dict)
    left_out: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # the same command may still answer these
    answers_left_out: Counter = field(default_factory=Counter)

    def drop(self, position: int, reason: str) -> None:
        """Leaves a prompt out."""
        self.answers.pop(position, None)
        self.left_out[position] = reason


def make(recipe: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the pairs of a recipe's `dataset` by the keys of `options.OWN_KEYS` and returns their summary.

    Writes pairs.parquet, dataset_info.json, answers.jsonl (every answer with its score), left_out.jsonl and pairs.json
    into own["out"]. Resumes there.

    Raises UserError where no pair can be made at all; what was sampled and scored is kept.
    """
    folder: Path = own["out"] or Path("outputs/pairs") / model_label(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    settings = generation.Settings(own["max_new_tokens"], own["temperature"], own["top_p"], int(recipe.get("seed", 0)))
    asked = {**recipe, "eval_dataset": recipe["dataset"], "adapter_name_or_path": recipe.get("adapter_name_or_path")}
    by_self = own["scoring"] == "self"
    notes = objects.read_annotations(own["annotations"], own["vocabulary"]) if own["scoring"] == "objects" else None
    need_model = by_self or not own["base_url"]
    with open_session(asked, str(folder), need_model=need_model, keep_adapter=by_self) as session:
        if by_self:
            self_reward.use_reference(session, own["reference"])
        positions = prompts_of(session.rows, own["max_prompts"])
        made = Made()
        label = _sample(session, positions, folder, own, settings, made)
        _score(session, folder, own, notes, made)
        return _write(session, recipe, folder, own, label, len(positions), made)


def prompts_of(rows, limit: int | None) -> list[int]:
    """Positions of the first pair of each (image, prompt); at most `limit`, all those of an image together.

    The images are spread evenly over the set, so that many pairs share an image (`group_pairs_by_image`).
    """
    positions = generation.unique_prompts(rows)
    if limit is None or limit >= len(positions):
        return positions
    hashes = columns.values(rows, "image_hash")
    by_image: dict[str, list[int]] = {}
    for position in positions:
        by_image.setdefault(hashes[position] or f"prompt {position}", []).append(position)
    wanted = max(limit * len(by_image) // len(positions), 1)
    return [position for own in evenly(list(by_image.values()), wanted) for position in own][:limit]


def _sample(session: Session, positions: list[int], folder: Path, own: Mapping[str, Any], settings, made: Made) -> str:
    """Fills in the answers; returns a name of the model that gave them."""
    count, restart = own["answers"], own["restart"]
    if own["base_url"]:
        server = Server(own["base_url"], **{key: own[key] for key in SERVER_KEYS})
        (label,) = served.names_on(server, [own["model"]] if own["model"] else [])
        records, made.failed = sampling.sample_served(
            server, session, positions, folder, label, settings, count, restart
        )
        if sentence := served.other_prompts(list(records.values())):
            print(f"warning: {label}: {sentence}", file=sys.stderr)
    else:
        label = model_label(session.recipe)
        records = sampling.sample(session, positions, folder, settings, count, restart)
    for position, record in records.items():
        if "bad_image" in record:
            made.drop(position, f"bad image: {record['bad_image']}")
            continue
        whole = [text for text, cut in zip(record["answers"], record["cut"], strict=True) if text and not cut]
        made.answers_left_out["empty"] += sum(not text for text in record["answers"])
        made.answers_left_out["no end within max_new_tokens"] += sum(record["cut"])
        texts = pairing.distinct(whole)
        made.answers_left_out["the same as another"] += len(whole) - len(texts)
        if len(whole) < 2:
            made.drop(position, TOO_FEW)
        elif len(texts) < 2:
            made.drop(position, pairing.ALL_EQUAL)
        else:
            made.answers[position] = texts
    return label


def _score(session: Session, folder: Path, own: Mapping[str, Any], notes, made: Made) -> None:
    if own["scoring"] == "self":
        found = self_reward.rewards(session, made.answers, folder, own["reference"], own["restart"])
        for position, record in found.items():
            if "bad_image" in record:
                made.drop(position, f"bad image: {record['bad_image']}")
            else:
                made.scores[position] = record["scores"]
    elif own["scoring"] == "judge":
        _judge(session, folder, own, made)
    else:
        for position, texts in list(made.answers.items()):
            row = session.rows[position]
            there = None
            if row["image"] is not None:
                there = notes.of(row["image_hash"], image_store.name_of(row["image"]))
            if there is None:
                made.drop(position, NOT_ANNOTATED)
                continue
            found = [objects.score(text, there, notes.phrases) for text in texts]
            made.scores[position], made.ties[position] = map(list, zip(*found, strict=True))
            unscored = sum(score is None for score, _ in found)
            made.answers_left_out["names no object"] += unscored
            if len(found) - unscored < 2:
                made.drop(position, NO_OBJECTS)


def _judge(session: Session, folder: Path, own: Mapping[str, Any], made: Made) -> None:
    ids = generation.scoring.unique_ids(session.rows)
    prompts = {}
    for position, texts in made.answers.items():
        line = generation.describe(session, position, {"pair_id": ids[position]}, folder)
        image = folder / line["image"]["path"] if line["image"] else None
        names_of = (line["dataset"], line["pair_id"], line["subset"], line["question"])
        prompts[position] = AnswerPair(*names_of, image, "", ""), texts
    client = ChatClient(own["judge_url"], own["judge_key_env"], own["timeout"], own["retries"])
    criteria = own["criteria"].read_text(encoding="utf-8").strip() if own["criteria"] else CRITERIA
    request = {key: value for key, value in {**judging.REQUEST, **own["judge_request"]}.items() if value is not None}
    asking = judging.Asking(client, own["judge_model"], criteria, request, own["concurrency"])
    confirm = {"base_url": own["judge_url"], **{key: own[key] for key in ("price_in", "price_out", "yes")}}
    made.scores, missing = judged.scores(prompts, asking, folder, own["opponents"], confirm)
    made.failed.update(missing)
    for position in missing:
        made.answers.pop(position)


def _write(
    session: Session,
    recipe: dict[str, Any],
    folder: Path,
    own: Mapping[str, Any],
    label: str,
    prompts: int,
    made: Made,
) -> dict[str, Any]:
    scored: dict[int, tuple[str, list[pairing.Answer]]] = {}
    for position, texts in made.answers.items():
        lengths = [len(ids) for ids in session.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        ties = made.ties.get(position) or [0.0] * len(texts)
        entries = zip(texts, made.scores[position], lengths, ties, strict=True)
        own_answers = [pairing.Answer(*entry) for entry in entries if entry[1] is not None]
        scored[position] = session.rows[position]["image_hash"], own_answers
    rules = pairing.Rules(own["margin"], own["length_ratio"], own["pairs_per_image"])
    pairs, reasons = pairing.pair_up(scored, rules)
    made.left_out.update(reasons)
    numbers: Counter = Counter()
    origin = {"model": label, "scoring": own["scoring"]}

    def entries():
        for position, pair in pairs:
            yield writing.pair_row(session.rows[position], pair, numbers[position], origin)
            numbers[position] += 1

    name = own["name"] or folder.name
    if pairs:
        writing.write_pairs(folder, entries())
        registry = Path(recipe.get("dataset_dir", "data")) / DATASET_INFO
        used = [*names(recipe["dataset"]), *names(recipe.get("eval_dataset"))]
        entry = writing.register(folder, name, registry, used)
    else:
        for file in (writing.PARQUET, DATASET_INFO):
            (folder / file).unlink(missing_ok=True)  # of an earlier run with other keys
        entry = None
    _write_lists(session, folder, scored, made)
    summary = {
        "name": name,
        "entry": entry,
        "model": label,
        "dataset": recipe["dataset"],
        "prompts": prompts,
        "answers": own["answers"],
        "scoring": own["scoring"],
        **_counts(session, scored, pairs),
        "left_out": dict(Counter(_kind(reason) for reason in made.left_out.values()).most_common()),
        "not_answered": len(made.failed),
        "answers_left_out": {reason: count for reason, count in made.answers_left_out.most_common() if count},
        "margin": own["margin"],
        "length_ratio": own["length_ratio"],
    }
    write_json(folder / SUMMARY, summary)
    if not pairs:
        why = "; ".join(f"{count} prompts: {reason}" for reason, count in summary["left_out"].items())
        failed = f"; {len(made.failed)} prompts: {next(iter(made.failed.values()))}" if made.failed else ""
        raise UserError(f"No pair could be made of {prompts} prompts ({why}{failed}). {folder / LEFT_OUT} lists them.")
    return {**summary, "folder": str(folder), "failed": Counter(made.failed.values()).most_common(3)}


def _write_lists(session: Session, folder: Path, scored: Mapping[int, tuple[str, list]], made: Made) -> None:
    ids = generation.scoring.unique_ids(session.rows)

    def named(position: int) -> dict[str, Any]:
        row = session.rows[position]
        return {"dataset": row["dataset"], "pair_id": ids[position], "question": row["question"]}

    lists = {**made.left_out, **{position: f"not answered: {why}" for position, why in made.failed.items()}}
    write_jsonl(folder / LEFT_OUT, [{**named(p), "reason": lists[p]} for p in sorted(lists)])
    write_jsonl(
        folder / ANSWERS,
        [
            {**named(p), "answers": [{"text": a.text, "score": a.score, "tokens": a.tokens} for a in scored[p][1]]}
            for p in sorted(scored)
        ],
    )


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _counts(session: Session, scored, pairs) -> dict[str, Any]:
    """Numbers of the pairs; means are over all scored answers and all pairs, scores as the scoring gives them."""
    images = [session.rows[position]["image_hash"] or f"prompt {position}" for position, _ in pairs]
    every = [answer for _, answers in scored.values() for answer in answers]
    return {
        "pairs": len(pairs),
        "images": len(set(images)),
        "pairs_per_image": len(pairs) / len(set(images)) if pairs else None,
        "images_by_pairs": pairing.pairs_per_image(images),
        "scored_answers": len(every),
        "mean_score": fmean(answer.score for answer in every) if every else None,
        "mean_margin": fmean(pair.margin for _, pair in pairs) if pairs else None,
        "mean_tokens": {
            side: fmean(getattr(pair, side).tokens for _, pair in pairs) if pairs else None
            for side in ("chosen", "rejected")
        },
    }


def print_summary(summary: Mapping[str, Any]) -> None:
    """Prints what `make` returned as a table, with the line that registers the pairs."""
    folder = Path(summary["folder"])
    lengths = summary["mean_tokens"]
    rows = [
        ("pairs", f"{summary['pairs']} on {summary['images']} images, {summary['pairs_per_image']:.2f} per image"),
        (
            "scored answers",
            f"{summary['scored_answers']}, mean score {summary['mean_score']:.4f} ({summary['scoring']})",
        ),
        ("mean margin", f"{summary['mean_margin']:.4f}"),
        ("mean tokens", f"{lengths['chosen']:.1f} chosen, {lengths['rejected']:.1f} rejected"),
    ]
    print(f"\n{summary['model']}: {summary['answers']} answers to each of {summary['prompts']} prompts")
    rows += [("prompts left out", f"{count}: {reason}") for reason, count in summary["left_out"].items()]
    rows += [("answers left out", f"{count}: {reason}") for reason, count in summary["answers_left_out"].items()]
    for label, value in rows:
        print(f"  {label:<20}{value}")
    print(
        f"  {folder / DATASET_INFO} registers the pairs, so train with: dataset_dir={folder} dataset={summary['name']}"
    )
