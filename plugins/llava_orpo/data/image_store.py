"""References to images, so that no pass over a dataset writes the images again.

`datasets.map` writes every column it returns. For RLAIF-V (about 160 kB per image, 83,132 rows) that would be some
13 GB per pass. So rows carry a short string instead, and the original bytes are read where they are needed (in the
dataloader's workers) from the one Arrow copy that `datasets` makes on loading, or, under `image_storage: parquet`, from
the parquet files themselves:

    arrow:<Arrow file>#<column>#<row>      an image inside a memory-mapped Arrow file
    parquet:<file>#<column>#<stamp>#<row group>#<row in it>#<place>
                                           an image inside a parquet file; place: see `parquet_pages.Place`, or empty
    <path>                                 an image file

What a process keeps open of parquet files, and of the row groups of images without a place, is bounded.
"""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, List
from PIL.Image import Image as PILImage

from . import images
from .parquet_pages import Place

ARROW = "arrow:"
PARQUET = "parquet:"
OWN = (ARROW, PARQUET)  # what a path in a data file must not begin with
TOO_MANY = "{} images: LLaVA-1.6 was trained with one image per conversation"
GROUPS_BYTES = 256 << 20  # unpacked row groups that a process keeps; the last one stays whatever its size


def arrow_reference(file: str, column: str, row: int) -> str:
    """The reference string of `column[row]` in an Arrow file."""
    return f"{ARROW}{file}#{column}#{row}"


@functools.lru_cache(maxsize=64)
def _open_arrow(file: str, column: str) -> Dataset:
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"{file} is gone: the datasets cache was moved or cleaned after the data was tokenized. "
            "Run again with `overwrite_cache: true` (and without `tokenized_path`)."
        )
    return undecoded(Dataset.from_file(file).select_columns([column]), column)


def parquet_reference(file: str, column: str, stamp: str, group: int, row: int, place: Place | None) -> str:
    """The reference string of a row of a row group, with the place of its bytes if it is known."""
    return f"{PARQUET}{file}#{column}#{stamp}#{group}#{row}#{place or ''}"


def stamp_of(file: str) -> str:
    """The size and the time of the last change of a file, as a reference names them."""
    state = os.stat(file)
    return f"{state.st_size}-{state.st_mtime_ns}"


def _refuse_changed(file: str, stamp: str) -> None:
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"{file} is gone: it was moved or removed after its images were listed. Put it back; with "
            "`image_storage: parquet` the images are read from it."
        )
    if stamp_of(file) != stamp:
        raise OSError(f"{file} was changed after its images were listed. Start again: they are then listed anew.")


@functools.lru_cache(maxsize=64)
def open_parquet(file: str, stamp: str) -> pq.ParquetFile:
    """An open parquet file, if it is still the one that the stamp names. Raises OSError."""
    _refuse_changed(file, stamp)
    return pq.ParquetFile(file, memory_map=True, pre_buffer=False)


class _Open:
    """A file descriptor that is closed with its last owner."""

    def __init__(self, file: str):
        self.number = os.open(file, os.O_RDONLY)

    def __del__(self):
        os.close(self.number)


@functools.lru_cache(maxsize=64)
def _opened(file: str, stamp: str) -> _Open:
    _refuse_changed(file, stamp)
    return _Open(file)


_groups: OrderedDict[tuple[str, str, str, int], pa.ChunkedArray] = OrderedDict()


def _row_group(file: str, column: str, stamp: str, group: int) -> pa.ChunkedArray:
    """The images of a row group: from memory, or read and unpacked whole, which is what pyarrow can do."""
    key = (file, column, stamp, group)
    found = _groups.pop(key, None)
    if found is None:
        # no threads: a forked worker would wait for those of its parent
        found = open_parquet(file, stamp).read_row_group(group, columns=[column], use_threads=False).column(0)
        while _groups and found.nbytes + sum(array.nbytes for array in _groups.values()) > GROUPS_BYTES:
            _groups.popitem(last=False)
    _groups[key] = found
    return found


def _parquet_cell(reference: str) -> Any:
    """What the file holds behind a reference: bytes, or {bytes, path}. Raises OSError."""
    file, column, stamp, group, row, place = reference[len(PARQUET) :].rsplit("#", 5)
    try:
        if place:
            return Place.parse(place).read(_opened(file, stamp).number)
        return _row_group(file, column, stamp, int(group))[int(row)].as_py()
    except pa.ArrowException as error:
        raise OSError(f"{file}: row group {group} cannot be read ({error})") from error


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its images as {bytes, path}, or lists of it: the original bytes, never a decoded picture."""
    kind = dataset.features[column]
    if isinstance(kind, Image):
        return dataset.cast_column(column, Image(decode=False))
    if isinstance(kind, List) and isinstance(kind.feature, Image):
        return dataset.cast_column(column, List(Image(decode=False)))
    return dataset


def read(reference: str | bytes | dict | list) -> str | bytes:
    """The image behind a reference: its original bytes, or the path of its file.

    Accepts what LLaMA-Factory passes around too: bytes, a path, or `{bytes, path}`, and a list of one of these.
    """
    if isinstance(reference, list):
        (reference,) = reference
    if isinstance(reference, dict):
        return reference["bytes"] if reference.get("bytes") is not None else reference["path"]
    if isinstance(reference, str) and reference.startswith(ARROW):
        file, column, row = reference[len(ARROW) :].rsplit("#", 2)
        return read(_open_arrow(file, column)[int(row)][column])
    if isinstance(reference, str) and reference.startswith(PARQUET):
        return read(_parquet_cell(reference))
    return reference


def read_bytes(reference: str | bytes | dict) -> bytes:
    """The original bytes behind a reference. Raises OSError when a file can't be read."""
    source = read(reference)
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as f:
        return f.read()


def load_image(image) -> PILImage:
    """An RGB picture from a reference, bytes, a path, `{bytes, path}`, a file object or a PIL picture."""
    if isinstance(image, PILImage):
        return image if image.mode == "RGB" else image.convert("RGB")
    if hasattr(image, "read"):
        image = image.read()
    return images.decode_rgb(read(image))


def image_size(image) -> tuple[int, int]:
    """(width, height) without decoding pixels."""
    if isinstance(image, PILImage):
        return image.size
    if hasattr(image, "read"):
        position = image.tell()
        size = images.header_size(image.read())
        image.seek(position)
        return size
    return images.header_size(read(image))


def name_of(reference: str | bytes | dict) -> str | None:
    """The file name that the dataset gives an image, or that of its file; None where the image has none."""
    if isinstance(reference, str) and reference.startswith(ARROW):
        file, column, row = reference[len(ARROW) :].rsplit("#", 2)
        return name_of(_open_arrow(file, column)[int(row)][column])
    if isinstance(reference, str) and reference.startswith(PARQUET):
        file, column, stamp, group, row, _ = reference[len(PARQUET) :].rsplit("#", 5)
        table = open_parquet(file, stamp).read_row_group(int(group), columns=[f"{column}.path"], use_threads=False)
        return name_of(table.column(0)[int(row)].as_py() or {}) if table.num_columns else None
    if isinstance(reference, dict):
        reference = reference.get("path") or ""
    return (os.path.basename(reference) or None) if isinstance(reference, str) else None
