"""Answers scored by the objects they name, where it is known what an image shows (CHAIR, arXiv 1809.02156).

score = -(objects named that are not there) / (objects named), each object counted once: minus CHAIR_i of one answer, in
[-1, 0]. An answer that names no object at all has no score. Exact in the demo world; for photographs the annotations of
COCO's instances_*.json, and a list of words for its 80 categories.

Annotations (`read_annotations`) are one of

    COCO's      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id"}], "categories": [...]}
    JSON        {"<file name or content hash of the image>": ["object", ...]}
    JSON lines  {"image_hash": "<content hash>", "objects": ["object", ...]}, or "image": "<file name>" in its place
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluation.object_names import named, phrases_of, read_names
from ..files import read_jsonl

# The 80 categories and words that stand for each, plurals that are not regular among them: after the list of CHAIR,
# written anew and shorter.
COCO_VOCABULARY = Path(__file__).with_name("coco_vocabulary.json")
REMEDY = "python scripts/make_pairs.py -h says what annotations= may hold."
COCO_NUMBER = re.compile(r"(\d{12})\.\w+$")  # COCO_train2014_000000000009.jpg and 000000000009.jpg are one image


@dataclass(frozen=True)
class Annotations:
    """What images show: {name of an image: its objects}, and {phrase in lower case: the object it stands for}."""

    by_image: Mapping[str, frozenset[str]]
    phrases: Mapping[str, str]

    def of(self, image_hash: str, path: str | None) -> frozenset[str] | None:
        """The objects of an image with this content hash and file name, None if it is not annotated."""
        for name in _names(image_hash, path):
            if name in self.by_image:
                return self.by_image[name]
        return None


def read_annotations(file: Path, vocabulary: Path | None = None) -> Annotations:
    """The annotations of a file (see above).

    vocabulary: a JSON file {object: [other names]}; default: COCO's for COCO's annotations, none for others. The names
    that the annotations hold are known as well.

    Raises UserError naming file and line or key for what is none of these.
    """
    if not file.is_file():
        raise UserError(f"annotations: there is no file {file}.")
    is_coco = False
    if file.suffix == ".jsonl":
        entries = [_entry(where, line) for where, line in read_jsonl(file, REMEDY)]
    else:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}). {REMEDY}") from None
        if not isinstance(content, dict):
            raise UserError(f"{file}: holds {type(content).__name__}, not an object. {REMEDY}")
        is_coco = {"images", "annotations", "categories"} <= content.keys()
        entries = (
            _from_coco(file, content)
            if is_coco
            else [(name, _objects(f"{file}: {name}", value)) for name, value in content.items()]
        )
    phrases = phrases_of(read_names(vocabulary or COCO_VOCABULARY)) if vocabulary or is_coco else {}
    by_image: dict[str, frozenset[str]] = {}
    owners: dict[str, set[str]] = {}
    for name, objects in entries:
        known = frozenset(phrases.get(one, one) for one in objects)
        for spelling in _names(name, name):
            by_image[spelling] = by_image.get(spelling, frozenset()) | known
            owners.setdefault(spelling, set()).add(name)
    for spelling, of in owners.items():
        if len(of) > 1:  # files of one name in two folders
            del by_image[spelling]
    if not by_image:
        raise UserError(f"{file}: annotates no image. {REMEDY}")
    shown = sorted(frozenset().union(*by_image.values()))
    phrases = {**phrases_of(dict.fromkeys(shown, ())), **phrases}
    return Annotations(by_image, phrases)


def score(answer: str, there: Iterable[str], phrases: Mapping[str, str]) -> tuple[float | None, float]:
    """(the score, or None where no object is named; the share of `there` that is named) of an answer."""
    named, there = mentioned(answer, phrases), frozenset(there)
    if not named:
        return None, 0.0
    return -len(named - there) / len(named), len(named & there) / max(len(there), 1)


def mentioned(answer: str, phrases: Mapping[str, str]) -> frozenset[str]:
    """The objects that an answer names, but for those whose absence it states ("no dog", "not a dog")."""
    return frozenset(named(answer, phrases))


def _names(image_hash: str, path: str | None) -> list[str]:
    """The names under which an image may be annotated."""
    base = Path(path).name if path else ""
    number = COCO_NUMBER.search(base)
    return [name for name in (image_hash, path, base, number and number[1]) if name]


def _objects(where: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"{where}: the objects must be a list of names. {REMEDY}")
    return [one.strip().lower() for one in value]


def _entry(where: str, line: Any) -> tuple[str, list[str]]:
    name = (line.get("image_hash") or line.get("image")) if isinstance(line, dict) else None
    if not isinstance(name, str) or "objects" not in line:
        raise UserError(f"{where}: a line needs `image_hash` or `image`, and `objects`. {REMEDY}")
    return name, _objects(where, line["objects"])


def _from_coco(file: Path, content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    try:
        categories = {one["id"]: one["name"].lower() for one in content["categories"]}
        shown: dict[int, set[str]] = {one["id"]: set() for one in content["images"]}
        for one in content["annotations"]:
            shown[one["image_id"]].add(categories[one["category_id"]])
        return [(one["file_name"], sorted(shown[one["id"]])) for one in content["images"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not COCO's instances ({type(error).__name__}: {error}). {REMEDY}") from None
