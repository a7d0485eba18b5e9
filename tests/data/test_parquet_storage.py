"""`image_storage: parquet`: the pairs of `arrow`, read from the parquet files, of which no image is copied."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from llamafactory.data.parser import DatasetAttr
from torch.utils.data import DataLoader

from helpers.recipes import build_trainer, photo_rows, tokenized, write_rows
from llava_orpo.arguments import PluginArguments
from llava_orpo.data import columns, image_store, images, parquet_pages, parquet_rows, rlaif_v
from llava_orpo.errors import UserError

PARQUET = {"image_storage": "parquet"}


def register(folder: Path, name: str = "rows", **entry) -> None:
    place = folder / "dataset_info.json"
    info = json.loads(place.read_text()) if place.exists() else {}
    info[name] = {"file_name": f"{name}.parquet", "formatting": "rlaif_v", "ranking": True, **entry}
    place.write_text(json.dumps(info))


def write_files(folder: Path, made: list[dict], files: int = 2, name: str = "rows", **how) -> list[dict]:
    """`made` as a folder of parquet files, and a dataset_info.json that registers it.

    Returns the rows in the order in which the folder lists its files, which LLaMA-Factory does not sort.
    """
    write_rows(folder, made, "whole")
    table = pq.read_table(folder / "whole.parquet")
    (folder / name).mkdir()
    edges = np.linspace(0, len(made), files + 1).astype(int)
    for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
        pq.write_table(table.slice(low, high - low), folder / name / f"{number}.parquet", **how)
    register(folder, name, file_name=name)
    return [row for file in os.listdir(folder / name) for row in made[edges[int(file[0])] : edges[int(file[0]) + 1]]]


def aligned(folder: Path, name: str = "rows", cache: Path | None = None):
    """The dataset's rows in LLaMA-Factory's format, without tokenizing, which takes seconds."""
    entry = json.loads((folder / "dataset_info.json").read_text())[name]
    hub = entry.get("hf_hub_url")
    attr = DatasetAttr("hf_hub" if hub else "file", dataset_name=hub or entry["file_name"])
    attr.join(entry)
    request = rlaif_v.read_request(name, entry, PluginArguments(**PARQUET))
    data_args = SimpleNamespace(dataset_dir=str(folder), media_dir=None, preprocessing_num_workers=None)
    model_args = SimpleNamespace(cache_dir=cache and str(cache), hf_hub_token=None)
    dataset, request.held = parquet_rows.load(name, attr, model_args, data_args)
    out = rlaif_v.align(dataset, attr, data_args, request)
    return out, request.skipped


def references(folder: Path, name: str = "rows") -> list[str]:
    return [pictures[0] for pictures in columns.values(aligned(folder, name)[0], "_images")]


def same_pairs(folder: Path, keys: dict):
    """The train and evaluation rows under `parquet`, after a comparison with those under `arrow`."""
    pairs = [tokenized(folder, {**keys, "image_storage": kind}) for kind in ("arrow", "parquet")]
    listed = (folder / "out" / "skipped_rows.jsonl").read_text() if (folder / "out").exists() else ""
    for arrow, parquet in zip(*pairs, strict=True):
        if arrow is None:
            assert parquet is None
            continue
        assert len(arrow) and arrow.column_names == parquet.column_names
        for column in set(arrow.column_names) - {"image"}:
            assert columns.values(arrow, column) == columns.values(parquet, column), column
        for one, other in zip(columns.values(arrow, "image"), columns.values(parquet, "image"), strict=True):
            assert other is None or other.startswith("parquet:") or os.path.isfile(other)
            assert one == other if one is None else image_store.read_bytes(one) == image_store.read_bytes(other)
    return *pairs[1], listed


def test_the_pairs_are_those_of_arrow_for_parts_filters_limits_and_bad_rows(tmp_path):
    made = photo_rows(24, 2)
    half = made[6]["image"]["bytes"]
    made[4]["image"] = None
    made[5]["chosen"] = None
    made[6]["image"] = {"bytes": half[: len(half) // 2], "path": None}
    made[7]["image"] = {"bytes": b"", "path": None}
    (tmp_path / "beside.jpg").write_bytes(half)
    made[8]["image"] = {"bytes": None, "path": "beside.jpg"}
    made[9]["image"] = {"bytes": None, "path": "/etc/passwd"}
    for row in made[20:30]:
        row["idx"] = None  # a pair id from the row's number
    listed_rows = write_files(tmp_path, made, files=3, row_group_size=5)
    register(tmp_path, "train", file_name="rows", llava_orpo={"part": "train"})
    register(tmp_path, "held", file_name="rows", llava_orpo={"part": "heldout", "filter": {"origin_dataset": "coco"}})
    keys = {"max_skipped_fraction": 0.5, "heldout_fraction": 0.4}
    rows, _, listed = same_pairs(tmp_path, keys)
    assert len(rows) == 48 - 5
    reasons = {entry["row"]: entry["reason"] for entry in map(json.loads, listed.splitlines())}
    bad = {listed_rows.index(made[number]): number for number in (4, 5, 6, 7, 9)}
    assert reasons.keys() == bad.keys()
    assert "/etc/passwd' is outside the folders" in reasons[listed_rows.index(made[9])]
    train, held, _ = same_pairs(tmp_path, {**keys, "dataset": "train", "eval_dataset": "held", "max_samples": 7})
    assert len(train) == 7 and set(held["source"]) == {"COCO"}
    same_pairs(tmp_path, {**keys, "allow_text_only": True, "dataset_filter": {"origin_split": "question answering"}})
    register(tmp_path, "few", file_name="rows", num_samples=5)
    assert len(same_pairs(tmp_path, {**keys, "dataset": "few,train"})[0]) > 5


HOW = {
    "snappy": {"row_group_size": 7},
    "one group": {"data_page_size": 20_000, "write_batch_size": 2},
    "plain": {"compression": "none", "use_dictionary": False},
    "second version": {"data_page_version": "2.0", "use_dictionary": False, "write_page_checksum": True},
    "no dictionary": {"use_dictionary": False, "write_statistics": True, "write_page_index": True},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_images_are_read_alone_from_the_usual_files(tmp_path, how, monkeypatch):
    made = photo_rows(9, 2)
    made[3]["image"] = None
    listed = write_files(tmp_path, made, **how)
    refs = references(tmp_path)
    assert len(refs) == 17 and not any(ref.endswith("#") for ref in refs)
    monkeypatch.setattr(image_store, "_row_group", None)  # no group is unpacked
    wanted = [row["image"]["bytes"] for row in listed if row["image"]]
    assert [image_store.read_bytes(ref) for ref in refs] == wanted


@pytest.mark.parametrize("how", [{"compression": "zstd"}, {"compression": "gzip"}, {"column_encoding": "delta"}])
def test_other_files_are_read_by_row_group_and_a_run_says_so(tmp_path, how, monkeypatch):
    said = []
    monkeypatch.setattr(parquet_rows, "LARGE_GROUP", 10_000)
    monkeypatch.setattr("llava_orpo.data.rlaif_v.logger.warning_rank0", said.append)
    if "column_encoding" in how:
        how = {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}
    listed = write_files(tmp_path, photo_rows(6, 2), row_group_size=3, **how)
    refs = references(tmp_path)
    assert all(ref.endswith("#") for ref in refs)
    assert [image_store.read_bytes(ref) for ref in refs] == [row["image"]["bytes"] for row in listed]
    assert len(said) == 1 and said[0].startswith("12 of 12 images can only be read with their whole row group")


def test_several_processes_make_the_same_index(tmp_path, monkeypatch):
    made = write_files(tmp_path, photo_rows(14, 1), files=3, row_group_size=3)
    monkeypatch.setattr(rlaif_v, "_processes", lambda *_: 3)  # as for thousands of rows
    assert [image_store.read_bytes(ref) for ref in references(tmp_path)] == [row["image"]["bytes"] for row in made]


def test_kept_row_groups_are_bounded(tmp_path, monkeypatch):
    made = write_files(tmp_path, photo_rows(12, 1), row_group_size=2, compression="zstd")
    refs = references(tmp_path)
    one_image = len(made[0]["image"]["bytes"])
    monkeypatch.setattr(image_store, "GROUPS_BYTES", 5 * one_image)
    image_store._groups.clear()
    order = [*range(12), *range(12)]
    random.Random(0).shuffle(order)
    for row in order:
        assert image_store.read_bytes(refs[row]) == made[row]["image"]["bytes"]
        assert sum(array.nbytes for array in image_store._groups.values()) < 8 * one_image
    assert len(image_store._groups) > 1


def test_nothing_of_an_image_is_written(tmp_path):
    made = photo_rows(12, 2, aspect="mixed")
    write_files(tmp_path, made)
    cache = tmp_path / "cache"
    keys = {**PARQUET, "cache_dir": str(cache)}

    def files() -> dict:
        return {file: file.stat().st_size for file in cache.rglob("*") if file.is_file()}

    first, _ = tokenized(tmp_path, keys)
    found = files()
    image_bytes = sum(len(row["image"]["bytes"]) for row in made)
    assert 0 < sum(found.values()) < 0.1 * image_bytes
    again, _ = tokenized(tmp_path, keys)
    assert files() == found and again.to_list() == first.to_list()  # a second start reads its caches


@pytest.mark.parametrize("compression", ["snappy", "zstd"])
def test_workers_read_through_references(tmp_path, compression):
    made = write_files(tmp_path, photo_rows(8, 1), compression=compression)
    refs = references(tmp_path)
    wanted = [row["image"]["bytes"] for row in made]
    assert image_store.read_bytes(refs[0]) == wanted[0]  # before the fork, this process has read too
    loader = DataLoader(refs, 2, num_workers=2, collate_fn=read_all, multiprocessing_context="fork", timeout=60)
    assert [data for batch in loader for data in batch] == wanted
    code = (
        "import json, sys; from llava_orpo.data import image_store, images\n"
        "print(*(images.content_hash(image_store.read_bytes(ref)) for ref in json.load(sys.stdin)))"
    )  # a process that shares nothing but the references
    other = subprocess.run([sys.executable, "-c", code], input=json.dumps(refs), capture_output=True, text=True)
    assert other.stdout.split() == [images.content_hash(data) for data in wanted], other.stderr


def read_all(refs: list[str]) -> list[bytes]:
    return [image_store.read_bytes(ref) for ref in refs]


def test_pairs_are_grouped_by_image_and_batched_alike(tmp_path):
    write_files(tmp_path, photo_rows(10, 3), row_group_size=4)
    keys = {"group_pairs_by_image": True, "max_pairs_per_image": 3}
    batches = []
    for kind in ("arrow", "parquet"):
        trainer = build_trainer(tmp_path, {**keys, "image_storage": kind})
        batches.append((list(trainer._get_train_sampler()), next(iter(trainer.get_train_dataloader()))))
    (order, batch), (other_order, other) = batches
    assert order == other_order and batch.keys() == other.keys()
    assert all((value == other[key]).all() for key, value in batch.items() if hasattr(value, "all"))


def test_the_cells_are_read_from_the_row_that_is_asked_for(tmp_path):
    made = photo_rows(11, 1)
    write_files(tmp_path, made, files=1, row_group_size=3)
    file = str(tmp_path / "rows" / "0.parquet")
    reader = parquet_rows.ImageReader(file, image_store.stamp_of(file), "image")
    for first, count in ((0, 2), (2, 3), (9, 2), (4, 1), (4, 7), (0, 11)):
        cells = reader.rows(first, count)
        assert [cell["bytes"] for cell in cells] == [row["image"]["bytes"] for row in made[first : first + count]]
    files = (("a", "s", 0), ("b", "t", 5), ("c", "u", 9))
    assert list(parquet_rows.by_file(files, range(3, 11))) == [("a", "s", 3, 2), ("b", "t", 0, 4), ("c", "u", 0, 2)]


def test_a_place_that_gives_other_bytes_is_not_used(tmp_path, monkeypatch):
    made = photo_rows(4, 1)
    write_files(tmp_path, made, files=1)
    monkeypatch.setattr(parquet_pages, "key_of", lambda value: 0)  # all values look the same
    refs = references(tmp_path)
    assert sorted(ref.endswith("#") for ref in refs) == [False, True, True, True]
    assert [image_store.read_bytes(ref) for ref in refs] == [row["image"]["bytes"] for row in made]


def test_pages_of_another_kind_have_no_places(tmp_path):
    cells = [[b"a" * 9], [b"b" * 9, None], None]
    pq.write_table(pa.table({"many": cells, "number": [1, 2, 3]}), tmp_path / "odd.parquet")
    parquet = pq.ParquetFile(tmp_path / "odd.parquet")
    data = (tmp_path / "odd.parquet").read_bytes()
    for path in ("many.list.element", "number", "none"):
        assert parquet_pages.locate(data, parquet, 0, path) == {}


def test_a_changed_or_lost_file_says_so(tmp_path):
    write_files(tmp_path, photo_rows(4, 1), files=1)
    ref, file = references(tmp_path)[0], tmp_path / "rows" / "0.parquet"
    for known in (image_store._opened, image_store.open_parquet):
        known.cache_clear()
    os.utime(file, ns=(1, 1))
    with pytest.raises(OSError, match=r"0.parquet was changed after its images were listed. Start again"):
        image_store.read(ref)
    again = references(tmp_path)[0]  # listed anew
    assert image_store.read_bytes(again) == photo_rows(4, 1)[0]["image"]["bytes"]
    image_store._opened.cache_clear()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="0.parquet is gone.*Put it back"):
        image_store.read(again)


def test_damaged_bytes_are_an_error_of_reading(tmp_path):
    write_files(tmp_path, photo_rows(4, 1), files=1)
    ref = references(tmp_path)[0]
    file, place = ref[len("parquet:") :].split("#")[0], ref.rsplit("#", 1)[1]
    start, stored, *_ = map(int, place.split(","))
    with open(file, "r+b") as f:
        f.seek(start)
        f.write(b"\xff" * stored)
    with pytest.raises(OSError, match=f"bytes {start} to {start + stored} are damaged"):
        image_store.read(ref)
    with open(file, "r+b") as f:
        f.truncate(start + 1)
    with pytest.raises(OSError, match="the file ends before byte"):
        image_store.read(ref)


def test_what_is_not_parquet_is_refused_in_one_line(tmp_path):
    write_files(tmp_path, photo_rows(4, 1))
    (tmp_path / "lines.csv").write_text("question,chosen,rejected\na,b,c\n")
    register(tmp_path, "csv", file_name="lines.csv")
    register(tmp_path, "slice", file_name="rows", split="train[:2]")
    register(tmp_path, "cloud", cloud_file_name="s3://bucket/rows.json")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no end")
    register(tmp_path, "damaged")
    for name, line in {
        "csv": "lines.csv is no parquet file. Set `image_storage: arrow`",
        "slice": r"`split: train\[:2\]` is none of its splits \(train\)",
        "cloud": "only local files",
        "damaged": "its files cannot be read",
    }.items():
        with pytest.raises(UserError, match=line) as caught:
            tokenized(tmp_path, {**PARQUET, "dataset": name})
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(ValueError, match="^streaming: true is not supported.*image_storage: parquet"):
        tokenized(tmp_path, {**PARQUET, "streaming": True, "max_steps": 1})


def test_image_files_named_in_json_and_parquet_stay_files(tmp_path):
    made = photo_rows(3, 1)
    lines = []
    for number, row in enumerate(made):
        (tmp_path / f"{number}.jpg").write_bytes(row["image"]["bytes"])
        lines.append({**row, "image": f"{number}.jpg"})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    register(tmp_path, "lines", file_name="lines.jsonl")
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "named.parquet")
    register(tmp_path, "named")
    for name in ("lines", "named"):
        rows, *_ = same_pairs(tmp_path, {"dataset": name})
        assert len(rows) == 3


def test_a_dataset_of_the_hub_is_read_from_its_snapshot(tmp_path, monkeypatch):
    """The Hub's part is played by a folder; what is asked of it is what huggingface_hub documents."""
    made = photo_rows(6, 1)
    made[5]["image"] = {"bytes": None, "path": str(tmp_path / "snapshot" / "data" / "1.jpg")}
    (tmp_path / "snapshot").mkdir()
    write_files(tmp_path / "snapshot", made, files=2, name="data")
    (tmp_path / "snapshot" / "data" / "1.jpg").write_bytes(made[0]["image"]["bytes"])
    (tmp_path / "snapshot" / "whole.parquet").unlink()
    (tmp_path / "snapshot" / "dataset_info.json").unlink()
    for number in (0, 1):
        (tmp_path / "snapshot" / "data" / f"{number}.parquet").rename(
            tmp_path / "snapshot" / "data" / f"train-{number:05d}-of-00002.parquet"
        )
    config = "configs:\n- config_name: main\n  data_files:\n  - {split: train, path: data/train-*}\n"
    (tmp_path / "snapshot" / "README.md").write_text(f"---\n{config}---\n")
    asked = []

    def snapshot(repo, **how):
        asked.append((repo, how["repo_type"], how["allow_patterns"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(parquet_rows, "snapshot_download", snapshot)
    entry = {"hf_hub_url": "some/pairs", "formatting": "rlaif_v", "ranking": True}
    folder = {**entry, "folder": "data"}
    info = {"rows": entry, "sub": {**entry, "subset": "main"}, "none": {**entry, "subset": "none"}, "folder": folder}
    info["split"] = {**entry, "split": "test"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for name in ("rows", "sub", "folder"):
        out, skipped = aligned(tmp_path, name)
        refs = [pictures[0] for pictures in columns.values(out, "_images")]
        assert [image_store.read_bytes(ref) for ref in refs] == [row["image"]["bytes"] for row in made[:5]]
        assert [entry["row"] for entry in skipped] == [5]
        assert "no path of a dataset from a Hub is followed" in skipped[0]["reason"]
    assert asked[0] == ("some/pairs", "dataset", ["*.parquet", "README.md"])
    assert asked[2][2] == ["data/*.parquet", "README.md"]
    with pytest.raises(UserError, match="none: no parquet files in .*'none' not found"):
        aligned(tmp_path, "none")
    with pytest.raises(UserError, match=r"`split: test` is none of its splits \(train\)"):
        aligned(tmp_path, "split")


def test_a_hub_that_gives_nothing_is_an_error_of_one_line(tmp_path):
    entry = {"hf_hub_url": "some/pairs", "formatting": "rlaif_v", "ranking": True}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": entry}))
    with pytest.raises(UserError, match="rows: some/pairs was not got from the Hub .*Check the name") as caught:
        aligned(tmp_path)  # HF_HUB_OFFLINE, and no such snapshot
    assert "\n" not in str(caught.value)


def test_files_and_cached_texts_that_do_not_fit_are_found(tmp_path, monkeypatch):
    write_files(tmp_path, photo_rows(4, 1))
    fewer = datasets.Dataset.from_dict({"question": ["a"]})
    monkeypatch.setattr(parquet_rows, "load_dataset", lambda *_, **__: fewer)
    with pytest.raises(UserError, match="have 4 rows, and the cached texts of `datasets` 1"):
        aligned(tmp_path)


def test_a_parquet_file_without_texts_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": b"a", "path": "b"}]}), tmp_path / "only.parquet")
    attr = SimpleNamespace(load_from="file", dataset_name="only.parquet", split="train", images=None)
    with pytest.raises(UserError, match="only: .*only.parquet has no column of texts"):
        parquet_rows.load("only", attr, SimpleNamespace(cache_dir=None), SimpleNamespace(dataset_dir=str(tmp_path)))
