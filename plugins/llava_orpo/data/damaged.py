"""Damaged images: what the chosen answer is scored under beside the true image.

A damaged image has the size of the true one, so that it takes as many tokens. What it looks like follows from the
picture, the kind and a text alone (the collator's text holds the pair, the epoch and the seed): a resumed run damages
as the first one did. The random numbers are those of NumPy's legacy generator, whose streams are frozen (NEP 19).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image

from .images import grey_like

KINDS = ("masked", "crop", "grey", "noise", "other")
GREY = 128
MASKED_SHARE = 0.75  # of the patches: MAE's share (arXiv 2111.06377), at which little but rough shapes is left
PATCHES = 24  # along the longer side: CLIP's at 336 pixels, so that a masked patch is about one of the overview's
CROP_AREA = (0.01, 0.20)  # of the picture: mDPO (arXiv 2406.11839) crops "0-20%" of it, here never nothing
NOISE_SIDE = 336  # pixels of noise along the longer side; finer noise is averaged to grey where the image is resized


def damage(picture: Image.Image, kind: str, seed: str, other: Image.Image | None = None) -> Image.Image:
    """A new image of mode RGB and of the picture's size; the picture, of mode RGB, is left as it is.

    masked: three quarters of its patches, 24 along the longer side, are mid-grey (128, 128, 128).
    crop: a random part of its shape and of 1 to 20 % of its area, enlarged to its size (the area is rounded to whole
        pixels, at least one).
    grey: mid-grey, as in the evaluation with the image hidden (`images.grey_like`).
    noise: every pixel random; above 336 pixels along the longer side the pixels are repeated.
    other: the image `other`, resized to the picture's size.

    Raises:
        ValueError: the kind is unknown, or it is "other" and there is no other image.
    """
    if kind not in KINDS:
        raise ValueError(f"damaged_image: {kind} is not one of {', '.join(KINDS)}")
    if kind == "grey":
        return grey_like(*picture.size)
    if kind == "other":
        if other is None:
            raise ValueError("damaged_image: other needs another row's image")
        return other.convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
    random = np.random.RandomState(np.frombuffer(hashlib.blake2b(f"{kind}\n{seed}".encode()).digest(), np.uint32))
    return {"masked": _masked, "crop": _cropped, "noise": _noise}[kind](picture, random)


def same(picture: Image.Image, damaged: Image.Image) -> bool:
    """Whether nothing was damaged: every pixel is as it was, as in the crop of a picture of one colour."""
    return picture.size == damaged.size and np.array_equal(np.asarray(picture), np.asarray(damaged))


def _masked(picture: Image.Image, random: np.random.RandomState) -> Image.Image:
    width, height = picture.size
    patch = math.ceil(max(width, height) / PATCHES)
    columns, rows = math.ceil(width / patch), math.ceil(height / patch)
    hidden = np.zeros(rows * columns, dtype=bool)
    hidden[random.permutation(hidden.size)[: math.ceil(MASKED_SHARE * hidden.size)]] = True
    hidden = hidden.reshape(rows, columns).repeat(patch, 0).repeat(patch, 1)[:height, :width]
    pixels = np.array(picture)
    pixels[hidden] = GREY
    return Image.fromarray(pixels)


def _cropped(picture: Image.Image, random: np.random.RandomState) -> Image.Image:
    width, height = picture.size
    side = math.sqrt(random.uniform(*CROP_AREA))
    part_width, part_height = max(1, round(side * width)), max(1, round(side * height))
    left, top = random.randint(width - part_width + 1), random.randint(height - part_height + 1)
    part = picture.crop((left, top, left + part_width, top + part_height))
    return part.resize(picture.size, Image.Resampling.BICUBIC)


def _noise(picture: Image.Image, random: np.random.RandomState) -> Image.Image:
    width, height = picture.size
    shrink = min(1.0, NOISE_SIDE / max(width, height))
    shape = max(1, round(shrink * height)), max(1, round(shrink * width)), 3
    noise = Image.fromarray(random.randint(0, 256, shape).astype(np.uint8))
    return noise.resize(picture.size, Image.Resampling.NEAREST)
