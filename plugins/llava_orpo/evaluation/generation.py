"""Answers of a model to prompts: batches, seeds, records of `generations.jsonl`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import GenerationConfig

from ..data import image_store, images
from ..data.conversation import Conversation, full_prompt_ids
from ..data.image_store import load_image
from ..errors import UserError
from ..files import evenly
from ..preference import scoring
from ..recipe import model_label, with_model
from ..step.attention import unwrap
from .resume import fingerprint
from .sampling import SeededSampling
from .saved import Saved
from .session import Session

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Settings:
    """How answers are generated. temperature: 0 is greedy; above, sampled from `seed` within the top_p nucleus."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def named_models(recipe: dict[str, Any], models: str | list | None) -> dict[str, dict[str, Any]]:
    """{name in the output: recipe that loads the model}. Raises UserError when a model is named twice."""
    if models is None:
        return {model_label(recipe): recipe}
    wanted = [str(model).strip() for model in (models.split(",") if isinstance(models, str) else models)]
    short = [model if model == "base" else Path(model.rstrip("/")).name for model in wanted]
    names = [s if short.count(s) == 1 else model for s, model in zip(short, wanted, strict=True)]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"models={models}: name every model once.")
    return {name: with_model(recipe, model) for name, model in zip(names, wanted, strict=True)}


def unique_prompts(rows, limit: int | None = None) -> list[int]:
    """Positions of the first pair of each (image, prompt); at most `limit` of them, evenly spread."""
    seen: dict[tuple, int] = {}
    for position, row in enumerate(rows):
        seen.setdefault((row["image_hash"] or row["image"], tuple(row["prompt_ids"])), position)
    found = list(seen.values())
    if limit is None:
        return found
    if limit < 1:
        raise UserError(f"max_prompts={limit}: must be at least 1.")
    return evenly(found, limit)


def answers(
    session: Session, positions: Sequence[int], folder: Path, name: str, settings: Settings, restart: bool = False
) -> dict[int, dict[str, Any]]:
    """{position: {"dataset", "pair_id", "answer"} or {…, "bad_image": reason}}, saved ones included.

    name: the model's; its answers are saved in `folder` under this name as they come. restart: saved ones are not used.
    """
    used = dataclasses.asdict(settings) if settings.temperature else settings.max_new_tokens
    parts = json.dumps([fingerprint(session), used])
    key = hashlib.sha256(parts.encode()).hexdigest()[:16]
    saved = Saved(folder / f".answers_{hashlib.sha256(name.encode()).hexdigest()[:12]}.jsonl", key, restart)
    done = {record["position"]: record for record in saved.records}
    waiting = [position for position in positions if position not in done]
    if waiting:
        with saved.appending(len(positions), len(positions) - len(waiting), "prompt", name) as add:
            for batch in generate(session, waiting, settings):
                add(batch)
                done.update((record["position"], record) for record in batch)
    return {position: done[position] for position in positions}


