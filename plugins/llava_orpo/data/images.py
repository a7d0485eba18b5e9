"""Images as LLaVA reads them: their size from the header alone, their pixels as RGB.

LLaVA opens a file and calls `convert("RGB")` (load_image in llava/eval/run_llava.py, LazySupervisedDataset in
llava/train/train.py): it takes the first frame of an animation, drops alpha and does not apply EXIF rotation. This
module does the same with one exception: Pillow's own conversion of 16-bit greyscale ("I;16", "I") clips every value
above 255 to white; here those values keep their high byte, as Pillow does for 16-bit RGB.

Data is not trusted: only formats that Pillow decodes by itself are opened (EPS would start Ghostscript), an image of
more pixels than Pillow's limit (89 million, 358 MB as RGB) is refused by its header, and Pillow's own limits hold for
the texts inside a PNG (64 MB).
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

Source = bytes | str | os.PathLike
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


class ImageError(ValueError):
    """An image that cannot be read: missing, empty, of no known format, truncated, corrupt or a bomb."""


def header_size(source: Source) -> tuple[int, int]:
    """(width, height) in pixels, from the header; no pixel is decoded.

    Equals decode_rgb(source).size. EXIF rotation is not applied.

    Raises:
        ImageError: the header cannot be read, or announces more than Pillow's limit (89 million pixels).
    """
    with _opened(source) as image:
        return image.size


def decode_rgb(source: Source) -> Image.Image:
    """The image's (first frame's) pixels in mode RGB, at its own size.

    Raises:
        ImageError: as header_size, or the pixel data is truncated or corrupt.
    """
    with _opened(source) as image:
        image.load()
        if image.mode.startswith("I"):
            return _grey16(image).convert("RGB")
        return image.convert("RGB")


def verify(source: Source) -> None:
    """Decodes the whole (first) frame and throws it away.

    Raises:
        ImageError: as decode_rgb.
    """
    with _opened(source) as image:
        image.load()


def content_hash(data: bytes) -> str:
    """16 hex characters that name these bytes, the same on every machine (64-bit BLAKE2b)."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def reference_name(reference: str | bytes | dict) -> str:
    """A short name for an image reference of another LLaMA-Factory format: its path, or the hash of its bytes."""
    if isinstance(reference, dict):
        reference = reference["bytes"] if reference.get("bytes") is not None else reference["path"]
    return content_hash(reference) if isinstance(reference, bytes) else str(reference)


def grey_like(width: int, height: int) -> Image.Image:
    """A uniform mid-grey RGB image of this size: what a model is shown when the image is hidden from it."""
    return Image.new("RGB", (width, height), (128, 128, 128))


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    if source in (b"", ""):
        raise ImageError("the image is empty: no bytes, no path")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's error starts at twice its limit
            with Image.open(file, formats=_formats()) as image:
                yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise almost anything on damaged data
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ImageError(f"cannot read image ({name}): {reason}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _grey16(image: Image.Image) -> Image.Image:
    """Converts mode I;16 or I to L. Mode I comes from files of 16 or fewer bits: only values above 255 tell which."""
    values = np.asarray(image)
    if image.mode != "I" or values.max() > 255:
        values = values >> 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
