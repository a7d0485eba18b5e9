"""The keys of a recipe: what each takes according to recipes/schema.json, and how a wrong value is reported.

`schema.make` generates the file from LLaMA-Factory's and the plugin's dataclasses, so nothing heavy is imported here.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

# Beside this module in an installed wheel, beside the recipes in a checkout.
PLACES = (Path(__file__).with_name("schema.json"), Path(__file__).parents[2] / "recipes" / "schema.json")
TYPE_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
RANGE_WORDS = {
    "minimum": "{} or more",
    "exclusiveMinimum": "more than {}",
    "maximum": "{} at most",
    "exclusiveMaximum": "less than {}",
}
# What YAML 1.1 reads as a truth value although it may be meant as a word.
TRUTH_WORDS = {True: ("yes", "on", "true", "y"), False: ("no", "off", "false", "n")}
# How keys that hold a secret end: hf_hub_token, swanlab_api_key, … (but not max_new_tokens).
SECRET_ENDINGS = ("token", "api_key", "secret", "password", "webhook_url")
SHOWN_CHOICES = 16  # a longer list of choices hides the one that was meant


@cache
def known() -> dict[str, dict[str, Any]]:
    """{key: its JSON Schema} of every key a recipe may hold; `$comment` names the class the key belongs to.

    Raises FileNotFoundError if the package was installed without its schema.
    """
    return json.loads(place().read_text(encoding="utf-8"))["properties"]


def of_plugin() -> set[str]:
    """The keys that are the plugin's."""
    return {key for key, schema in known().items() if schema["$comment"] == "PluginArguments"}


def place() -> Path:
    """Where the schema of this installation is, or should be."""
    return next((path for path in PLACES if path.is_file()), PLACES[-1])


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word of `words` that `word` most likely misspells, or None."""
    near = difflib.get_close_matches(str(word), sorted(words), n=1, cutoff=0.6)
    return near[0] if near else None


def unknown(key: str, words: Iterable[str]) -> str:
    """The sentence that refuses `key`, naming the nearest of the valid keys `words`."""
    near = nearest(key.lstrip("-"), words)
    return f"Unknown key `{key}`" + (f" (did you mean `{near}`?)." if near else ".")


def as_meant(value: Any, schema: dict[str, Any]) -> Any:
    """`value` in the type its key takes, where the YAML type differs and only one meaning is possible.

    `eval_strategy: no` arrives as False and means the word; "2", "5e-6" or "no" in quotes mean the number or truth
    value where the key takes nothing else; a number means its text where the key takes text alone. Any other value is
    returned as it is, to be refused or accepted.
    """
    if isinstance(value, bool):
        return next((word for word in TRUTH_WORDS[value] if word in schema.get("enum", ())), value)
    types = _types(schema) - {"null"}
    if isinstance(value, str) and value.isdecimal() and "anyOf" in schema:
        return int(value)
    if isinstance(value, str) and "string" not in types and "enum" not in schema:
        return _unquoted(value, types)
    if isinstance(value, float) and types == {"integer"} and value.is_integer():
        return int(value)
    if isinstance(value, int | float) and types == {"string"} and "enum" not in schema:
        return str(value)
    return value


def problem(key: str, value: Any, schema: dict[str, Any]) -> str | None:
    """One sentence that says why `value` is not allowed for `key` and what is, or None if it is allowed."""
    import jsonschema  # takes 0.15 s, so only where values are checked

    if jsonschema.Draft202012Validator(schema).is_valid(value):
        return None
    return refusal(key, value, schema)


def refusal(key: str, value: Any, schema: dict[str, Any]) -> str:
    """The sentence that refuses `value` for `key`."""
    if is_secret(key):
        return f"{key}: its value (not shown) is not allowed; it must be {allowed(schema)}."
    choices = [choice for part in (schema, *schema.get("anyOf", ())) for choice in part.get("enum", ())]
    near = nearest(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else None
    hint = f"; did you mean `{key}: {near}`?" if near else ""
    if len(choices) > SHOWN_CHOICES:
        return f"{key}: {shown(value)} is not allowed" + (hint or "; the schema of the recipes lists what is.")
    return f"{key}: {shown(value)} is not allowed{hint or ';'} {'It' if near else 'it'} must be {allowed(schema)}."


def allowed(schema: dict[str, Any]) -> str:
    """What a key takes, in words: `true or false`, `a whole number, 1 or more, or null`, `header or full`."""
    if "anyOf" in schema:
        return ", or ".join(allowed(part) for part in schema["anyOf"])
    null = "null" in _types(schema)
    choices = [shown(choice).strip("'") for choice in schema.get("enum", ()) if choice is not None]
    kinds = choices or [words for kind, words in TYPE_WORDS.items() if kind in _types(schema) - {"null"}]
    ranges = [words.format(schema[name]) for name, words in RANGE_WORDS.items() if name in schema]
    text = _listed(kinds) + "".join(f", {words}" for words in ranges)
    return text + (", or null" if null else "")


def shown(value: Any) -> str:
    """`value` as a recipe would hold it, cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def simplified(schema: dict[str, Any]) -> dict[str, Any]:
    """A key's JSON Schema as pydantic makes it, without its title, its default and an `anyOf` of plain types.

    An `anyOf` of words and numbers stays.
    """
    parts = [simplified(part) for part in schema.get("anyOf", ())]
    if any("enum" in part for part in parts) and any("minimum" in part for part in parts):
        return {"anyOf": parts}
    if not parts:
        plain = {name: value for name, value in schema.items() if name not in ("title", "default", "const")}
        return {**plain, "enum": [schema["const"]]} if "const" in schema else plain
    merged: dict[str, Any] = {}
    for part in parts:
        merged.update({name: value for name, value in part.items() if name != "type"})
    types = list(dict.fromkeys(kind for part in parts for kind in as_list(part.get("type", []))))
    if "null" in types and "enum" in merged:
        merged["enum"] = [*merged["enum"], None]
    return {"type": types[0] if len(types) == 1 else types, **merged}


def is_secret(key: str) -> bool:
    """Whether a key of a recipe holds a secret, whose value is never shown or written."""
    return key.lower().endswith(SECRET_ENDINGS)


def as_list(kinds: str | list[str]) -> list[str]:
    return [kinds] if isinstance(kinds, str) else kinds


def _types(schema: dict[str, Any]) -> set[str]:
    return set(as_list(schema.get("type", []))).union(*map(_types, schema.get("anyOf", ())))


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _unquoted(text: str, types: set[str]) -> Any:
    if types == {"boolean"}:
        return next((truth for truth, words in TRUTH_WORDS.items() if text.lower() in words), text)
    if types in ({"integer"}, {"number"}):
        try:
            number = float(text)
        except ValueError:
            return text
        if not math.isfinite(number):
            return text
        return int(number) if types == {"integer"} and number.is_integer() else number
    return text


def names_a_plugin(args) -> bool:
    """True when `args` (a mapping, or a command line as a list of strings) carries a `plugins` key."""
    if isinstance(args, dict):
        return args.get("plugins") is not None
    return any(arg == "--plugins" or arg.startswith("--plugins=") for arg in args)
