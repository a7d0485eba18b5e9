"""Datasets in parquet files whose images stay there (`image_storage: parquet`).

`datasets` turns a parquet file into an Arrow file on loading, images included. Here it is given the columns of texts
alone, and the images are read from the parquet files: once in order for the index (`ImageReader`), then one by one
through references (`image_store`). Files and their order are those that `datasets` would read, so the rows are the same
in the same order under either storage.
"""

from __future__ import annotations

import functools
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, load_dataset, load_dataset_builder
from huggingface_hub import snapshot_download

from ..errors import UserError
from . import image_store, parquet_pages

SUFFIX = ".parquet"
REMEDY = "Set `image_storage: arrow`, or write the dataset as parquet files"
LARGE_GROUP = 32 << 20  # bytes read for one image from which a run says so


@dataclass(frozen=True)
class HeldImages:
    """An image column that stays in parquet files."""

    column: str
    files: tuple[tuple[str, str, int], ...]  # path, `image_store.stamp_of` it, number of its first row in the dataset


def load(name: str, dataset_attr, model_args, data_args) -> tuple[Dataset, HeldImages | None]:
    """The texts of a registered dataset, and its images; None where no column of the files holds images' bytes.

    Raises UserError for a dataset that is not in parquet files, and for files that `datasets` did not read whole.
    """
    files = files_of(name, dataset_attr, model_args, data_args)
    schema = pq.read_schema(files[0])
    held = [field.name for field in schema if _holds_bytes(field.type)]
    texts = [column for column in schema.names if column not in held]
    if not texts:
        raise UserError(f"{name}: {files[0]} has no column of texts; a dataset of pairs has `question`, for example.")
    dataset = load_dataset(
        "parquet",
        data_files=files,
        split="train",
        columns=texts,
        cache_dir=model_args.cache_dir,
        num_proc=data_args.preprocessing_num_workers,
    )
    column = dataset_attr.images or "image"
    if column not in held:
        return dataset, None
    places, rows = [], 0
    for file in files:
        places.append((file, image_store.stamp_of(file), rows))
        rows += pq.read_metadata(file).num_rows
    if rows != len(dataset):
        raise UserError(
            f"{name}: its parquet files have {rows} rows, and the cached texts of `datasets` {len(dataset)}: a file "
            "was changed without a new time of change. `touch` the files, or remove the cache."
        )
    return dataset, HeldImages(column, tuple(places))


def files_of(name: str, dataset_attr, model_args, data_args) -> list[str]:
    """The parquet files of a registered dataset, in the order in which `datasets` reads them."""
    split = dataset_attr.split or "train"
    if dataset_attr.load_from == "file":
        place = os.path.join(data_args.dataset_dir, dataset_attr.dataset_name)
        # os.listdir's order, which is not sorted: LLaMA-Factory gives it to `datasets`
        files = [os.path.join(place, file) for file in os.listdir(place)] if os.path.isdir(place) else [place]
        strange = [file for file in files if not (file.endswith(SUFFIX) and os.path.isfile(file))]
        if strange or not files:
            raise UserError(f"image_storage: parquet: {name}: {(strange or [place])[0]} is no parquet file. {REMEDY}.")
        found = {"train": files}
    else:
        found = _resolved(name, _folder(name, dataset_attr, model_args, data_args), dataset_attr, model_args)
    if split not in found:
        raise UserError(
            f"image_storage: parquet: {name}: `split: {split}` is none of its splits ({', '.join(found)}), and a part "
            "of a split cannot be cut out. Name one of them, with max_samples or num_samples to take fewer rows."
        )
    return [os.path.abspath(file) for file in found[split]]


def _folder(name: str, dataset_attr, model_args, data_args) -> str:
    """The folder of a dataset that `datasets` would look at: local, or the Hub's files in the Hub's cache.

    huggingface_hub takes what it has in its cache when it is offline.
    """
    if dataset_attr.load_from == "hf_hub":
        below = f"{dataset_attr.folder.strip('/')}/" if dataset_attr.folder else ""
        wanted = [f"{below}*{SUFFIX}", "README.md"]  # `*` goes through folders; README.md names the subsets
        try:
            return snapshot_download(
                dataset_attr.dataset_name, repo_type="dataset", allow_patterns=wanted, token=model_args.hf_hub_token
            )
        except OSError as error:  # of the network, of the Hub's answers, of an empty cache
            raise UserError(
                f"{name}: {dataset_attr.dataset_name} was not got from the Hub ({' '.join(str(error).split())}). "
                "Check the name, the network and the token (`hf_hub_token`)."
            ) from error
    place = os.path.join(data_args.dataset_dir, dataset_attr.dataset_name)
    if dataset_attr.load_from != "script" or not os.path.isdir(place):
        raise UserError(
            f"image_storage: parquet: {name}: only local files (`file_name`) and datasets of the Hugging Face Hub "
            f"(`hf_hub_url`) are read as parquet. {REMEDY} and register them with `file_name`."
        )
    return place


