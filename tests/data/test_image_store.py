"""data/image_store.py: every kind of reference leads to the original bytes, and sizes need no pixels."""

from __future__ import annotations

import io

import pytest
from datasets import Dataset, Features, Image, Value
from datasets.arrow_writer import ArrowWriter
from PIL import Image as Pillow

from llava_orpo.data import image_store, images


def encoded(width: int, height: int, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Pillow.new(mode, (width, height)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def arrow(tmp_path):
    """An Arrow file with the images 3x5 (bytes) and 7x2 (a path) in its column `picture`, and a text column."""
    (tmp_path / "second.png").write_bytes(encoded(7, 2))
    cells = [{"bytes": encoded(3, 5), "path": None}, {"bytes": None, "path": str(tmp_path / "second.png")}]
    file = str(tmp_path / "table#1.arrow")
    with ArrowWriter(path=file, features=Features({"picture": Image(decode=False), "text": Value("string")})) as writer:
        writer.write({"picture": cells[0], "text": "a"})
        writer.write({"picture": cells[1], "text": "b"})
        writer.finalize()
    return file


def test_an_arrow_reference_leads_to_its_row(arrow, tmp_path):
    first, second = (image_store.arrow_reference(arrow, "picture", row) for row in (0, 1))
    assert first == f"arrow:{arrow}#picture#0"  # a "#" in the file's name is no separator
    assert image_store.read(first) == image_store.read_bytes(first) == encoded(3, 5)
    assert image_store.read(second) == str(tmp_path / "second.png")
    assert image_store.read_bytes(second) == encoded(7, 2)
    assert image_store.image_size(first) == image_store.load_image(first).size == (3, 5)
    assert image_store.image_size(second) == image_store.load_image(second).size == (7, 2)


def test_an_arrow_file_that_is_gone_says_what_to_do(tmp_path):
    reference = image_store.arrow_reference(str(tmp_path / "gone.arrow"), "picture", 0)
    with pytest.raises(FileNotFoundError, match="gone.arrow is gone.*overwrite_cache: true"):
        image_store.read(reference)


def test_bytes_paths_cells_files_and_pictures_are_the_same_image(tmp_path):
    data, path = encoded(4, 6, "L"), tmp_path / "image.png"
    path.write_bytes(data)
    sources = [data, str(path), {"bytes": data, "path": "elsewhere.png"}, {"bytes": None, "path": str(path)}]
    sources += [{"path": str(path)}]
    for source in sources:
        assert image_store.read_bytes(source) == data
        assert image_store.image_size(source) == (4, 6)
        picture = image_store.load_image(source)
        assert (picture.mode, picture.size) == ("RGB", (4, 6))
    with open(path, "rb") as file:
        assert image_store.image_size(file) == (4, 6)
        assert image_store.load_image(file).size == (4, 6)  # from the start: the size left the file as it was
    grey = Pillow.new("L", (4, 6), 9)
    assert image_store.image_size(grey) == (4, 6)
    assert image_store.load_image(grey).getcolors() == [(24, (9, 9, 9))]
    rgb = Pillow.new("RGB", (1, 1))
    assert image_store.load_image(rgb) is rgb
    with pytest.raises(images.ImageError):
        image_store.load_image({"bytes": b"", "path": str(path)})  # empty bytes are the image, not the lack of one


def test_undecoded_leaves_other_columns_alone(arrow):
    table = Dataset.from_file(arrow).cast_column("picture", Image())
    plain = image_store.undecoded(table, "picture")
    assert plain[0]["picture"]["bytes"] == encoded(3, 5) and plain.column_names == table.column_names
    assert image_store.undecoded(plain, "text").features["text"] == Value("string")
