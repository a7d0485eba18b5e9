"""RLAIF-V as a multimodal pairwise dataset: index of images, filter, held-out split, conversion.

Every pass over all rows is a batched `datasets.map`: it shows a progress bar, is cached by its inputs, and holds one
batch of rows in memory. What depends on the recipe's part and limits is arithmetic on whole columns.

`align` takes the place of LLaMA-Factory's `align_dataset` for entries with `formatting: rlaif_v`
(0.9.5: llamafactory/data/converter.py). It never copies an image: see `image_store`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from datasets.utils import tqdm
from llamafactory.data.converter import DatasetConverter
from llamafactory.extras import logging

from ..arguments import PluginArguments
from ..errors import UserError
from . import columns, image_store, images, media, message_rows, parquet_rows, rows

logger = logging.get_logger("llamafactory." + __name__)

# parts of the cache keys: raise one when its function gives other columns or values
INDEX_VERSION = 3  # index_images
TEXTS_VERSION = 1  # check_texts
FILTER_VERSION = 1  # match_rows
CONVERTED = (
    "question",
    "chosen",
    "rejected",
    "text",
    "idx",
    rows.UNREADABLE,
    "origin_dataset",
    "ds_name",
    "origin_split",
)
CHECKED = CONVERTED[:6]  # what a row's texts and its pair id are made of


@dataclass
class DatasetRequest:
    """What a recipe asks for from one registered dataset: the entry's `llava_orpo` block and the recipe's own keys."""

    name: str
    arguments: PluginArguments
    part: str | None = None  # "train", "heldout" or None for all rows
    entry_filter: dict[str, Any] | None = None
    max_samples: int | None = None
    num_samples: int | None = None
    formatting: str = "rlaif_v"  # or one of `message_rows.READERS`
    held: parquet_rows.HeldImages | None = None  # images that are no column of the dataset, but stay in parquet files
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
    return _index(
        batch[column],
        lambda position, data: image_store.arrow_reference(file, column, indices[position]),
        column,
        media_dirs,
        verify,
    )


def index_held_images(batch, indices, *, files, column, media_dirs, verify, version):
    """As `index_images`, for images that stay in parquet files. The batch itself holds other columns.

    files: of `parquet_rows.HeldImages`; their stamps are part of the cache key.
    """
    out: dict[str, list] = {}
    for file, stamp, first, count in parquet_rows.by_file(files, indices):
        reader = parquet_rows.reader(file, stamp, column)
        found = _index(
            reader.rows(first, count),
            lambda position, data, reader=reader, first=first: reader.reference(first + position, data),
            column,
            media_dirs,
            verify,
        )
        for key, values in found.items():
            out.setdefault(key, []).extend(values)
    return out


def _index(cells, reference, column: str, media_dirs: list[str], verify: str) -> dict[str, list]:
    """The index rows of these cells. reference: gives that of a cell from its position and its bytes."""
    out = {"_ref": [], "_hash": [], "_width": [], "_height": [], "_problem": []}
    for position, value in enumerate(cells):
        ref, digest, size, problem = "", "", (0, 0), ""
        count = len(value) if isinstance(value, list) else 1
        if isinstance(value, list):
            value = value[0] if value else None
        try:
            if value is None or (isinstance(value, dict) and value.get("bytes") is None and not value.get("path")):
                problem = "no image"
            elif count > 1:
                problem = image_store.TOO_MANY.format(count)
            else:
                if isinstance(value, dict) and value.get("bytes") is not None:
                    data = value["bytes"]
                    ref = reference(position, data)
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
    kind = getattr(kind, "feature", kind)  # of a list
    if getattr(kind, "dtype", "") not in ("string", "large_string"):
        return ""
    cells = (cell if isinstance(cell, list) else [cell] for cell in dataset[column])
    paths = sorted({path for cell in cells for path in cell if isinstance(path, str)})
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
                num_proc=_processes(num_proc, len(part)),
                desc="Reading image headers",
            )
        )
    return concatenate_datasets(parts)


def build_held_index(
    texts: Dataset, held: parquet_rows.HeldImages, media_dirs: list[str], verify: str, num_proc: int | None
) -> Dataset:
    """The same for images that stay in parquet files. texts: what else the files hold, row by row."""
    index = texts.select_columns(texts.column_names[:1]).map(
        index_held_images,
        batched=True,
        batch_size=64,
        with_indices=True,
        remove_columns=texts.column_names[:1],
        fn_kwargs=dict(
            files=held.files, column=held.column, media_dirs=media_dirs, verify=verify, version=INDEX_VERSION
        ),
        num_proc=_processes(num_proc, len(texts)),
        desc="Reading image headers",
    )
    parquet_rows.reader.cache_clear()  # a row group's places and an open page
    refs = columns.array(index, "_ref")
    # a reference that ends with its separator has no place
    far = pc.sum(pc.and_(pc.starts_with(refs, image_store.PARQUET), pc.ends_with(refs, "#"))).as_py() or 0
    size = parquet_rows.largest_group(held) if far else 0
    if size > parquet_rows.LARGE_GROUP:
        logger.warning_rank0(
            f"{far} of {len(index)} images can only be read with their whole row group (up to {size / 1e6:,.0f} MB for "
            "one image): write the parquet files with compression snappy or none, or with smaller row groups."
        )
    return index


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
    column = image_column(dataset_attr, request)
    media_dirs = media.folders_of(dataset_attr, data_args)
    if request.held is None and column not in dataset.column_names and "image_path" in dataset.column_names:
        column = "image_path"
    known = request.held is not None or column in dataset.column_names
    if not known and not request.arguments.allow_text_only:
        raise UserError(
            f"{request.name}: no column {column!r} (columns: {', '.join(dataset.column_names)}). Name the image "
            "column under `columns: {images: …}` in dataset_info.json, or set `allow_text_only: true`."
        )

    texts = dataset
    if request.held is not None:
        index = build_held_index(texts, request.held, media_dirs, request.arguments.verify_images, num_proc)
    elif known:
        dataset = image_store.undecoded(dataset, column)
        index = build_index(dataset, column, media_dirs, request.arguments.verify_images, num_proc)
        keep_text = dataset.column_names if column == "image_path" else [c for c in dataset.column_names if c != column]
        texts = dataset.select_columns(keep_text)
    else:
        blank = {"_ref": [""], "_hash": [""], "_width": [0], "_height": [0], "_problem": ["no image"]}
        index = Dataset.from_dict({key: value * len(dataset) for key, value in blank.items()})

    if request.formatting != "rlaif_v":
        texts = message_rows.as_texts(dataset, request.formatting, column, num_proc)
        if request.arguments.allow_text_only:
            index = _with_promised_images(index, texts)
    with_context = _uses_context(texts, request)
    extra = (rows.CONTEXT,) if with_context else ()
    settings = {"version": TEXTS_VERSION, **({"context": True} if with_context else {})}
    desc = f"Checking the texts of {request.name}"
    checks = _map_columns(texts, (*CHECKED, *extra), check_texts, desc, num_proc, **settings)
    kept = _choose(texts, index, checks, request, num_proc)
    converted = [c for c in (*CONVERTED, *extra) if c in texts.column_names]
    joined = concatenate_datasets([texts.select_columns(converted), index, checks], axis=1)
    return joined.select(range(len(joined)) if len(kept) == len(joined) else kept).map(
        RlaifVConverter(dataset_attr, data_args, request.name),
        batched=True,
        remove_columns=joined.column_names,
        num_proc=_processes(num_proc, len(kept)),
        desc=f"Converting {request.name}",
    )


def _uses_context(texts: Dataset, request: DatasetRequest) -> bool:
    """Whether the column of contexts is there and the recipe's loss takes it; says so where it is left out."""
    if rows.CONTEXT not in texts.column_names:
        return False
    if _wants_context(request.arguments):
        return True
    logger.warning_rank0(
        f"{request.name}: the column `{rows.CONTEXT}` is not used: it needs `preference_loss: dpo_context`."
    )
    return False


