"""damaged.py: of the true size, repeatable, and damaged as it says."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers.drawn import examples
from llava_orpo.data.damaged import KINDS, damage, same
from llava_orpo.data.images import grey_like


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ramp(width, height):
    """Red says how far to the right a pixel is, green how far down."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 97), (97, 1), (13, 17), (336, 336), (641, 479)])
def test_of_the_true_size_repeatable_and_the_picture_is_left_alone(kind, size):
    picture, other = noise(*size), noise(7, 5, 1)
    before = picture.tobytes()
    damaged = damage(picture, kind, "a", other)
    assert damaged.size == size and damaged.mode == "RGB" and picture.tobytes() == before
    assert damage(picture.copy(), kind, "a", other.copy()).tobytes() == damaged.tobytes()
    if min(size) > 1:
        assert not same(picture, damaged)
        differs = damage(picture, kind, "b", other).tobytes() != damaged.tobytes()
        assert differs == (kind in ("masked", "crop", "noise"))


@examples(40)
@given(st.integers(1, 200), st.integers(1, 200), st.text(max_size=8))
def test_masked_hides_three_quarters_of_the_patches_and_nothing_else(width, height, seed):
    picture = Image.new("RGB", (width, height), (1, 2, 3))
    damaged = np.asarray(damage(picture, "masked", seed))
    side = -(-max(width, height) // 24)
    cells = [
        damaged[top : top + side, left : left + side].reshape(-1, 3)
        for top, left in itertools.product(range(0, height, side), range(0, width, side))
    ]
    hidden = [bool((cell == 128).all()) for cell in cells]
    assert all(h or (cell == (1, 2, 3)).all() for h, cell in zip(hidden, cells, strict=True))
    assert sum(hidden) == -(-3 * len(cells) // 4)


def test_crop_shows_a_part_of_one_to_twenty_percent_in_the_pictures_shape():
    picture = ramp(500, 400)
    areas, corners = [], set()
    for number in range(300):
        shown = np.asarray(damage(picture, "crop", f"pair {number}")).astype(float)
        right, down = (np.ptp(shown[..., channel]) / 255 for channel in (0, 1))
        assert right == pytest.approx(down, abs=0.02)  # the shape is kept, nothing is squeezed
        areas.append(right * down)
        corners.add((shown[..., 0].min() > 127, shown[..., 1].min() > 127))
    # the ramp's values are rounded to 1 / 255 and the ends of an enlarged part are smoothed
    assert 0.004 < min(areas) < 0.03 and 0.17 < max(areas) < 0.21
    assert np.mean(areas) == pytest.approx(0.105, abs=0.012)  # uniform in area
    assert len(corners) == 4  # from everywhere


def test_grey_is_the_evaluations():
    assert same(damage(noise(31, 20), "grey", "a"), grey_like(31, 20))


def test_noise_keeps_nothing_of_the_picture():
    picture = ramp(640, 480)
    values = np.asarray(damage(picture, "noise", "a")).astype(float)
    assert values.mean() == pytest.approx(127.5, abs=1) and values.std() == pytest.approx(73.9, abs=1)
    assert abs(np.corrcoef(values[..., 0].ravel(), np.asarray(picture)[..., 0].ravel())[0, 1]) < 0.02
    # what the model sees of a large image is noise too, no even grey
    large = damage(Image.new("RGB", (2000, 1500)), "noise", "a").resize((336, 252), Image.Resampling.BICUBIC)
    assert np.asarray(large).std() > 40  # noise of single pixels would give 10


def test_other_is_the_other_image():
    other = noise(64, 48, 1)
    damaged = damage(noise(32, 40), "other", "a", other)
    assert same(damaged, other.resize((32, 40), Image.Resampling.BICUBIC))
    assert damage(noise(3, 3), "other", "a", other.convert("L")).mode == "RGB"


def test_a_picture_in_which_nothing_can_be_damaged_is_seen():
    flat, grey = Image.new("RGB", (40, 30), (90, 10, 200)), grey_like(40, 30)
    assert same(flat, damage(flat, "crop", "a"))
    assert all(same(grey, damage(grey, kind, "a")) for kind in ("masked", "crop", "grey"))
    assert same(flat, damage(flat, "other", "a", flat.resize((5, 5))))
    assert not same(flat, damage(flat, "grey", "a")) and not same(flat, damage(flat, "masked", "a"))
    assert not same(flat, flat.resize((30, 40)))


def test_the_same_damage_on_every_machine():
    """Pinned, so that a run resumed under another NumPy sees what it saw."""
    picture = ramp(60, 40)
    found = {k: hashlib.sha256(damage(picture, k, "p1/0/42").tobytes()).hexdigest()[:12] for k in ("masked", "noise")}
    assert found == {"masked": "37049f9f5e68", "noise": "c9401449d2fb"}


def test_wrong_kinds_are_refused():
    with pytest.raises(ValueError, match="masked, crop, grey, noise, other"):
        damage(noise(4, 4), "blurred", "a")
    with pytest.raises(ValueError, match="another row's image"):
        damage(noise(4, 4), "other", "a")