def generate(session: Session, positions: Sequence[int], settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Answers to the prompts of session.rows[positions], a list of records per batch, longest prompts first.

    Uses plain transformers `generate` on left-padded batches. Sampling draws from one generator per prompt (see
    `SeededSampling`), so the batch a prompt is in does not change its draws.
    """
    for rows, records, inputs in prompt_batches(session, positions):
        if rows:
            seeds = [prompt_seed(row, settings.seed) for row in rows]
            processors = [SeededSampling(seeds, settings.temperature, settings.top_p)] if settings.temperature else []
            texts = answer_batch(session, inputs, settings.max_new_tokens, processors)
            records += [record_of(row, answer=text) for row, text in zip(rows, texts, strict=True)]
        yield records


def prompt_batches(
    session: Session, positions: Sequence[int]
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """(rows, records of those whose image can't be decoded, `batch_inputs` of the rows) of each batch, longest first.

    The prompts are those of session.rows[positions]; a row also has its position and its unique_id. Without rows there
    are no inputs.
    """
    ids = scoring.unique_ids(session.rows)
    image_token = unwrap(session.model).config.image_token_id
    conversation, tokenizer = session.template.conversation, session.tokenizer

    def load(batch: list[int]):
        """Runs in the dataloader's workers."""
        rows, pictures, bad = [], [], []
        for position in batch:
            row = dict(session.rows[position], position=position, unique_id=ids[position])
            # the prompt alone: where it makes one token with the start of an answer, a pair's prompt_ids end before it
            row["prompt_ids"] = conversation.encode_prompt(tokenizer, row["question"], row["image"] is not None)
            try:
                picture = load_image(row["image"]) if row["image"] is not None else None
            except (images.ImageError, OSError) as err:
                bad.append(record_of(row, bad_image=str(err)))
                continue
            rows.append(row)
            if picture is not None:
                pictures.append(picture)
        sequences = [full_prompt_ids(row, image_token) for row in rows]
        return rows, bad, batch_inputs(session, sequences, pictures) if rows else {}

    order = sorted(positions, key=lambda p: -session.rows[p]["num_image_tokens"] - len(session.rows[p]["prompt_ids"]))
    return iter(DataLoader(order, batch_size=session.batch_size, collate_fn=load, num_workers=session.num_workers))


def batch_inputs(session: Session, sequences: Sequence[Sequence[int]], pictures: Sequence) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, on the CPU: left-padded prompts, RGB pictures in the order of their prompts."""
    inputs = left_padded(sequences, session.tokenizer.pad_token_id)
    if pictures:
        inputs.update(session.processor.image_processor(pictures, return_tensors="pt"))
    return inputs


def answer_batch(
    session: Session, inputs: dict[str, torch.Tensor], max_new_tokens: int, processors: Sequence = (), **streaming
) -> list[str]:
    """The texts that the model generates for a batch of `batch_inputs`, by plain transformers `generate`.

    Greedy, unless `processors` hold a SeededSampling. A checkpoint's generation_config.json changes nothing.
    streaming: a streamer and stopping_criteria for `generate`.
    """
    config = generation_config(session, max_new_tokens)
    inputs = {key: value.to(session.device) for key, value in inputs.items()}
    with torch.no_grad(), session.precision():
        out = session.model.generate(**inputs, generation_config=config, logits_processor=list(processors), **streaming)
    return answer_texts(session, out[:, inputs["input_ids"].shape[1] :])


def generation_config(session: Session, max_new_tokens: int, **more) -> GenerationConfig:
    """Greedy decoding to the end tokens of the session's format, or to max_new_tokens. more: further fields."""
    tokenizer = session.tokenizer
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(session.template.conversation, tokenizer),
        **more,
    )


def answer_texts(session: Session, ids: torch.Tensor) -> list[str]:
    """The texts of generated tokens, (n, tokens), without special tokens."""
    return [text.strip() for text in session.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def left_padded(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (n, longest), padded on the left."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return {"input_ids": ids, "attention_mask": mask}


def end_tokens(conversation: Conversation, tokenizer) -> list[int]:
    """The ids that end an answer: that of the training format and the tokenizer's own."""
    trained = tokenizer.convert_tokens_to_ids(conversation.response[1])
    return sorted({trained, tokenizer.eos_token_id})


def prompt_seed(row: dict[str, Any], seed: int | list[int]) -> int:
    """A 63-bit seed from the recipe's seed, the image and the prompt: the same in every batch and model."""
    text = json.dumps([seed, row["image_hash"], row["prompt_ids"]])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def describe(session: Session, position: int, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One line of generations.jsonl without answers; writes the image's original bytes to images/<hash>.<ext>."""
    row, tokenizer = session.rows[position], session.tokenizer
    image = None
    if row["image"] is not None:
        data = image_store.read_bytes(row["image"])
        with Image.open(io.BytesIO(data)) as opened:
            extension = {"JPEG": "jpg", "MPO": "jpg"}.get(opened.format, opened.format.lower())
        path = folder / "images" / f"{row['image_hash'] or images.content_hash(data)}.{extension}"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        image = {"path": f"images/{path.name}"}
    texts = {side: tokenizer.decode(row[f"{side}_ids"], skip_special_tokens=True).strip() for side in SIDES}
    return {
        "pair_id": record["pair_id"],
        "dataset": row["dataset"],
        "subset": f"{row['source']}/{row['question_type']}",
        "image": image,
        "question": row["question"],
        **texts,
        "answers": {},
    }


def record_of(row: dict[str, Any], **what: Any) -> dict[str, Any]:
    """The record of a row with its position and its unique_id."""
    return {"position": row["position"], "dataset": row["dataset"], "pair_id": row["unique_id"], **what}
