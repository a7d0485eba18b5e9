"""images.py on every mode, on damaged data, and against plain Pillow as LLaVA uses it."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from helpers.drawn import examples
from llava_orpo.data.images import ImageError, content_hash, decode_rgb, grey_like, header_size, verify

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8))


def encode(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png(width, height, depth=8, color=0, data=b""):
    """A PNG made by hand: sizes and depths that Pillow does not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def rotated(fmt):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to view
    return encode(NOISE, fmt, exif=exif)


PLAIN = {
    "L": encode(NOISE.convert("L"), "PNG"),
    "1": encode(NOISE.convert("1"), "PNG"),
    "LA": encode(NOISE.convert("LA"), "PNG"),
    "P": encode(NOISE.convert("P"), "PNG"),
    "P transparent": encode(NOISE.convert("P"), "PNG", transparency=3),
    "RGB": encode(NOISE, "JPEG"),
    "RGBA": encode(NOISE.convert("RGBA"), "PNG"),
    "CMYK": encode(NOISE.convert("CMYK"), "JPEG"),
    "16-bit RGB": png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 0, 100)),
    "LAB": encode(Image.new("LAB", (5, 4), (99, 10, 200)), "TIFF"),
    "float": encode(NOISE.convert("F"), "TIFF"),
    "webp": encode(NOISE, "WEBP"),
    "bmp": encode(NOISE, "BMP"),
    "animated gif": encode(NOISE, "GIF", save_all=True, append_images=[ImageOps.invert(NOISE)]),
    "animated webp": encode(NOISE, "WEBP", save_all=True, append_images=[ImageOps.invert(NOISE)]),
    "EXIF rotation": rotated("JPEG"),
    "EXIF rotation, png": rotated("PNG"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_decoded_as_llava_does(name):
    data = PLAIN[name]
    ours, plain = decode_rgb(data), Image.open(io.BytesIO(data)).convert("RGB")
    assert ours.mode == "RGB" and ours.size == plain.size == header_size(data)
    assert np.array_equal(np.asarray(ours), np.asarray(plain))
    verify(data)


def test_exif_rotation_is_not_applied():
    assert header_size(PLAIN["EXIF rotation"]) == (50, 33)


def test_header_and_pixels_agree_on_a_rotated_tiff():
    # Pillow itself rotates TIFF; whatever it does, tokens (header) and pixels must be of one size.
    data = rotated("TIFF")
    assert header_size(data) == decode_rgb(data).size


RAMP = np.linspace(0, 65535, 64 * 48).reshape(48, 64)


@pytest.mark.parametrize(
    "name, image",
    [("I;16", Image.fromarray(RAMP.astype(np.uint16))), ("I", Image.fromarray(RAMP.astype(np.int32)))],
)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_high_byte(name, image, fmt):
    expected = (RAMP.astype(np.int64) >> 8).astype(np.uint8)
    pixels = np.asarray(decode_rgb(encode(image, fmt)))
    assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_grey_that_is_dark_throughout_stays_dark():
    """A file says that it has 16 bits, whatever its values: 255 of 65,535 is black."""
    image = Image.fromarray(np.full((8, 8), 255, dtype=np.uint16))
    data = encode(image, "PNG")
    assert Image.open(io.BytesIO(data)).mode == "I;16" and not np.asarray(decode_rgb(data)).any()


def test_mode_i_beyond_16_bits_is_clipped():
    values = np.array([[-5, 0, 255, 256, 65535, 65536, 2**31 - 1]], dtype=np.int32)
    pixels = np.asarray(decode_rgb(encode(Image.fromarray(values), "TIFF")))
    assert pixels[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_mode_i_of_eight_bit_values_is_left_alone():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    data = encode(Image.fromarray(values), "TIFF")
    assert Image.open(io.BytesIO(data)).mode == "I"
    assert np.array_equal(np.asarray(decode_rgb(data))[..., 0], values)
    values[0, 0] = 256  # the least value that 8 bits cannot hold: now all of them are of 16 bits
    pixels = np.asarray(decode_rgb(encode(Image.fromarray(values), "TIFF")))[..., 0]
    assert pixels[0, 0] == 1 and not pixels.ravel()[1:].any()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated_data_is_an_error(fmt):
    data = encode(NOISE, fmt)
    for end in (0, 1, 10, len(data) // 4, len(data) // 2):
        for read in (verify, decode_rgb):
            with pytest.raises(ImageError):
                read(data[:end])


def test_header_is_read_without_pixels():
    data = encode(NOISE, "JPEG")
    half = data[: len(data) // 2]
    assert header_size(half) == NOISE.size
    with pytest.raises(ImageError, match="truncated"):
        verify(half)


@examples(150)
@given(data=st.data(), fmt=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]))
def test_damaged_data_gives_an_image_or_an_image_error(data, fmt):
    damaged = bytearray(encode(NOISE, fmt))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_rgb(bytes(damaged)).size == header_size(bytes(damaged))
    except ImageError as error:
        assert error.__cause__ is not None and "cannot read image" in str(error)


@given(st.binary(max_size=64))
def test_any_bytes_give_an_image_error(data):
    with pytest.raises(ImageError):
        header_size(data)


def test_reasons(tmp_path):
    with pytest.raises(ImageError, match="empty"):
        header_size(b"")
    with pytest.raises(ImageError, match="no known image format"):
        header_size(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(ImageError, match="decompression bomb"):
        header_size(png(40000, 40000))
    with pytest.raises(ImageError, match="missing.jpg"):
        header_size(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match=r"pic.png\): broken"):
        data = bytearray(png(64, 64, data=bytes(65 * 64)))
        data[45] ^= 0xFF
        (tmp_path / "pic.png").write_bytes(data)
        verify(str(tmp_path / "pic.png"))


def test_path_and_bytes_are_the_same_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(PLAIN["RGB"])
    assert header_size(path) == header_size(str(path)) == (50, 33)
    assert decode_rgb(str(path)).tobytes() == decode_rgb(PLAIN["RGB"]).tobytes()


def test_decoded_image_outlives_its_file(tmp_path):
    path = tmp_path / "a.png"
    NOISE.save(path)
    image = decode_rgb(path)
    path.unlink()
    assert image.getpixel((0, 0)) == NOISE.getpixel((0, 0))


def test_pillow_is_left_as_it_was():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False and Image.MAX_IMAGE_PIXELS == 89478485


def test_content_hash():
    assert content_hash(b"abc") == "d8bb14d833d59559"
    assert len(content_hash(b"")) == 16 and content_hash(b"") != content_hash(b"\0")


def test_grey_like():
    image = grey_like(7, 3)
    assert image.mode == "RGB" and image.size == (7, 3) and set(image.getdata()) == {(128, 128, 128)}
