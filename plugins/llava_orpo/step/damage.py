"""Which damaged image a row is shown with in an epoch: the same on any process, worker and in a resumed run."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from ..data import damaged, images

TRIED = 8  # other rows whose image is looked at, where it can't be decoded
ONE_COLOUR = "the damaged image equals the true one"
NO_OTHER = "no other image of the data could be decoded"


@dataclass
class Damage:
    """Damages the images of the training set.

    kind  see `data.damaged.KINDS`
    seed  the recipe's
    rows  the training set, from which `other` takes images
    """

    kind: str
    seed: int
    rows: Any = None

    def of(self, row: dict[str, Any], picture: Image) -> tuple[Image | None, str]:
        """(the damaged image, "") or (None, why there is none) for a row in its epoch and its decoded image.

        All pairs of one image get the same damaged image in an epoch, whether they are in one group or not.
        """
        seed = f"{self.seed} {row['epoch']} {_name(row)}"
        other = self._other(row, seed) if self.kind == "other" else None
        if self.kind == "other" and other is None:
            return None, NO_OTHER
        made = damaged.damage(picture, self.kind, seed, other)
        return (None, ONE_COLOUR) if damaged.same(picture, made) else (made, "")

    def _other(self, row: dict[str, Any], seed: str) -> Image | None:
        """Another row's image, chosen by the seed; None if none can be decoded."""
        from ..data.image_store import load_image  # needs pyarrow and datasets, which the step itself does not

        start = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big") % len(self._names)
        tried, own = 0, _name(row)
        for step in range(len(self._names)):
            place = (start + step) % len(self._names)
            if self._names[place] in ("", own):
                continue
            try:
                return load_image(self.rows[place]["image"])
            except (images.ImageError, OSError):
                tried += 1
            if tried == TRIED:
                break
        return None

    @functools.cached_property
    def _names(self) -> list[str]:
        """The name of every row's image, "" where it has none."""
        from ..data.columns import values

        hashes = values(self.rows, "image_hash")
        if all(hashes):
            return hashes
        pairs = zip(hashes, values(self.rows, "image"), values(self.rows, "pair_id"), strict=True)
        return [
            "" if image is None else _name({"image_hash": name, "image": image, "pair_id": pair})
            for name, image, pair in pairs
        ]


def _name(row: dict[str, Any]) -> str:
    """A name of a row's image; rows of other LLaMA-Factory formats have neither its hash nor a pair id."""
    return row["image_hash"] or row["pair_id"] or images.reference_name(row["image"])
