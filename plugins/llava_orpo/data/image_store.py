"""References to images, so that no pass over a dataset writes the images again.

`datasets.map` writes every column it returns. For RLAIF-V (about 160 kB per image, 83,132 rows) that would be some
13 GB per pass. So rows carry a short string instead, and the original bytes are read where they are needed (in the
dataloader's workers) from the one Arrow copy that `datasets` makes on loading:

    arrow:<Arrow file>#<column>#<row>      an image inside a memory-mapped Arrow file
    <path>                                 an image file
"""

from __future__ import annotations

import functools
import os

from datasets import Dataset, Image
from PIL.Image import Image as PILImage

from . import images

ARROW = "arrow:"


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


def undecoded(dataset: Dataset, column: str) -> Dataset:
    """The dataset with its image column as {bytes, path}: the original bytes, never a decoded picture."""
    if isinstance(dataset.features[column], Image):
        return dataset.cast_column(column, Image(decode=False))
    return dataset


def read(reference: str | bytes | dict) -> str | bytes:
    """The image behind a reference: its original bytes, or the path of its file.

    Accepts what LLaMA-Factory passes around too: bytes, a path, or `{bytes, path}`.
    """
    if isinstance(reference, dict):
        return reference["bytes"] if reference.get("bytes") is not None else reference["path"]
    if isinstance(reference, str) and reference.startswith(ARROW):
        file, column, row = reference[len(ARROW) :].rsplit("#", 2)
        return read(_open_arrow(file, column)[int(row)][column])
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
