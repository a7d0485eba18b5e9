"""The names of objects in a text: which an answer names, by words that stand for each.

`phrases` is {phrase in lower case: the object that it stands for}, regular plurals among them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..errors import UserError

# A mention behind one of these says that the object is not there.
NEGATIONS = ("no", "not", "without", "nor", "neither")
BETWEEN = ("a", "an", "any", "the", "single", "visible", "other")
_WORD = re.compile(r"[\w'-]+")


def named(text: str, phrases: Mapping[str, str]) -> list[str]:
    """The objects that a text names, each once, in the order of their first mention; "no dog" names none."""
    words = _WORD.findall(text.lower())
    longest = max((phrase.count(" ") + 1 for phrase in phrases), default=0)
    found: dict[str, None] = {}
    at = 0
    while at < len(words):
        for length in range(min(longest, len(words) - at), 0, -1):  # the longest phrase: a hot dog is no dog
            one = phrases.get(" ".join(words[at : at + length]))
            if one is not None:
                if not _denied(words[:at]):
                    found[one] = None
                at += length
                break
        else:
            at += 1
    return list(found)


def phrases_of(names: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The phrases of {object: its other names}; the first object that has a phrase keeps it."""
    phrases: dict[str, str] = {}
    for name, others in names.items():
        for word in (name, *others):
            for phrase in (spelled(word), plural(spelled(word))):
                phrases.setdefault(phrase, spelled(name))
    return phrases


def read_names(file: Path) -> dict[str, list[str]]:
    """{object: its other names} of a JSON file. Raises UserError for one that is not there or of another form."""
    if not file.is_file():
        raise UserError(f"vocabulary: there is no file {file}.")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); vocabulary= takes {{object: [other names]}}.") from error
    lists = isinstance(given, dict) and all(
        isinstance(others, list) and all(isinstance(other, str) for other in others) for others in given.values()
    )
    if not lists:
        raise UserError(f"{file}: no vocabulary; it is written {{object: [other names]}}.")
    return {spelled(name): others for name, others in given.items()}


def spelled(name: str) -> str:
    """A name in lower case, with one blank between its words."""
    return " ".join(name.lower().split())


def plural(phrase: str) -> str:
    """The regular English plural of a phrase."""
    if re.search(r"(s|x|z|ch|sh)$", phrase):
        return phrase + "es"
    return phrase[:-1] + "ies" if re.search(r"[^aeiou]y$", phrase) else phrase + "s"


def _denied(before: Sequence[str]) -> bool:
    before = list(before)
    while before and before[-1] in BETWEEN:
        before.pop()
    return bool(before) and before[-1] in NEGATIONS
