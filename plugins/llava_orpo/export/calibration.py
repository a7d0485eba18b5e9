"""Calibration samples for scripts/quantize.py: preference pairs as the embeddings the language model reads.

A sample is prompt + chosen answer with its image, in the checkpoint's exact template. Vision tower and projector are
not quantized, so they run once, here; llm-compressor then sees a plain text decoder and need not trace image code.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.dataset
import torch
from tqdm import tqdm

from ..checkpoint.files import CheckpointError, read_json
from ..data import images, media, rows
from ..data.anyres import AnyresGeometry
from ..data.conversation import CONVERSATIONS, Conversation, expand_image_token
from ..errors import UserError

PROBE = "What is in the picture?"


class DataError(UserError):
    """Calibration data that cannot be used; the message names the file or entry and the remedy."""


@dataclass(frozen=True)
class Source:
    """Parquet files of pairs in RLAIF-V's schema, and which of their rows a registered dataset means."""

    path: Path
    name: str
    part: str | None = None
    conditions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.path.exists():
            raise DataError(
                f"{self.path} does not exist; --data takes a parquet file, a folder of them, or a registered name."
            )
        try:
            names = set(self.open().schema.names)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path} is no parquet file, or a damaged one: {error}") from error
        missing = {"question", "chosen", "rejected", "image"} - names
        if missing and not ("image" in names and "text" in names):  # RLHF-V keeps the three texts in one column
            raise DataError(f"{self.path} has no column {', '.join(sorted(missing))}: it is not in RLAIF-V's schema.")

    def open(self) -> pyarrow.dataset.Dataset:
        return pyarrow.dataset.dataset(self.path, format="parquet")


def find_source(data: str, registry: Path) -> Source:
    """A parquet file, a folder of them, or the name of an entry with a local file in `registry`/dataset_info.json.

    An entry's `part` and `filter` are honoured, so calibration sees no held-out image. Raises DataError.
    """
    if data.endswith(".parquet") or Path(data).is_dir():
        return Source(Path(data), Path(data).stem)
    entries = read_json(registry / "dataset_info.json")
    entry = entries.get(data)
    if entry is None:
        raise DataError(f"{registry}/dataset_info.json has no dataset {data!r}; it has {', '.join(sorted(entries))}.")
    if entry.get("formatting") != "rlaif_v" or "file_name" not in entry:
        raise DataError(
            f"{data} is not a local file in RLAIF-V's schema; download it and give the parquet file to "
            "--data, or register it with `file_name` and `formatting: rlaif_v`."
        )
    block = entry.get("llava_orpo", {})
    return Source(registry / entry["file_name"], data, block.get("part"), block.get("filter", {}))


def choose_pairs(
    source: Source, count: int, heldout_fraction: float, seed: int = 0
) -> tuple[list[dict[str, Any]], Counter]:
    """`count` random rows (fewer if there are fewer) as {question, chosen, rejected, image (bytes)}.

    Also returns the reasons why rows were left out (unusable text or image, the other part) with their counts.
    heldout_fraction: that of the training recipe, which decides what the `part` of a registered dataset holds. Only
    the images of chosen rows are read. Raises DataError when no row is usable or the filter matches no row.
    """
    dataset = source.open()
    table = dataset.to_table(columns=[name for name in dataset.schema.names if name != "image"]).to_pylist()
    order = list(range(len(table)))
    if source.conditions:
        try:
            order = rows.filter_rows(table, source.conditions, source.name)
        except ValueError as error:
            raise DataError(str(error)) from error
    random.Random(seed).shuffle(order)
    found: list[dict[str, Any]] = []
    passed: Counter = Counter()
    while order and len(found) < count:
        batch, order = order[: count - len(found)], order[count - len(found) :]
        for row, value in zip(batch, dataset.take(batch, columns=["image"])["image"].to_pylist(), strict=True):
            try:
                question, chosen, rejected = rows.preference_texts(table[row])
                data = _image_bytes(value, source.path)
                images.verify(data)
            except (rows.RowError, images.ImageError, OSError) as error:
                passed[str(error)] += 1
                continue
            if source.part and rows.is_heldout(images.content_hash(data), heldout_fraction) != (
                source.part == "heldout"
            ):
                passed[f"not in the {source.part} part"] += 1
                continue
            found.append({"question": question, "chosen": chosen, "rejected": rejected, "image": data})
    if not found:
        raise DataError(f"{source.path}: no usable row. Reasons: {'; '.join(sorted(passed)[:5])}")
    return found, passed


def _image_bytes(value: dict[str, Any] | None, file: Path) -> bytes:
    if value is None or not (value.get("bytes") or value.get("path")):
        raise rows.RowError("no image")
    if value.get("bytes") is not None:
        return value["bytes"]
    own = file if file.is_dir() else file.parent
    return Path(media.find_file(value["path"], [os.path.realpath(own)])).read_bytes()


def checkpoint_conversation(processor, folder: Path) -> Conversation:
    """The conversation whose prompt the folder's chat template renders. Raises CheckpointError if there is none."""
    content = [{"type": "image"}, {"type": "text", "text": PROBE}]
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for conversation in CONVERSATIONS.values():
        if conversation.render_prompt(PROBE, has_image=True) == rendered:
            return conversation
    raise CheckpointError(
        f"{folder}: its chat template writes {rendered!r}, which is not LLaVA-1.6's ({', '.join(CONVERSATIONS)})."
    )


class _Reached(Exception):
    pass


def embed_pairs(model, processor, conversation: Conversation, pairs: list[dict], device: torch.device) -> list[dict]:
    """The language model's input per pair: {"inputs_embeds": (1, T, hidden), "position_ids": (1, T)}, on CPU.

    The model's own forward computes it, stopped where the language model starts; only the parts that run are put on
    `device`.
    """
    decoder = model.model.language_model
    parts = [model.model.vision_tower, model.model.multi_modal_projector, decoder.embed_tokens]
    samples = []

    def stop(_module, _args, kwargs):
        embeds = kwargs["inputs_embeds"].cpu()
        samples.append({"inputs_embeds": embeds, "position_ids": torch.arange(embeds.shape[1])[None]})
        raise _Reached

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    for part in parts:
        part.to(device)
    try:
        for inputs in tqdm(
            _inputs(model, processor, conversation, pairs), total=len(pairs), desc="Embedding", unit="pair"
        ):
            try:
                model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            except _Reached:
                pass
    finally:
        hook.remove()
        for part in parts:
            part.to("cpu")
    return samples


def _inputs(model, processor, conversation: Conversation, pairs: list[dict]) -> Iterator[dict[str, torch.Tensor]]:
    geometry = AnyresGeometry.from_config(model.config)
    for pair in pairs:
        picture = images.decode_rgb(pair["image"])
        texts = ([pair["question"]], [pair["chosen"]], [pair["rejected"]], [True])
        ((prompt, chosen, _),) = conversation.encode_pairs(processor.tokenizer, *texts)
        prompt = expand_image_token(prompt, model.config.image_token_id, geometry.num_image_tokens(*picture.size))
        features = processor.image_processor([picture], return_tensors="pt")
        yield {
            "input_ids": torch.tensor([prompt + chosen]),
            "pixel_values": features["pixel_values"].to(model.dtype),
            "image_sizes": features["image_sizes"],
        }
