"""The keys of `scripts/make_pairs.py` and what contradicts itself among them. Imports no torch and no LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import keys
from ..errors import UsageError
from ..recipe import own_schema

ADAPTER = "adapter_config.json"
SCORINGS = ("self", "judge", "objects")
OWN_KEYS = {
    "out": Path,
    "name": str,
    "answers": 8,
    "max_prompts": int,
    "max_new_tokens": 512,
    "temperature": 0.7,
    "top_p": 1.0,
    "scoring": "self",
    "reference": "base",
    "annotations": Path,
    "vocabulary": Path,
    "judge_url": str,
    "judge_model": str,
    "judge_key_env": "OPENAI_API_KEY",
    "judge_request": {},
    "opponents": 2,
    "criteria": Path,
    "price_in": float,
    "price_out": float,
    "yes": False,
    "margin": 0.0,
    "length_ratio": 2.0,
    "pairs_per_image": 8,
    "base_url": str,
    "model": str,
    "api_key_env": "OPENAI_API_KEY",
    "concurrency": 16,
    "timeout": 600.0,
    "retries": 6,
    "request": {},
    "restart": False,
    "allow_failed": False,
}
SERVER_KEYS = ("api_key_env", "concurrency", "timeout", "retries", "request")
# Keys that only one way of scoring reads.
READ_BY = {
    "reference": "self",
    "annotations": "objects",
    "vocabulary": "objects",
    "judge_url": "judge",
    "judge_model": "judge",
    "judge_key_env": "judge",
    "judge_request": "judge",
    "opponents": "judge",
    "criteria": "judge",
}
LEAST = {"answers": 2, "max_new_tokens": 1, "opponents": 1, "length_ratio": 1.0, "pairs_per_image": 1, "margin": 0.0}


def check(own: Mapping[str, Any], given: frozenset[str], adapter: str | None) -> None:
    """Raises UsageError with a sentence for each value out of range and for keys that contradict each other.

    adapter: the recipe's `adapter_name_or_path`.
    """
    found = [f"{key}={own[key]}: must be at least {least}." for key, least in LEAST.items() if own[key] < least]
    if own["max_prompts"] is not None and own["max_prompts"] < 1:
        found.append(f"max_prompts={own['max_prompts']}: must be at least 1.")
    if own["temperature"] <= 0:
        found.append(f"temperature={own['temperature']}: greedy answers are all equal; set temperature=0.7.")
    if not 0 < own["top_p"] <= 1:
        found.append(f"top_p={own['top_p']}: must be above 0 and at most 1.")
    scoring = own["scoring"]
    if scoring not in SCORINGS:
        found.append(f"scoring={scoring}: must be one of {', '.join(SCORINGS)}.")
    found += [
        f"{key}= is about scoring={reader}, and scoring is {scoring}."
        for key, reader in READ_BY.items()
        if key in given and reader != scoring
    ]
    if scoring == "self" and not adapter:
        found.append(
            "scoring=self compares an aligned model with its base: name the adapter with adapter_name_or_path=, or "
            "score with scoring=judge or scoring=objects."
        )
    if scoring == "self" and own["reference"] != "base" and not (Path(own["reference"]) / ADAPTER).is_file():
        found.append(f"reference={own['reference']}: there is no {ADAPTER}; name an adapter folder, or `base`.")
    if scoring == "judge":
        found += [f"scoring=judge needs {key}=." for key in ("judge_url", "judge_model") if not own[key]]
    if scoring == "objects":
        if not own["annotations"]:
            found.append("scoring=objects needs annotations=: a file that says what the images show (-h lists kinds).")
        for key in ("annotations", "vocabulary"):
            if own[key] and not Path(own[key]).is_file():
                found.append(f"{key}: there is no file {own[key]}.")
    if own["criteria"] and not Path(own["criteria"]).is_file():
        found.append(f"criteria: there is no file {own['criteria']}.")
    found += [
        f"{key}= is about a server, and base_url= is missing."
        for key in ("model", *SERVER_KEYS)
        if key in given
        and not own["base_url"]
        and not (scoring == "judge" and key in ("timeout", "retries", "concurrency"))
    ]
    if found:
        raise UsageError(*found)


def check_mapping(recipe: Mapping[str, Any]) -> None:
    """Raises UsageError for a recipe whose `make_pairs` scripts/make_pairs.py would refuse, or without eval_dataset."""
    given = recipe.get("make_pairs") or {}
    if not isinstance(given, dict):
        raise UsageError("make_pairs must map keys of scripts/make_pairs.py to values, e.g. {answers: 8}.")
    found = [f"make_pairs: {keys.unknown(key, OWN_KEYS)}" for key in given if key not in OWN_KEYS]
    found += [
        f"make_pairs: {key} is set by scripts/rounds.py itself." for key in ("out", "name", "reference") if key in given
    ]
    if given.get("base_url"):
        found.append("make_pairs: base_url would go on serving one model while the rounds train it; leave it out.")
    for key in given.keys() & OWN_KEYS.keys():
        schema = own_schema(OWN_KEYS[key])
        if sentence := keys.problem(key, keys.as_meant(given[key], schema), schema):
            found.append(sentence)
    found += [f"{key} is missing." for key in ("dataset", "eval_dataset") if not recipe.get(key)]
    if found:
        raise UsageError(*found)
    defaults = {key: None if isinstance(value, type) else value for key, value in OWN_KEYS.items()}
    check({**defaults, **given}, frozenset(given), recipe.get("adapter_name_or_path"))
