"""The self-reward of answers: the mean log-prob per token that the aligned model gives more than its reference.

    reward(y) = [log p(y | m, x) - log p_ref(y | m, x)] / |y|

in nats per token, m the image, x the prompt, |y| the answer's tokens with its end token. It is DPO's own reward, length
normalised, by which RLAIF-V ranks a model's answers (arXiv 2405.17220, its self-feedback). All
answers to a prompt are scored on one shared prefix, once by the aligned model and once by the reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..data import images
from ..data.conversation import full_prompt_ids
from ..data.image_store import load_image
from ..errors import UserError
from ..evaluation.resume import fingerprint
from ..evaluation.saved import Saved
from ..evaluation.session import Session
from ..step.packing import TokenPair, pack

BASE = "base"  # the reference that is the base model, the adapter switched off
REFERENCE = "reference"  # PEFT's name of a second adapter


def use_reference(session: Session, reference: str) -> None:
    """Prepares a session that kept its adapter for a reference: `base`, or an adapter folder on the same base.

    Raises UserError if the session has no adapter (aligned and base model would be one), or the folder holds none.
    """
    if not isinstance(session.model, PeftModel):
        raise UserError(
            "scoring=self compares an aligned model with its base: name the adapter with adapter_name_or_path=, or "
            "score with scoring=judge or scoring=objects."
        )
    if reference == BASE:
        return
    if not (Path(reference) / "adapter_config.json").is_file():
        raise UserError(f"reference={reference}: there is no adapter_config.json; name an adapter folder, or `base`.")
    session.model.load_adapter(reference, REFERENCE)
    session.model.requires_grad_(False)
    session.model.eval()


def rewards(
    session: Session,
    answers: Mapping[int, Sequence[str]],
    folder: Path,
    reference: str = BASE,
    restart: bool = False,
) -> dict[int, dict[str, Any]]:
    """{position: {"scores": [reward, …], "tokens": [int, …]}} of {position: answers to this prompt}.

    Saved in `folder` as they come. A prompt whose image can't be read has "bad_image" in place of both. The session is
    one of `use_reference`.
    """
    parts = [fingerprint(session), reference_stamp(reference), session.recipe.get("cutoff_len")]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    saved = Saved(folder / ".self_rewards.jsonl", name, restart)
    texts = {position: digest(own) for position, own in answers.items()}
    done = {r["position"]: r for r in saved.records if texts.get(r["position"]) == r["answers"]}
    waiting = [position for position in answers if position not in done]
    if waiting:
        with saved.appending(len(answers), len(answers) - len(waiting), "prompt", "self-reward") as add:
            for start in range(0, len(waiting), session.batch_size):
                batch = waiting[start : start + session.batch_size]
                found = list(_scored(session, {position: answers[position] for position in batch}, reference))
                records = [{"position": p, "answers": texts[p], **what} for p, what in found]
                add(records)
                done.update((record["position"], record) for record in records)
    return {position: done[position] for position in answers}


def reference_stamp(reference: str) -> Any:
    """A name of the reference's weights."""
    files = [] if reference == BASE else sorted(Path(reference).glob("*.safetensors"))
    return [reference, [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def digest(texts: Sequence[str]) -> str:
    """A name of these texts in this order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def _scored(
    session: Session, answers: Mapping[int, Sequence[str]], reference: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, what is saved of it) of a batch of prompts."""
    groups, pictures, positions = [], [], []
    for position, own in answers.items():
        row = session.rows[position]
        try:
            picture = load_image(row["image"]) if row["image"] is not None else None
        except (images.ImageError, OSError) as error:
            yield position, {"bad_image": str(error)}
            continue
        groups.append(token_pairs(session, row, own))
        positions.append(position)
        pictures += [picture] if picture is not None else []
    if not groups:
        return
    inputs = dict(session.processor.image_processor(pictures, return_tensors="pt")) if pictures else {}
    batch = {"packed": pack(groups, image_token_id=session.image_token_id), "image_inputs": inputs}
    counts = [len(answers[position]) for position in positions]
    aligned, tokens = _answer_logps(session, batch, groups, counts)
    with _as_reference(session, reference):
        base, _ = _answer_logps(session, batch, groups, counts)
    for position, good, bad, lengths in zip(positions, aligned, base, tokens, strict=True):
        means = [(a - b) / n for a, b, n in zip(good, bad, lengths, strict=True)]
        yield position, {"scores": means, "tokens": lengths}


def token_pairs(session: Session, row: dict[str, Any], answers: Sequence[str]) -> list[TokenPair]:
    """The answers to one prompt two by two, as training would tokenize and cut them, for one group of `pack`.

    The last of an odd number stands in both places of its pair.
    """
    both = [(answers[i], answers[min(i + 1, len(answers) - 1)]) for i in range(0, len(answers), 2)]
    count, has_image = len(both), row["image"] is not None
    encoded = session.template.conversation.encode_pairs(
        session.tokenizer, [row["question"]] * count, *map(list, zip(*both, strict=True)), [has_image] * count
    )
    pairs = []
    for prompt_ids, *sides in encoded:
        prompt = full_prompt_ids({**row, "prompt_ids": prompt_ids}, session.image_token_id)
        room = max(int(session.recipe.get("cutoff_len", 2048)) - len(prompt), 1)
        pairs.append(TokenPair(prompt, *(side[:room] for side in sides)))
    return pairs


def _answer_logps(
    session: Session, batch: dict[str, Any], groups: Sequence[Sequence[TokenPair]], counts: Sequence[int]
) -> tuple[list[list[float]], list[list[int]]]:
    """(summed log-probs in nats, token counts) of the answers to each prompt, in their order."""
    found = session.forward(batch)
    sums, lengths = found.sums.double().cpu().tolist(), found.lengths.cpu().tolist()
    pairs, first, by_prompt = sum(map(len, groups)), 0, []
    for group, count in zip(groups, counts, strict=True):
        order = [place for pair in range(first, first + len(group)) for place in (pair, pairs + pair)][:count]
        by_prompt.append(([sums[place] for place in order], [lengths[place] for place in order]))
        first += len(group)
    return [sums for sums, _ in by_prompt], [lengths for _, lengths in by_prompt]


def _as_reference(session: Session, reference: str) -> AbstractContextManager:
    """The session's model as the reference, in this block."""
    return session.model.disable_adapter() if reference == BASE else _adapter(session.model, REFERENCE)


@contextmanager
def _adapter(model: PeftModel, name: str) -> Iterator[None]:
    before = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


def best(answers: Sequence[str], scores: Sequence[float]) -> str:
    """The answer of the highest score; the first of several."""
    return answers[max(range(len(scores)), key=lambda i: (scores[i], -i))]