def _resolved(name: str, folder: str, dataset_attr, model_args) -> dict[str, list[str]]:
    """{split: its files}, as `datasets` finds them: by the folder's README.md, or by the names of the files."""
    try:
        builder = load_dataset_builder(
            folder, name=dataset_attr.subset, data_dir=dataset_attr.folder, cache_dir=model_args.cache_dir
        )
    except (FileNotFoundError, ValueError) as error:  # datasets' errors of lacking files, subsets and splits
        raise UserError(
            f"image_storage: parquet: {name}: no parquet files in {folder} ({' '.join(str(error).split())}). {REMEDY}."
        ) from error
    found = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
    strange = [file for files in found.values() for file in files if not file.endswith(SUFFIX)]
    if strange or not found:
        raise UserError(f"image_storage: parquet: {name}: {(strange or [folder])[0]} is no parquet file. {REMEDY}.")
    return found


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class ImageReader:
    """The images of a file in order, with one page of it in memory, and the reference of each.

    Going back, or forward by more than the current row group, starts at the row group of the row wanted.
    """

    def __init__(self, file: str, stamp: str, column: str):
        self.file, self.stamp, self.column = file, stamp, column
        self.parquet = image_store.open_parquet(file, stamp)
        counts = [self.parquet.metadata.row_group(g).num_rows for g in range(self.parquet.num_row_groups)]
        self.starts = [sum(counts[:group]) for group in range(len(counts))]
        features = Features.from_arrow_schema(self.parquet.schema_arrow)
        kind = self.parquet.schema_arrow.field(column).type
        self.path = f"{column}.bytes" if pa.types.is_struct(kind) else column
        self.is_plain_image = not pa.types.is_struct(kind) and isinstance(features[column], Image)
        with open(file, "rb") as f:
            self.mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.next_row, self.values = -1, iter(())
        self.group, self.places = -1, {}

    def rows(self, first: int, count: int) -> list[Any]:
        """The cells of rows first … first + count - 1 as {bytes, path}."""
        if first != self.next_row:
            group = bisect_right(self.starts, first) - 1
            self.values, self.next_row = self._values_from(group), self.starts[group]
        while self.next_row < first:
            next(self.values)
            self.next_row += 1
        self.next_row += count
        return [next(self.values) for _ in range(count)]

    def _values_from(self, group: int) -> Iterator[Any]:
        groups = list(range(group, self.parquet.num_row_groups))
        batches = self.parquet.iter_batches(16, row_groups=groups, columns=[self.column], use_threads=False)
        for batch in batches:
            for value in batch.column(0):
                cell = value.as_py()
                yield {"bytes": cell, "path": None} if self.is_plain_image and isinstance(cell, bytes) else cell

    def reference(self, row: int, data: Any) -> str:
        """The reference of a row whose cell holds `data`; with the place of the bytes if they can be read alone."""
        group = bisect_right(self.starts, row) - 1
        if group != self.group:
            self.group = group
            self.places = parquet_pages.locate(self.mapped, self.parquet, group, self.path)
        place = self.places.get(parquet_pages.key_of(data)) if isinstance(data, bytes) else None
        where = (self.file, self.column, self.stamp, group, row - self.starts[group])
        made = image_store.parquet_reference(*where, place)
        if place is not None and not self._gives(made, data):
            return image_store.parquet_reference(*where, None)
        return made

    @staticmethod
    def _gives(reference: str, data: bytes) -> bool:
        """False for two values of one length and checksum, and for an encoder of another kind."""
        try:
            return image_store.read(reference) == data
        except OSError:
            return False


@functools.lru_cache(maxsize=1)
def reader(file: str, stamp: str, column: str) -> ImageReader:
    """The reader of a file, kept from batch to batch of a pass over its rows."""
    return ImageReader(file, stamp, column)


def by_file(files: Sequence[tuple[str, str, int]], rows: Sequence[int]) -> Iterator[tuple[str, str, int, int]]:
    """(file, stamp, first row in it, number of rows) for consecutive rows of the dataset that may cross files."""
    starts = [first for *_, first in files]
    row, end = rows[0], rows[0] + len(rows)
    while row < end:
        number = bisect_right(starts, row) - 1
        stop = min(end, starts[number + 1] if number + 1 < len(files) else end)
        yield files[number][0], files[number][1], row - starts[number], stop - row
        row = stop


def largest_group(held: HeldImages) -> int:
    """Bytes of the image column in the largest row group of the files."""
    sizes = [0]
    for file, *_ in held.files:
        metadata = pq.read_metadata(file)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks = map(group.column, range(group.num_columns))
            own = (c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == held.column)
            sizes.append(sum(own))
    return max(sizes)
