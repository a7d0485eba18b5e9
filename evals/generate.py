"""Answers of one or more models to the held-out prompts, for reading, for the report and for a judge.

    python evals/generate.py recipes/llava16_orpo_qlora.yaml models=base,outputs/llava16_orpo_qlora
    python evals/generate.py recipes/tiny/llava16_orpo_qlora.yaml models=base,outputs/tiny/orpo_qlora

Takes a recipe and overrides like llamafactory-cli. The prompts are those of its eval_dataset, each (image,
question) once, in exactly the text the model is trained on. Batches are per_device_eval_batch_size. Own keys:

    models          comma-separated: `base`, adapter folders, model folders or Hub ids (default: the recipe's own).
                    Answers are filed under a folder's last name, under its whole path where two share that
                    name
    max_prompts     at most so many prompts, spread evenly over the set
    max_new_tokens  512
    temperature     0 is greedy; above, sampled with the recipe's `seed`
    top_p           1.0
    output_dir      where to write (default outputs/evals/<model>-generations)
    restart         true: ask again what an interrupted or earlier run had asked

Writes generations.jsonl (a line a prompt: question, chosen, rejected and every model's answer) and images/
beside it, the original bytes. An interrupted run goes on where it stopped, and models that have answered are
not asked again.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from llava_orpo import evaluation, image_store, images, shared_attention
from llava_orpo.conversation import Conversation
from llava_orpo.mm_plugin import load_image
from llava_orpo.pairs import full_prompt_ids
from llava_orpo.session import Session, model_label, open_session, read_recipe, with_model
from PIL import Image
from preference import fingerprint, read_saved
from sampling import SeededSampling
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig

SIDES = ("chosen", "rejected")
OWN_KEYS = {
    "models": None, "max_prompts": None, "max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "restart": False,
}  # fmt: skip


def main(argv: list[str]) -> int:
    recipe, own = read_recipe(argv, OWN_KEYS)
    given_output = any(word.startswith("output_dir=") for word in argv)
    base = model_label(with_model(recipe, "base"))
    folder = Path(recipe["output_dir"]) if given_output else Path("outputs/evals") / f"{base}-generations"
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for name, model_recipe in named_models(recipe, own["models"]).items():
        session = open_session(model_recipe, str(folder))
        prompts = unique_prompts(session.rows, own["max_prompts"])
        found = answers(session, prompts, folder, name, own)
        for position in prompts:
            record = found[position]
            if "bad_image" in record:
                print(
                    f"left out {record['dataset']} {record['pair_id']}: {record['bad_image']}",
                    file=sys.stderr,
                )
                continue
            line = lines.setdefault(
                (record["dataset"], record["pair_id"]), describe(session, position, record, folder)
            )
            line["answers"][name] = record["answer"]
        print(f"{name}: {len(prompts)} prompts of {len(session.rows)} pairs")
        del session
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not lines:
        raise SystemExit("No prompt could be answered: every image is unreadable (listed above).")
    target = folder / "generations.jsonl"
    beside = target.with_suffix(".jsonl.partial")
    beside.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()), encoding="utf-8"
    )
    beside.replace(target)
    print(f"  {target}")
    return 0


def named_models(recipe: dict[str, Any], models: str | list | None) -> dict[str, dict[str, Any]]:
    """{name in the output: recipe that loads the model}. Raises SystemExit when a model is named twice."""
    if models is None:
        return {model_label(recipe): recipe}
    wanted = [str(model).strip() for model in (models.split(",") if isinstance(models, str) else models)]
    short = [model if model == "base" else Path(model.rstrip("/")).name for model in wanted]
    names = [s if short.count(s) == 1 else model for s, model in zip(short, wanted)]
    if len(set(names)) != len(names) or not all(names):
        raise SystemExit(f"models={models}: name every model once.")
    return {name: with_model(recipe, model) for name, model in zip(names, wanted)}


def unique_prompts(rows, limit: int | None = None) -> list[int]:
    """Positions of the first pair of each (image, prompt), at most `limit` of them, evenly spread."""
    seen: dict[tuple, int] = {}
    for position, row in enumerate(rows):
        seen.setdefault((row["image_hash"] or row["image"], tuple(row["prompt_ids"])), position)
    found = list(seen.values())
    if limit is None or limit >= len(found):
        return found
    if limit < 1:
        raise SystemExit(f"max_prompts={limit}: must be at least 1.")
    return [found[i * len(found) // limit] for i in range(limit)]


def answers(
    session: Session, positions: Sequence[int], folder: Path, name: str, own: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """{position: {"dataset", "pair_id", "answer"} or {…, "bad_image": reason}}, saved ones included."""
    settings = {key: own[key] for key in ("max_new_tokens", "temperature", "top_p")}
    settings["seed"] = int(session.recipe.get("seed", 0))
    parts = json.dumps([fingerprint(session), settings if settings["temperature"] else own["max_new_tokens"]])
    key = hashlib.sha256(parts.encode()).hexdigest()[:16]
    saved = folder / f".answers_{hashlib.sha256(name.encode()).hexdigest()[:12]}.jsonl"
    records = [] if own["restart"] else read_saved(saved, key)
    done = {record["position"]: record for record in records}
    beside = saved.with_name(saved.name + ".new")  # drops a cut last line, or another model's answers
    beside.write_text("".join(json.dumps(line) + "\n" for line in [{"key": key}, *records]))
    beside.replace(saved)
    waiting = [position for position in positions if position not in done]
    if waiting:
        there = len(positions) - len(waiting)
        with (
            saved.open("a") as out,
            tqdm(total=len(positions), initial=there, unit="prompt", desc=name) as bar,
        ):
            for batch in generate(session, waiting, **settings):
                out.writelines(json.dumps(record) + "\n" for record in batch)
                out.flush()
                done.update((record["position"], record) for record in batch)
                bar.update(len(batch))
    return {position: done[position] for position in positions}


def generate(
    session: Session,
    positions: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to the prompts of session.rows[positions], a list of records per batch, longest prompts first.

    Plain transformers `generate` on left-padded batches. Sampling draws from a generator per prompt (see
    `SeededSampling`): the batch a prompt is in does not change its draws.
    """
    ids = evaluation.unique_ids(session.rows)
    image_token = shared_attention.unwrap(session.model).config.image_token_id
    conversation, tokenizer = session.template.conversation, session.tokenizer

    def load(batch: list[int]):
        """Runs in the dataloader's workers."""
        rows, pictures, bad = [], [], []
        for position in batch:
            row = dict(session.rows[position], position=position)
            row["prompt_ids"] = prompt_ids(conversation, tokenizer, row)
            try:
                picture = load_image(row["image"]) if row["image"] is not None else None
            except (images.ImageError, OSError) as err:
                bad.append((row, str(err)))
                continue
            rows.append(row)
            if picture is not None:
                pictures.append(picture)
        sequences = [full_prompt_ids(row, image_token) for row in rows]
        return rows, bad, batch_inputs(session, sequences, pictures) if rows else {}

    order = sorted(
        positions, key=lambda p: -session.rows[p]["num_image_tokens"] - len(session.rows[p]["prompt_ids"])
    )
    loader = DataLoader(
        order, batch_size=int(session.recipe.get("per_device_eval_batch_size", 8)), collate_fn=load,
        num_workers=int(session.recipe.get("dataloader_num_workers", 0)),
    )  # fmt: skip
    for rows, bad, inputs in loader:
        records = [_record(row, ids, bad_image=reason) for row, reason in bad]
        if rows:
            seeds = [prompt_seed(row, seed) for row in rows]
            processors = [SeededSampling(seeds, temperature, top_p)] if temperature else []
            texts = answer_batch(session, inputs, max_new_tokens, processors)
            records += [_record(row, ids, answer=text) for row, text in zip(rows, texts)]
        yield records