def _wants_context(arguments: PluginArguments) -> bool:
    return getattr(arguments, "preference_loss", None) == "dpo_context"


def image_column(dataset_attr, request: DatasetRequest) -> str:
    """The column of the images: the one that the entry names, else what its layout calls it."""
    return dataset_attr.images or ("image" if request.formatting == "rlaif_v" else message_rows.IMAGES)


def _with_promised_images(index: Dataset, texts: Dataset) -> Dataset:
    """The index in which a row lacks its image, and is no text-only pair, where its messages say that there is one."""
    marked = columns.values(texts, message_rows.MARKED)
    reason = "the messages name an image, and there is none"
    problems = [
        reason if problem == "no image" and mark else problem
        for problem, mark in zip(columns.values(index, "_problem"), marked, strict=True)
    ]
    return index.remove_columns("_problem").add_column("_problem", problems)


def check_texts(batch, indices, *, version, context=False):
    """Number and pair id of every row, and why its texts can't be used (empty if they can). For `_map_columns`.

    context: whether the rows' contexts are used.
    """
    out = {"_row": [], "_pair_id": [], "_bad_text": []}
    for row, number in zip(_rows_of(batch), indices, strict=True):
        try:
            if context:
                rows.context_of(row)
            rows.preference_texts(row)
            reason = ""
        except rows.RowError as err:
            reason = str(err)
        out["_row"].append(number)
        out["_pair_id"].append(rows.pair_id_of(row, number))
        out["_bad_text"].append(reason)
    return out


