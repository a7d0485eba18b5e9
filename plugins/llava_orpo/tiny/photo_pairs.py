"""Preference pairs on real photographs, in RLAIF-V's schema."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from matplotlib import cbook
from PIL import Image as PILImage

SIZES = [(640, 480), (480, 640), (500, 375), (336, 336), (1024, 683), (768, 1024), (1280, 400), (300, 900)]
WORDS = (
    "the a small red woman man uniform flag ribbon jacket behind beside under light dark photograph smiling standing "
    "window table street old young white blue star stripe medal glasses hat hair near far left right two three several "
    "looks holds wears shows with and of on in is are not clearly large wooden bright background foreground person"
).split()
COLUMNS = ("ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path")


def sentence(rng: np.random.Generator, words: int) -> str:
    """Words that look English, of one or two tokens each."""
    return " ".join(rng.choice(WORDS, words)).capitalize() + "."


def photographs() -> list[PILImage.Image]:
    """The photographs and pictures in matplotlib's sample data, as RGB."""
    names = ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png", "logo2.png")
    return [PILImage.open(cbook.get_sample_data(name, asfileobj=False)).convert("RGB") for name in names]


def jpeg(photo: PILImage.Image, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """A random crop of the photograph with the wanted aspect ratio, resized to `size` (width, height)."""
    width, height = size
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.6, 1.0)
    w, h = max(1, int(width * scale)), max(1, int(height * scale))
    left, top = int(rng.integers(0, photo.width - w + 1)), int(rng.integers(0, photo.height - h + 1))
    out = io.BytesIO()
    photo.crop((left, top, left + w, top + h)).resize(size, PILImage.Resampling.LANCZOS).save(out, "JPEG", quality=92)
    return out.getvalue()


def rows(images: int, pairs_per_image: int, chosen_words: int, rejected_words: int, seed: int = 0, sizes=SIZES):
    """Rows in RLAIF-V's schema; sources and question types alternate."""
    rng = np.random.default_rng(seed)
    photos = photographs()
    out = []
    for i in range(images):
        data = jpeg(photos[0 if i % 4 else i % len(photos)], sizes[i % len(sizes)], rng)
        source = ("COCO", "VQAv2", "TextVQA", "GoogleLandmark")[i % 4]
        for k in range(pairs_per_image):
            kind = "detailed description" if (i + k) % 2 else "question answering"
            out.append(
                {
                    "ds_name": "photo-pairs",
                    "image": {"bytes": data, "path": f"{hashlib.sha1(data).hexdigest()[:12]}.jpg"},
                    "question": sentence(rng, 12) + " What is in the picture?",
                    "chosen": sentence(rng, chosen_words + int(rng.integers(0, 5))),
                    "rejected": sentence(rng, rejected_words + int(rng.integers(0, 5))),
                    "origin_dataset": source,
                    "origin_split": json.dumps({"model": "none", "type": kind}),
                    "idx": str(len(out)),
                    "image_path": "",
                }
            )
    return out


def write(path: Path, entries: list[dict]) -> Path:
    """Writes rows as parquet whose image column datasets knows as an Image."""
    features = Features({**{name: Value("string") for name in COLUMNS}, "image": Image(decode=False)})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(entries, features=features).cast_column("image", Image()).to_parquet(path)
    return path
