"""RLAIF-V as a multimodal pairwise dataset: index of images, filter, held-out split, conversion.

`align` takes the place of LLaMA-Factory's `align_dataset` for entries with `formatting: rlaif_v`
(0.9.5: llamafactory/data/converter.py). It never copies an image: see `image_store`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from llamafactory.data.converter import DatasetConverter

from ..arguments import PluginArguments
from ..errors import UserError
from . import image_store, images, media, rows

INDEX_VERSION = 2  # part of the cache key: raise it when `index_images` gives other columns or values


@dataclass
class DatasetRequest:
    """What a recipe asks for from one registered dataset: the entry's `llava_orpo` block and the recipe's own keys."""

    name: str
    arguments: PluginArguments
    part: str | None = None  # "train", "heldout" or None for all rows
    entry_filter: dict[str, Any] | None = None
    max_samples: int | None = None
    num_samples: int | None = None
    skipped: list[dict[str, Any]] = field(default_factory=list)  # filled by `align`
    considered: int = 0


def read_request(name: str, entry: dict[str, Any], arguments: PluginArguments) -> DatasetRequest:
    """The request for a dataset_info.json entry. Raises UserError for an unknown `part` or key."""
    block = entry.get("llava_orpo", {})
    unknown = set(block) - {"part", "filter"}
    if unknown:
        raise UserError(f"dataset_info.json: {name}: unknown key in `llava_orpo`: {', '.join(sorted(unknown))}.")
    part = block.get("part")
    if part not in (None, "train", "heldout"):
        raise UserError(f"dataset_info.json: {name}: `part` must be train or heldout, not {part!r}.")
    return DatasetRequest(name, arguments, part, block.get("filter"))


def index_images(batch, indices, *, column, file, media_dirs, verify, version, stamp=""):
    """One index row per image: reference, content hash, size, problem. Reads headers, not pixels.

    media_dirs: the only folders in which a path is followed (see `media.folders_of`). version, stamp: make the cache
    key another one when this function, or the state of the files that the paths name, is another one.
    With `verify="full"` every image is decoded once. Batched function for `datasets.map`.
    """
    out = {"_ref": [], "_hash": [], "_width": [], "_height": [], "_problem": []}
    for value, row in zip(batch[column], indices, strict=True):
        ref, digest, size, problem = "", "", (0, 0), ""
        try:
            if value is None or (isinstance(value, dict) and value.get("bytes") is None and not value.get("path")):
                problem = "no image"
            else:
                if isinstance(value, dict) and value.get("bytes") is not None:
                    ref = image_store.arrow_reference(file, column, row)
                    data = value["bytes"]
                    if not isinstance(data, bytes):  # text, which would be opened as a path
                        raise images.ImageError(f"column {column!r} holds {type(data).__name__}, not bytes")
                else:
                    ref = _find_file(value["path"] if isinstance(value, dict) else value, media_dirs)
                    data = image_store.read_bytes(ref)
                size = images.header_size(data)
                digest = images.content_hash(data)
                images.verify(data) if verify == "full" else _check_end(data)
        except (images.ImageError, OSError) as err:
            problem = f"bad image: {err}"
        for key, item in zip(out, (ref, digest, size[0], size[1], problem), strict=True):
            out[key].append(item)
    return out


def _find_file(path: str, media_dirs: list[str]) -> str:
    if not isinstance(path, str):
        raise OSError(f"the image is {type(path).__name__}, not a path or bytes")
    return media.find_file(path, media_dirs)


def _stamp(dataset: Dataset, column: str, media_dirs: list[str]) -> str:
    """A hash of the image files that a column of paths names: a file that was added or changed is read again."""
    kind = dataset.features[column]
    if getattr(kind, "dtype", "") not in ("string", "large_string"):
        return ""
    paths = sorted({path for path in dataset[column] if isinstance(path, str)})
    return images.content_hash(repr(media.states(paths, media_dirs)).encode())


def _check_end(data: bytes) -> None:
    """Finds most truncated files without decoding: JPEG and PNG say where they end."""
    if data[:2] == b"\xff\xd8" and b"\xff\xd9" not in data[-4096:]:
        raise images.ImageError("truncated JPEG (no end-of-image marker)")
    if data[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" not in data[-4096:]:
        raise images.ImageError("truncated PNG (no IEND chunk)")
    if data[:4] == b"RIFF" and len(data) < int.from_bytes(data[4:8], "little"):
        raise images.ImageError("truncated WebP")


def build_index(dataset: Dataset, column: str, media_dirs: list[str], verify: str, num_proc: int | None) -> Dataset:
    """The image index of every row, cached by `datasets` and shared by all subsets, filters and parts."""
    settings = dict(column=column, media_dirs=media_dirs, verify=verify, version=INDEX_VERSION)
    settings["stamp"] = _stamp(dataset, column, media_dirs)
    parts = []
    for file, part in _by_arrow_file(dataset, column):
        parts.append(
            part.map(
                index_images,
                batched=True,
                batch_size=256,
                with_indices=True,
                remove_columns=part.column_names,
                fn_kwargs=dict(settings, file=file),
                num_proc=num_proc if num_proc and len(part) > 4096 else None,
                desc="Reading image headers",
            )
        )
    return concatenate_datasets(parts)


def _by_arrow_file(dataset: Dataset, column: str) -> list[tuple[str, Dataset]]:
    """The dataset cut at its Arrow files, so that (file, row) names every image.

    A sliced split (`train[:1%]`) is not aligned to its files: its rows are copied once.
    """
    files = [entry["filename"] for entry in dataset.cache_files]
    parts = [Dataset.from_file(file) for file in files]
    if not files or sum(len(part) for part in parts) != len(dataset) or dataset._indices is not None:
        copied = dataset.map(_same, batched=True, desc="Copying the selected rows once")
        files = [entry["filename"] for entry in copied.cache_files]
        parts = [Dataset.from_file(file) for file in files]
        if not files:
            raise UserError("The dataset has no Arrow file on disk; streaming and in-memory data are not supported.")
    return [
        (file, image_store.undecoded(part, column).select_columns([column]))
        for file, part in zip(files, parts, strict=True)
    ]


def _same(batch):
    return batch


def align(dataset: Dataset, dataset_attr, data_args, request: DatasetRequest, num_proc: int | None = None) -> Dataset:
    """Rows of a registered dataset in LLaMA-Factory's standard format, plus `_identity` (a struct, see below).

    Order of work: image index, filter, held-out part, bad rows out (into `request.skipped`), `num_samples`
    / `max_samples`, conversion by `RlaifVConverter`.
    """
    column = dataset_attr.images or "image"
    if column not in dataset.column_names and "image_path" in dataset.column_names:
        column = "image_path"
    if column not in dataset.column_names and not request.arguments.allow_text_only:
        raise UserError(
            f"{request.name}: no column {column!r} (columns: {', '.join(dataset.column_names)}). Name the image "
            "column under `columns: {images: …}` in dataset_info.json, or set `allow_text_only: true`."
        )

    texts = dataset
    if column in dataset.column_names:
        dataset = image_store.undecoded(dataset, column)
        media_dirs = media.folders_of(dataset_attr, data_args)
        index = build_index(dataset, column, media_dirs, request.arguments.verify_images, num_proc)
        keep_text = dataset.column_names if column == "image_path" else [c for c in dataset.column_names if c != column]
        texts = dataset.select_columns(keep_text)
    else:
        blank = {"_ref": [""], "_hash": [""], "_width": [0], "_height": [0], "_problem": ["no image"]}
        index = Dataset.from_dict({key: value * len(dataset) for key, value in blank.items()})

    kept = _choose(texts, index, request)
    aligned = concatenate_datasets([texts.select(kept), index.select(kept)], axis=1)
    aligned = aligned.add_column("_row", np.asarray(kept, dtype=np.int64))
    converter = RlaifVConverter(dataset_attr, data_args, request.name)
    return aligned.map(converter, remove_columns=aligned.column_names, desc=f"Converting {request.name}")


def _choose(texts: Dataset, index: Dataset, request: DatasetRequest) -> list[int]:
    """The numbers of the rows that remain after filter, part, bad rows and sample limits, in order."""
    table = texts.to_list()
    kept = list(range(len(table)))
    for conditions in (request.entry_filter, request.arguments.dataset_filter):
        if conditions:
            matched = rows.filter_rows((table[row] for row in kept), conditions, request.name)
            kept = [kept[position] for position in matched]

    hashes, problems = index["_hash"], index["_problem"]
    if request.part is not None:
        fraction = request.arguments.heldout_fraction
        wanted = request.part == "heldout"
        kept = [row for row in kept if not hashes[row] or rows.is_heldout(hashes[row], fraction) == wanted]
        if not kept:
            raise UserError(
                f"{request.name}: no image falls into the {request.part} part at heldout_fraction: {fraction}. "
                "Raise heldout_fraction, or use more images."
            )

    request.considered = len(kept)
    good = []
    for row in kept:
        try:
            rows.preference_texts(table[row])
            if problems[row] and not (problems[row] == "no image" and request.arguments.allow_text_only):
                raise rows.RowError(problems[row])
            good.append(row)
        except rows.RowError as err:
            pair_id = rows.pair_id_of(table[row], row)
            request.skipped.append({"dataset": request.name, "row": row, "pair_id": pair_id, "reason": str(err)})
    if not good:
        reasons = sorted({entry["reason"] for entry in request.skipped})[:5]
        raise UserError(f"{request.name}: every row is unusable. Reasons: {'; '.join(reasons)}")

    if request.num_samples is not None:  # LLaMA-Factory's meaning: a random sample, repeated if it must be
        generator = np.random.default_rng(0)
        extra = generator.choice(good, max(0, request.num_samples - len(good)))
        good = sorted([*generator.permutation(good)[: request.num_samples].tolist(), *extra.tolist()])
    return good[: request.max_samples]


@dataclass
class RlaifVConverter(DatasetConverter):
    """Converts one row with its image index to LLaMA-Factory's standard format.

    `_prompt` holds the bare question: the template puts the image before it, so an `<image>` that a question
    or answer contains is text. `_images` holds a reference (see `image_store`). `_identity` carries the pair's
    identity: pair_id, row, dataset, source, question_type, image_hash, width, height.
    """

    name: str = "rlaif_v"

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        question, chosen, rejected = rows.preference_texts(example)
        return {
            "_prompt": [{"role": "user", "content": question}],
            "_response": [{"role": "assistant", "content": chosen}, {"role": "assistant", "content": rejected}],
            "_system": "",
            "_tools": "",
            "_images": [example["_ref"]] if example["_ref"] else None,
            "_videos": None,
            "_audios": None,
            "_identity": {
                "pair_id": rows.pair_id_of(example, example["_row"]),
                "row": example["_row"],
                "dataset": self.name,
                "source": rows.source_of(example),
                "question_type": rows.question_type_of(example),
                "image_hash": example["_hash"],
                "width": example["_width"],
                "height": example["_height"],
            },
        }