def batch_inputs(
    session: Session, sequences: Sequence[Sequence[int]], pictures: Sequence
) -> dict[str, torch.Tensor]:
    """Model inputs of a batch, on the CPU: left-padded prompts, RGB pictures in the order of their prompts."""
    inputs = left_padded(sequences, session.tokenizer.pad_token_id)
    if pictures:
        inputs.update(session.processor.image_processor(pictures, return_tensors="pt"))
    return inputs


@torch.no_grad()
def answer_batch(
    session: Session, inputs: dict[str, torch.Tensor], max_new_tokens: int, processors: Sequence = ()
) -> list[str]:
    """Texts that the model generates for a batch of `batch_inputs`, by plain transformers `generate`.

    Greedy, unless `processors` hold a SeededSampling. A checkpoint's generation_config.json changes nothing.
    """
    shared_attention.disable(session.model)
    tokenizer = session.tokenizer
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
        repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end_tokens(session.template.conversation, tokenizer),
    )  # fmt: skip
    inputs = {key: value.to(session.device) for key, value in inputs.items()}
    with torch.autocast(session.device.type, session.autocast) if session.autocast else nullcontext():
        out = session.model.generate(**inputs, generation_config=config, logits_processor=list(processors))
    answers = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def left_padded(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (n, longest), padding on the left."""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return {"input_ids": ids, "attention_mask": mask}


def prompt_ids(conversation: Conversation, tokenizer, row: dict[str, Any]) -> list[int]:
    """Ids of the prompt alone, one image placeholder.

    A row's prompt_ids are that, unless the end of the prompt and the start of an answer made one token
    (`Conversation.encode_pairs`); then the prompt is encoded again without an answer.
    """
    has_image, decoded = row["image"] is not None, conversation.decode_prompt(tokenizer, row["prompt_ids"])
    if decoded.endswith(conversation.user[1] + conversation.generation):
        return row["prompt_ids"]
    return conversation.encode_prompt(tokenizer, question_of(conversation, decoded, has_image), has_image)


def question_of(conversation: Conversation, decoded: str, has_image: bool) -> str:
    """The question inside a decoded prompt (special tokens kept) whose last characters may be missing.

    Raises ValueError when the prompt does not start as the format does.
    """
    before, after = conversation.render_prompt("\0", has_image).split("\0")
    start = decoded.find(before)
    if start < 0:
        raise ValueError(f"A prompt does not start as template {conversation.name} writes it: {decoded!r}")
    missing = next(k for k in range(len(after) + 1) if decoded.endswith(after[: len(after) - k]))
    return decoded[start + len(before) : len(decoded) - len(after) + missing]


def end_tokens(conversation: Conversation, tokenizer) -> list[int]:
    """Ids that end an answer: the one of the training format and the tokenizer's own."""
    trained = tokenizer.convert_tokens_to_ids(conversation.response[1])
    return sorted({trained, tokenizer.eos_token_id})


def prompt_seed(row: dict[str, Any], seed: int) -> int:
    """A 63-bit seed from the recipe's seed, the image and the prompt: the same in every batch and model."""
    text = json.dumps([seed, row["image_hash"], row["prompt_ids"]])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def describe(session: Session, position: int, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A line of generations.jsonl without answers; the image's original bytes go to images/<hash>.<ext>."""
    row, tokenizer, conversation = session.rows[position], session.tokenizer, session.template.conversation
    prompt = conversation.decode_prompt(tokenizer, prompt_ids(conversation, tokenizer, row))
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
        "question": question_of(conversation, prompt, image is not None),
        **texts,
        "answers": {},
    }


def _record(row: dict[str, Any], ids: list[str], **what: str) -> dict[str, Any]:
    return {"position": row["position"], "dataset": row["dataset"], "pair_id": ids[row["position"]], **what}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
