"""Objects that answers name against the objects that their images hold: hallucination and coverage, without a judge.

What an image holds is known from annotations (exact in the demo world). The measures are CHAIR's (Rohrbach et al.
2018, arXiv 1809.02156, section 3) and AMBER's coverage (arXiv 2311.07397, section 3.3). As in AMBER, and unlike in
CHAIR's own code, an object counts once per answer however often it is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from ..files import read_jsonl
from ..preference.metrics import cluster_bootstrap, wilson_interval
from .object_names import named, phrases_of, read_names, spelled

if TYPE_CHECKING:
    from .generation import Settings
    from .session import Session

FORM = 'a line is {"image_hash": "…", "objects": ["red circle", …]}'


class Vocabulary:
    """The names of objects that are looked for in a text.

    names: {object: its other names}; an object's own name, and the regular plural of each, are known as well.
    """

    def __init__(self, names: Mapping[str, Iterable[str]]):
        self.object_of = phrases_of(names)

    def named(self, text: str) -> list[str]:
        """The objects a text names, each once, in the order of their first mention. "no dog" names none."""
        return named(text, self.object_of)


def read_annotations(path: Path) -> dict[str, list[str]]:
    """{image hash: objects} of a JSON lines file.

    image_hash: `data.images.content_hash` of an image's bytes, which preference_pairs.jsonl and the names of the
    images beside generations.jsonl hold as well. Raises UserError for a file without lines, and naming the line that
    has another form, or that contradicts an earlier one.
    """
    held: dict[str, list[str]] = {}
    for where, record in read_jsonl(path, f"In annotations {FORM}."):
        objects = record.get("objects") if isinstance(record, dict) else None
        named = isinstance(objects, list) and all(isinstance(name, str) and name.strip() for name in objects)
        if not named or not isinstance(record.get("image_hash"), str):
            raise UserError(f"{where}: no annotation; {FORM}.")
        found = list(dict.fromkeys(spelled(name) for name in objects))
        if set(held.setdefault(record["image_hash"], found)) != set(found):
            raise UserError(f"{where}: image {record['image_hash']} has other objects on an earlier line; keep one.")
    if not held:
        raise UserError(f"{path} holds no annotations; {FORM}.")
    return held


def read_vocabulary(path: Path | None, annotations: Mapping[str, Sequence[str]]) -> Vocabulary:
    """The names that the annotations hold, and those of a JSON file {object: [other names]}.

    Raises UserError for a file of another form, or when there is no name at all.
    """
    names: dict[str, list[str]] = {name: [] for objects in annotations.values() for name in objects}
    if path is not None:
        names |= read_names(path)
    if not names:
        raise UserError("The annotations name no object, and no vocabulary= is given: there is nothing to look for.")
    return Vocabulary(names)


@dataclass(frozen=True)
class AnswerObjects:
    """What one answer names of its image. true, hallucinated, missed: names of objects, each once."""

    dataset: str
    pair_id: str
    source: str
    image_hash: str
    answer: str
    true: list[str]
    hallucinated: list[str]
    missed: list[str]

    @classmethod
    def of(cls, vocabulary: Vocabulary, held: Sequence[str], answer: str, **identity: str) -> AnswerObjects:
        """held: the objects of the answer's image."""
        named = vocabulary.named(answer)
        true, hallucinated = ([name for name in named if (name in held) is there] for there in (True, False))
        return cls(
            **identity,
            answer=answer,
            true=true,
            hallucinated=hallucinated,
            missed=[name for name in held if name not in named],
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(answers: Sequence[AnswerObjects], min_subset: int = 20, seed: int = 0, n_boot: int = 2000) -> dict:
    """Hallucination and coverage of a set of answers.

    Returns:
        `n` answers on `n_images` images; `chair_s`, share of answers with a hallucinated object (95 % Wilson interval
        in `_low` and `_high`); `hallucinated_per_answer`; `chair_i`, share of the named objects that are not there
        (0 where nothing is named); `coverage`, share of the images' objects that are named (None where they hold
        none); `named_per_answer`; `names_nothing`, a count. The intervals of the three ratios are 95 % percentile
        bootstraps over images, None for a single image. `subsets`: the same per source of at least min_subset
        answers, if there are several; `small_subsets`: {source: n} of the others.
    Raises:
        UserError: there are no answers.
    """
    if not answers:
        raise UserError("No answer is about an image with annotations; there is nothing to measure.")
    metrics = _metrics(answers, seed, n_boot)
    sources = {source: [a for a in answers if a.source == source] for source in sorted({a.source for a in answers})}
    large = {source: group for source, group in sources.items() if len(group) >= min_subset and len(sources) > 1}
    metrics["subsets"] = {source: _metrics(group, seed, n_boot) for source, group in large.items()}
    metrics["small_subsets"] = {s: len(group) for s, group in sources.items() if s not in large and len(sources) > 1}
    return metrics


def _metrics(answers: Sequence[AnswerObjects], seed: int, n_boot: int) -> dict[str, Any]:
    images: dict[str, int] = {answer.image_hash: 0 for answer in answers}
    images = {digest: number for number, digest in enumerate(sorted(images))}
    counts = np.zeros((4, len(images)))  # per image: answers, named, hallucinated, missed
    for answer in answers:
        true, false, missed = len(answer.true), len(answer.hallucinated), len(answer.missed)
        counts[:, images[answer.image_hash]] += (1, true + false, false, missed)
    number, named, hallucinated, missed = counts
    true = named - hallucinated
    wrong = sum(bool(answer.hallucinated) for answer in answers)
    low, high = wilson_interval(wrong, len(answers))
    metrics = {"n": len(answers), "n_images": len(images)}
    metrics |= {"chair_s": wrong / len(answers), "chair_s_low": low, "chair_s_high": high}
    ratios = {
        "hallucinated_per_answer": (hallucinated, number),
        "chair_i": (hallucinated, named),
        "coverage": (true, true + missed),
    }
    for name, (part, whole) in ratios.items():
        some = whole > 0  # an image without named or held objects adds nothing to either sum
        empty = None if name == "coverage" else 0.0
        metrics[name] = float(part.sum() / whole.sum()) if some.any() else empty
        low, high = cluster_bootstrap(part[some], whole[some], seed, n_boot) if some.any() else (None, None)
        metrics |= {f"{name}_low": low, f"{name}_high": high}
    metrics["named_per_answer"] = float(named.sum() / len(answers))
    metrics["names_nothing"] = sum(not answer.true and not answer.hallucinated for answer in answers)
    return metrics


def read_answers(file: Path, name: str | None) -> tuple[str, list[tuple[dict[str, str], str]]]:
    """(model's name, [(identity for `AnswerObjects.of`, answer)]) out of generations.jsonl.

    name: the model's name there; may be None where the file has one model. Lines about no image are left out. Raises
    UserError naming the models when there is none of this name.
    """
    lines = [line for _, line in read_jsonl(file, "Make the file again with evals/generate.py.")]
    models = list(dict.fromkeys(model for line in lines for model in line["answers"]))
    if name is None and len(models) == 1:
        (name,) = models
    if name not in models:
        raise UserError(f"{file} has answers of {', '.join(models) or 'no model'}: name one with answered_by=.")
    found = []
    for line in lines:
        if line["image"] and name in line["answers"]:
            identity = {key: line[key] for key in ("dataset", "pair_id")}
            identity |= {"source": line["subset"].rpartition("/")[0], "image_hash": Path(line["image"]["path"]).stem}
            found.append((identity, line["answers"][name]))
    return name, found


def ask(
    session: Session, folder: Path, name: str, settings: Settings, max_prompts: int | None, restart: bool
) -> list[tuple[dict[str, str], str | None]]:
    """[(identity for `AnswerObjects.of`, answer)] of the session's model; answers are saved in `folder` as they come.

    The answer is None where the image could not be decoded. Prompts without an image are left out.
    """
    from . import generation

    prompts = [p for p in generation.unique_prompts(session.rows, max_prompts) if session.rows[p]["image"] is not None]
    found = []
    for position, record in generation.answers(session, prompts, folder, name, settings, restart).items():
        row = session.rows[position]
        identity = {key: record[key] for key in ("dataset", "pair_id")}
        found.append(({**identity, **{key: row[key] for key in ("source", "image_hash")}}, record.get("answer")))
    return found


def count(
    answers: Iterable[tuple[dict[str, str], str | None]],
    annotations: Mapping[str, Sequence[str]],
    vocabulary: Vocabulary,
) -> tuple[list[AnswerObjects], list[dict[str, str]]]:
    """(answers with what they name, the others with the reason why they are left out)."""
    counted, left_out = [], []
    for identity, answer in answers:
        held = annotations.get(identity["image_hash"])
        if answer is None or held is None:
            reason = "bad image" if answer is None else f"image {identity['image_hash']} has no annotations"
            left_out.append({**identity, "reason": reason})
        else:
            counted.append(AnswerObjects.of(vocabulary, held, answer, **identity))
    return counted, left_out


def table(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) rows of what `summarize` gives, for a terminal."""

    def percent(metrics: Mapping[str, Any], name: str) -> str:
        value, low, high = (metrics[name + end] for end in ("", "_low", "_high"))
        if value is None:
            return "-"
        return f"{value:.1%}" + ("" if low is None else f"  [{low:.1%}, {high:.1%}]")

    per, low, high = (summary["hallucinated_per_answer" + end] for end in ("", "_low", "_high"))
    rows = [
        ("answers with a hallucination", percent(summary, "chair_s")),
        ("hallucinated per answer", f"{per:.3f}" + ("" if low is None else f"  [{low:.3f}, {high:.3f}]")),
        ("share of named objects", percent(summary, "chair_i")),
        ("coverage of true objects", percent(summary, "coverage")),
        ("named per answer", f"{summary['named_per_answer']:.2f}"),
    ]
    if summary["names_nothing"]:
        rows.append(("answers that name nothing", str(summary["names_nothing"])))
    for source, metrics in summary["subsets"].items():
        rows.append((f"  {source}", f"{percent(metrics, 'chair_s')} hallucinate  (n={metrics['n']})"))
        rows.append(("", f"{percent(metrics, 'coverage')} covered"))
    return rows