def match_rows(batch, indices, *, conditions, version):
    """Whether every row meets all conditions of a filter. For `_map_columns`."""
    wanted = rows.wanted_values(conditions)
    met = np.ones(len(indices), dtype=bool)
    for path, accepted in wanted.items():
        column = path.split(".")[0]
        known: dict[str, bool] = {}  # a column such as origin_split has few values: each is parsed once per batch
        for position, value in enumerate(batch[column]):
            found = known.get(value) if isinstance(value, str) else None
            if found is None:
                found = any(rows.normal(leaf) in accepted for leaf in rows.values_at({column: value}, path))
                if isinstance(value, str):
                    known[value] = found
            met[position] &= found
    return {"_match": met}


def _rows_of(batch) -> Iterator[dict[str, Any]]:
    """The rows of a batch of columns, one dict at a time."""
    names = list(batch)
    for values in zip(*(batch[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _processes(num_proc: int | None, count: int) -> int | None:
    """The recipe's `preprocessing_num_workers`, where there are rows enough to be worth starting processes."""
    return num_proc if num_proc and count > 4096 else None


def _map_columns(texts: Dataset, names, function, desc: str, num_proc: int | None, **settings) -> Dataset:
    """What a batched function gives for every row, from no more columns than `names` (of those that exist)."""
    read = texts.select_columns([name for name in texts.column_names if name in names] or texts.column_names)
    return read.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=read.column_names,
        fn_kwargs=settings,
        num_proc=_processes(num_proc, len(read)),
        desc=desc,
    )


def _choose(
    texts: Dataset, index: Dataset, checks: Dataset, request: DatasetRequest, num_proc: int | None
) -> np.ndarray:
    """The numbers (int64) of the rows that remain after filter, part, bad rows and sample limits, in order.

    Of whole columns only the index's hashes and problems and the reasons of `check_texts` are read: some 100 bytes per
    row while this runs, 8 afterwards.
    """
    kept = np.arange(len(texts))
    for conditions in (request.entry_filter, request.arguments.dataset_filter):
        if conditions:
            kept = _filtered(texts, kept, conditions, request.name, num_proc)

    if request.part is not None:
        fraction = request.arguments.heldout_fraction
        kept = kept[_in_part(columns.array(index, "_hash"), request.part == "heldout", fraction)[kept]]
        if not len(kept):
            raise UserError(
                f"{request.name}: no image falls into the {request.part} part at heldout_fraction: {fraction}. "
                "Raise heldout_fraction, or use more images."
            )

    request.considered = len(kept)
    bad_text, problem = columns.array(checks, "_bad_text"), columns.array(index, "_problem")
    bad_image = _differs(problem, "")
    if request.arguments.allow_text_only:
        bad_image &= _differs(problem, "no image")
    bad = (_differs(bad_text, "") | bad_image)[kept]
    left_out = pa.array(kept[bad])
    for row, pair_id, text, image in zip(
        left_out.to_pylist(),
        columns.array(checks, "_pair_id").take(left_out).to_pylist(),
        bad_text.take(left_out).to_pylist(),
        problem.take(left_out).to_pylist(),
        strict=True,
    ):
        request.skipped.append({"dataset": request.name, "row": row, "pair_id": pair_id, "reason": text or image})
    good = kept[~bad]
    if not len(good):
        reasons = sorted({entry["reason"] for entry in request.skipped})[:5]
        raise UserError(f"{request.name}: every row is unusable. Reasons: {'; '.join(reasons)}")

    if request.num_samples is not None:  # LLaMA-Factory's meaning: a random sample, repeated if it must be
        generator = np.random.default_rng(0)
        extra = generator.choice(good, max(0, request.num_samples - len(good)))
        good = np.sort(np.concatenate([generator.permutation(good)[: request.num_samples], extra]))
    return good[: request.max_samples]


def _filtered(texts: Dataset, kept: np.ndarray, conditions, name: str, num_proc: int | None) -> np.ndarray:
    """Those of the rows `kept` that meet every condition. Raises UserError as `rows.filter_rows` does."""
    named = {path.split(".")[0] for path in rows.flatten_filter(conditions)}
    known = named <= set(texts.column_names)
    if known and len(texts):
        desc = f"Filtering {name}"
        matches = _map_columns(texts, named, match_rows, desc, num_proc, conditions=conditions, version=FILTER_VERSION)
        met = kept[columns.array(matches, "_match").to_numpy()[kept]]
        if len(met):
            return met
        texts = texts.select_columns(sorted(named))
    # nothing matches: this says what there is; for a column that does not exist, one row shows which do
    return kept[rows.filter_rows(_rows_at(texts, kept if known else kept[:1]), conditions, name)]


def _rows_at(texts: Dataset, kept: np.ndarray) -> Iterator[dict[str, Any]]:
    """The rows of these numbers one at a time, read in batches."""
    for start in tqdm(range(0, len(kept), 1000), desc="Counting the values present"):
        yield from texts.select(kept[start : start + 1000]).to_list()


def _differs(array: pa.ChunkedArray, value: str) -> np.ndarray:
    return pc.not_equal(array, value).to_numpy()


def _in_part(hashes: pa.ChunkedArray, heldout: bool, fraction: float) -> np.ndarray:
    """(n,) bool: the row belongs to the part. A row without a hash (a bad image) belongs to both.

    The same answer as `rows.is_heldout`, for all rows at once.
    """
    hashed = _differs(hashes, "")
    digits = "".join(pc.filter(hashes, pa.array(hashed)).to_pylist())
    numbers = np.frombuffer(bytes.fromhex(digits), dtype=">u8")
    limit = math.ceil(fraction * 16**16)  # a whole number is below a float just if it is below its ceiling
    inside = np.ones(len(hashed), dtype=bool)
    inside[hashed] = (numbers < np.uint64(limit)) == heldout
    return inside


@dataclass
class RlaifVConverter(DatasetConverter):
    """Converts a batch of rows, each with its image index and pair id, to LLaMA-Factory's standard format.

    `_prompt` holds the bare question: the template puts the image before it, so an `<image>` that a question
    or answer contains is text. `_images` holds a reference (see `image_store`). `_identity` carries the pair's
    identity: pair_id, row, dataset, source, question_type, image_hash, width, height, and its context.
    """

    name: str = "rlaif_v"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        converted = [self._convert(row) for row in _rows_of(batch)]
        return {key: [row[key] for row in converted] for key in converted[0]}

    def _convert(self, example: dict[str, Any]) -> dict[str, Any]:
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
                "pair_id": example["_pair_id"],
                "row": example["_row"],
                "dataset": self.name,
                "source": rows.source_of(example),
                "question_type": rows.question_type_of(example),
                "image_hash": example["_hash"],
                "width": example["_width"],
                "height": example["_height"],
                "context": rows.context_of(example),
            },
        }
