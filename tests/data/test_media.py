"""Which image files a row may name: data/media.py, data/other_formats.py and the reading of both kinds of datasets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, Image, List, Value

from helpers.recipes import photo_rows, tokenized, write_rows
from helpers.serving import picture, png
from llava_orpo.data import media
from llava_orpo.data.other_formats import leave_out_strange_paths, problem_of
from llava_orpo.data.rlaif_v import index_images
from llava_orpo.errors import UserError


def attribute(name: str = "rows.jsonl", load_from: str = "file", images: str = "images"):
    return SimpleNamespace(dataset_name=name, load_from=load_from, images=images)


def arguments(folder: Path, media_dir: Path | None = None):
    return SimpleNamespace(dataset_dir=str(folder), media_dir=str(media_dir) if media_dir else None)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """data/ (with sub/), media/ and work/ (the working directory) with an image each, and one in private/."""
    for name in ("data/sub", "media", "work", "private"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"{Path(name).name}.png").write_bytes(png(picture(20, 10)))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_the_three_folders_are_looked_in_and_no_other(places):
    folders = media.folders_of(attribute("sub/rows.jsonl"), arguments(places / "data", places / "media"))
    assert folders == [str(places / name) for name in ("media", "data/sub", "work")]
    for name, place in (("media.png", "media"), ("sub.png", "data/sub"), ("work.png", "work")):
        assert media.find_file(name, folders) == str(places / place / name)
    assert media.find_file(str(places / "work" / "work.png"), folders) == str(places / "work" / "work.png")
    assert media.find_file("../data/sub/sub.png", folders) == str(places / "data/sub/sub.png")  # ends inside
    for path in ("../private/private.png", str(places / "private/private.png"), "../../private/private.png"):
        with pytest.raises(OSError, match=f"outside the folders .*set `media_dir: {places / 'private'}` if"):
            media.find_file(path, folders)
    for path in ("/etc/passwd", "../../../../../../../../etc/passwd", str(places), "..", "/"):
        with pytest.raises(OSError, match="outside the folders"):
            media.find_file(path, folders)
    for path in ("none.png", ".", "", "media.png/x", "x" * 5000):
        with pytest.raises(OSError, match="not found in"):
            media.find_file(path, folders)
    for path in ("a\0.png", "\udc00.png"):
        with pytest.raises(OSError, match="cannot exist|not found"):
            media.find_file(path, folders)
    assert media.folders_of(attribute("sub"), arguments(places / "data"))[1] == str(places / "data/sub")


def test_a_neighbour_with_the_same_beginning_is_outside(places):
    (places / "media2").mkdir()
    (places / "media2" / "x.png").write_bytes(b"")
    with pytest.raises(OSError, match="outside the folders"):
        media.find_file("../media2/x.png", [str(places / "media")])


def test_links_are_resolved(places):
    inside, outside = places / "media" / "in.png", places / "media" / "out.png"
    inside.symlink_to(places / "work" / "work.png")
    outside.symlink_to(places / "private" / "private.png")
    (places / "media" / "folder").symlink_to(places / "private")
    (places / "media" / "loop.png").symlink_to(places / "media" / "loop.png")
    folders = [str(places / "media"), str(places / "work")]
    assert media.find_file("in.png", folders) == str(places / "work" / "work.png")
    for path in ("out.png", "folder/private.png"):
        with pytest.raises(OSError, match="outside the folders"):
            media.find_file(path, folders)
    with pytest.raises(OSError):
        media.find_file("loop.png", folders)
    (places / "linked").symlink_to(places / "media")  # the user's own folder may be a link
    own = media.folders_of(attribute(), arguments(places / "data", places / "linked"))
    assert media.find_file("media.png", own) == str(places / "media" / "media.png")


@pytest.mark.parametrize("load_from", ["hf_hub", "ms_hub", "om_hub", "cloud_file", "script"])
def test_no_path_of_a_dataset_from_a_hub_is_followed(places, load_from):
    folders = media.folders_of(attribute("name/repo", load_from), arguments(places / "data", places / "media"))
    assert folders == []
    with pytest.raises(OSError, match="no path of a dataset from a Hub is followed; download"):
        media.find_file("media.png", folders)
    values = ["media.png", {"bytes": None, "path": str(places / "media/media.png")}, {"bytes": png(picture(5, 4))}]
    index = index_images(
        {"image": values}, [0, 1, 2], column="image", file="f", media_dirs=folders, verify="header", version=0
    )
    assert [bool(problem) for problem in index["_problem"]] == [True, True, False] and index["_ref"][:2] == ["", ""]


def test_a_registry_from_a_hub_is_a_dataset_from_a_hub(places):
    assert media.folders_of(attribute(), SimpleNamespace(dataset_dir="REMOTE:a/b", media_dir=str(places))) == []


def test_bytes_that_are_text_are_no_path(places):
    value = {"bytes": str(places / "media/media.png"), "path": None}
    index = index_images(
        {"image": [value]}, [0], column="image", file="f", media_dirs=["."], verify="header", version=0
    )
    assert "holds str, not bytes" in index["_problem"][0]


def test_the_hub_rule_holds_in_a_run(tmp_path, monkeypatch):
    """The way of a Hub dataset, with the download replaced by a file."""
    import datasets
    from llamafactory.data import loader

    made = photo_rows(2, 1)
    (tmp_path / "x.jpg").write_bytes(made[1]["image"]["bytes"])
    made[1]["image"] = {"bytes": None, "path": str(tmp_path / "x.jpg")}
    write_rows(tmp_path, made)
    info = {"rows": {"hf_hub_url": "some/set", "formatting": "rlaif_v", "ranking": True}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    local = str(tmp_path / "rows.parquet")
    monkeypatch.setattr(
        loader, "load_dataset", lambda **_: datasets.load_dataset("parquet", data_files=[local], split="train")
    )
    train, _ = tokenized(tmp_path, {"max_skipped_fraction": 0.5})
    assert len(train) == 1
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert entry["row"] == 1 and "no path of a dataset from a Hub is followed" in entry["reason"]


def test_a_file_that_was_added_or_mended_is_read_again(tmp_path):
    row = {"question": "q", "chosen": "c", "rejected": "r"}
    rows = [{**row, "image": f"{i}.png"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {"rows": {"file_name": "rows.jsonl", "formatting": "rlaif_v", "ranking": True}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {"cache_dir": str(tmp_path / "cache"), "max_skipped_fraction": 0.9}
    (tmp_path / "0.png").write_bytes(png(picture(20, 10)))
    (tmp_path / "1.png").write_bytes(b"no image")
    assert tokenized(tmp_path, keys)[0]["row"] == [0]
    (tmp_path / "1.png").write_bytes(png(picture(30, 10)))
    (tmp_path / "2.png").write_bytes(png(picture(40, 10)))
    assert tokenized(tmp_path, keys)[0]["width"] == [20, 30, 40]


# LLaMA-Factory's own formats


def test_problems_of_other_formats(places):
    folders, own = [str(places / "media"), str(places / "work")], str(places / "media")
    for image in ("media.png", "work.png", "none.png", {"bytes": b"x", "path": "/etc/passwd"}, None, b"x"):
        assert problem_of(image, folders, own) == ""
    for image in ("../private/private.png", "/etc/passwd", {"bytes": None, "path": "/etc/passwd"}):
        assert "outside the folders" in problem_of(image, folders, own)
        assert "from a Hub" in problem_of(image, [], own)
    for own_reference in ("arrow:/etc/x.arrow#image#0", "parquet:/etc/passwd#image#9-9#0#0#0,9,0,0,9"):
        assert "not the path" in problem_of(own_reference, folders, own)
    assert "cannot exist" in problem_of("a\0", folders, own)
    assert "text" in problem_of({"bytes": "/etc/passwd", "path": None}, folders, own)
    assert "neither" in problem_of(5, folders, own)


@pytest.mark.parametrize("many", [False, True])
def test_embedded_images_of_other_formats_keep_their_bytes(places, many):
    good, bad = png(picture(8, 6)), {"bytes": None, "path": str(places / "private" / "private.png")}
    values = [{"bytes": good, "path": None}, bad, {"bytes": None, "path": str(places / "media" / "media.png")}]
    kind, plain = Image(), Image(decode=False)
    features = Features({"images": List(plain) if many else plain, "text": Value("string")})
    rows = {"images": [[value] for value in values] if many else values, "text": ["a", "b", "c"]}
    dataset = Dataset.from_dict(rows, features=features).cast_column("images", List(kind) if many else kind)
    kept, skipped = leave_out_strange_paths(dataset, attribute(), arguments(places / "data", places / "media"), "other")
    assert kept["text"] == ["a", "c"] and [entry["row"] for entry in skipped] == [1]
    first = kept[0]["images"][0] if many else kept[0]["images"]
    assert first["bytes"] == good
    none, skipped = leave_out_strange_paths(dataset, attribute(load_from="hf_hub"), arguments(places), "other")
    assert none["text"] == ["a"] and [entry["row"] for entry in skipped] == [1, 2]


def test_paths_of_alpaca_rows_are_confined(places):
    data = places / "data"
    rows = []
    for i, image in enumerate(["sub/sub.png", "../private/private.png", str(places / "private/private.png")]):
        text = {"instruction": f"<image>\nWhat is in picture {i}?", "input": "", "chosen": f"c{i}", "rejected": f"r{i}"}
        rows.append({**text, "images": [image]})
    (data / "other.json").write_text(json.dumps(rows))
    columns = {
        "prompt": "instruction",
        "query": "input",
        "images": "images",
        "chosen": "chosen",
        "rejected": "rejected",
    }
    info = {"other": {"file_name": "other.json", "ranking": True, "columns": columns}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset_dir": str(data), "dataset": "other", "output_dir": str(places / "out")}
    train, _ = tokenized(places, {**keys, "max_skipped_fraction": 0.7})
    assert [os.path.realpath(image) for image in train["image"]] == [str(data / "sub" / "sub.png")]
    listed = [json.loads(line) for line in (places / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in listed] == [1, 2]
    assert all("outside the folders" in entry["reason"] and "media_dir:" in entry["reason"] for entry in listed)
    with pytest.raises(UserError, match=r"2 of 3 pairs \(66.7%\)"):
        tokenized(places, keys)
    with pytest.raises(UserError, match=r"^dataset other.json, row 1: bad image: .*outside"):
        tokenized(places, {**keys, "bad_rows": "error"})
    more, _ = tokenized(places, {**keys, "media_dir": str(places / "private"), "max_skipped_fraction": 0.7})
    assert more["question"] == ["What is in picture 1?", "What is in picture 2?"]
