"""Best of N: the sampled answer that the model's self-reward puts first (RLAIF-V's inference, arXiv 2405.17220)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluation.generation import Settings
from ..evaluation.session import Session
from . import pairing, sampling, self_reward


def check(own: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UsageError for keys of `evals/generate.py` with which best_of= cannot work.

    models: {name: recipe that loads it}.
    """
    found = []
    if own["best_of"] < 2:
        found.append(f"best_of={own['best_of']}: must be at least 2.")
    if own["temperature"] <= 0:
        found.append("best_of= samples its answers: set temperature=0.7, or another above 0.")
    if own["base_url"]:
        found.append("best_of= scores with the model loaded here, so base_url= does not go with it.")
    found += [
        f"best_of= needs an adapter to compare with its base, and {name} has none."
        for name, recipe in models.items()
        if not recipe.get("adapter_name_or_path")
    ]
    if found:
        raise UsageError(*found)


def answers(
    session: Session,
    positions: Sequence[int],
    folder: Path,
    name: str,
    settings: Settings,
    count: int,
    restart: bool = False,
) -> dict[int, dict[str, Any]]:
    """As `generation.answers`: of `count` sampled answers the one with the highest self-reward.

    The session must have kept its adapter (`open_session` with keep_adapter=True). An answer that max_new_tokens cut
    off is scored like the others; an empty one is taken only where there is no other.
    """
    own = folder / f".best_of_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    own.mkdir(exist_ok=True)
    self_reward.use_reference(session, self_reward.BASE)
    records = sampling.sample(session, positions, own, settings, count, restart)
    texts = {
        position: pairing.distinct([text for text in record.get("answers", ()) if text]) or [""]
        for position, record in records.items()
        if "bad_image" not in record
    }
    several = {position: found for position, found in texts.items() if len(found) > 1}
    rewards = self_reward.rewards(session, several, own, restart=restart)
    found = {}
    for position, record in records.items():
        named = {key: record[key] for key in ("position", "dataset", "pair_id")}
        if bad := record.get("bad_image") or rewards.get(position, {}).get("bad_image"):
            found[position] = {**named, "bad_image": bad}
        elif position in several:
            found[position] = {**named, "answer": self_reward.best(texts[position], rewards[position]["scores"])}
        else:
            found[position] = {**named, "answer": texts[position][0]}
    return found
