"""data/message_rows.py: TRL's and ms-swift's layouts give the pairs that RLAIF-V's own layout gives."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value

from helpers.recipes import photo_rows, tokenized, write_rows
from llava_orpo.data import image_store, message_rows, rows

SAME = ("question", "prompt_ids", "chosen_ids", "rejected_ids", "num_image_tokens", "image_hash", "width", "height")
PART = {"text": Value("string"), "type": Value("string")}
MESSAGES = List({"content": List(PART), "role": Value("string")})
PUBLISHED = Features({"chosen": MESSAGES, "rejected": MESSAGES, "images": List(Image()), "prompt": MESSAGES})
NO_TEMPLATE = {
    "question": "Is </s> or [INST] a word? <image>",
    "chosen": "<image> is text.",
    "rejected": "No, </s> is.",
}


def message(role: str, text: str, image: bool = False) -> list[dict]:
    """As TRL's examples/datasets/rlaif-v.py writes it."""
    return [{"role": role, "content": [*([{"type": "image"}] * image), {"type": "text", "text": text}]}]


def trl(row: dict, image) -> dict:
    answers = {side: message("assistant", row[side]) for side in ("chosen", "rejected")}
    return {"prompt": message("user", row["question"], image=True), "images": image, **answers}


def swift(row: dict, image) -> dict:
    asked = {"role": "user", "content": "<image>" + row["question"]}
    messages = [asked, {"role": "assistant", "content": row["chosen"]}]
    return {"messages": messages, "rejected_response": row["rejected"], "images": image}


def register(folder: Path, name: str, file: str, formatting: str, **entry) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info[name] = {"file_name": file, "formatting": formatting, "ranking": True, **entry}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def write_lines(folder: Path, name: str, formatting: str, lines: list[dict], **entry) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    register(folder, name, f"{name}.jsonl", formatting, **entry)


def skipped(folder: Path) -> dict[int, str]:
    listed = (folder / "out" / "skipped_rows.jsonl").read_text().splitlines()
    return {entry["row"]: entry["reason"] for entry in map(json.loads, listed)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(folder, rows in RLAIF-V's layout, paths of their images, the pairs as read from them)."""
    tmp_path = tmp_path_factory.mktemp("messages")
    made = photo_rows(3, 1)
    made[0].update(NO_TEMPLATE)
    write_rows(tmp_path, made)
    (tmp_path / "pictures").mkdir()
    paths = [f"pictures/{number}.jpg" for number in range(len(made))]
    for row, path in zip(made, paths, strict=True):
        (tmp_path / path).write_bytes(row["image"]["bytes"])
    return tmp_path, made, paths, tokenized(tmp_path, {})[0]


def assert_same(folder: Path, names: list[str], expected, **keys) -> Dataset:
    """Reads the datasets in one go; each must give the pairs of `expected`."""
    found, _ = tokenized(folder, {"dataset": ",".join(names), **keys})
    assert list(found["dataset"]) == [name for name in names for _ in range(len(expected))]
    for column in SAME:
        assert list(found[column]) == list(expected[column]) * len(names), column
    return found


def test_trl_s_published_parquet_gives_the_same_tokens(pairs):
    """The features of trl-lib/rlaif-v and HuggingFaceH4/rlaif-v_formatted: images embedded, in lists of one."""
    folder, made, _, expected = pairs
    lines = [trl(row, [row["image"]]) for row in made]
    # to_parquet keeps the features in the file's metadata, as push_to_hub does
    Dataset.from_list(lines, features=PUBLISHED).to_parquet(folder / "trl.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(folder / "trl.parquet"), split="train")
    assert loaded.features["images"] == List(Image())
    register(folder, "trl", "trl.parquet", "trl_conversational")
    found = assert_same(folder, ["trl"], expected, image_storage="parquet")  # which serves RLAIF-V's layout alone
    assert [image_store.read_bytes(ref) for ref in found["image"]] == [row["image"]["bytes"] for row in made]


def test_other_shapes_of_parquet_give_the_same_tokens(pairs):
    """Content as plain text, images as a struct of bytes, and a name of its own for their column."""
    folder, made, _, expected = pairs
    flat = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
            "pictures": {"bytes": row["image"]["bytes"], "path": None},
        }
        for row in made
    ]
    Dataset.from_list(flat).to_parquet(folder / "flat.parquet")
    register(folder, "flat", "flat.parquet", "trl_conversational", columns={"images": "pictures"})
    assert_same(folder, ["flat"], expected)


def test_lines_of_json_give_the_same_tokens(pairs):
    folder, made, paths, _ = pairs
    answers = {"question": "Which?", "chosen": "[1, 2]", "rejected": '{"a": 3}'}  # look like JSON, and are texts
    made = [{**made[0], **answers}, *made[1:]]  # without a literal <image>, which ms-swift has not
    write_rows(folder, made, "plain")
    shapes = [lambda p: p, lambda p: [p], lambda p: {"path": p}, lambda p: [{"path": p}]]
    names = []
    for formatting, layout in (("trl_conversational", trl), ("ms_swift", swift)):
        for number, shape in enumerate(shapes):
            lines = [layout(row, shape(path)) for row, path in zip(made, paths, strict=True)]
            names.append(f"{formatting}_{number}")
            write_lines(folder, names[-1], formatting, lines)
    assert_same(folder, names, tokenized(folder, {"dataset": "plain"})[0])


def test_what_is_no_pair_of_ours_is_skipped_with_its_reason(pairs):
    folder, made, paths, _ = pairs
    row, path = made[1], paths[1]
    good, system = trl(row, [path]), {"role": "system", "content": "Be kind."}
    lines = [
        (good, ""),
        ({**good, "images": [path, paths[0]]}, "2 images"),
        ({**good, "images": []}, "no image"),
        ({**good, "prompt": [system, *good["prompt"]]}, "a system message"),
        ({**good, "prompt": [*good["prompt"], *good["chosen"], *good["prompt"]]}, "multi-turn"),
        ({**good, "prompt": row["question"]}, "`prompt` is not a list of messages"),
        ({**good, "prompt": None}, "`prompt` is missing"),
        ({**good, "chosen": message("assistant", "x", image=True)}, "an image in `chosen`"),
        ({**good, "chosen": message("user", "x")}, "`chosen` does not end with a message of the assistant"),
        ({**good, "chosen": [{"role": "assistant", "content": [{"type": "video"}]}]}, "part of type 'video'"),
        ({**good, "chosen": [{"role": "assistant", "content": 3}]}, "neither text nor a list of parts"),
        ({**good, "chosen": message("assistant", "half \ud83d")}, "half a character"),
        ({**good, "rejected": good["chosen"]}, "the same text"),
        ({**good, "rejected": message("assistant", " ")}, "`rejected` is empty"),
    ]
    write_lines(folder, "odd", "trl_conversational", [line for line, _ in lines])
    found, _ = tokenized(folder, {"dataset": "odd", "max_skipped_fraction": 1.0})
    assert found["row"] == [0]
    reasons = skipped(folder)
    assert sorted(reasons) == list(range(1, len(lines)))
    for number, (_, words) in enumerate(lines):
        assert number == 0 or words in reasons[number], (number, reasons[number])


def test_ms_swift_s_own_cases(pairs):
    folder, made, paths, _ = pairs
    row, path = made[1], paths[1]
    good = swift(row, [path])
    asked, answer = good["messages"]
    other = {key: value for key, value in good.items() if key != "rejected_response"}
    again = [asked, {"role": "assistant", "content": row["rejected"]}]
    lines = [
        (good, ""),
        ({**good, "rejected_images": [path]}, ""),
        ({**good, "rejected_images": []}, ""),
        ({**good, "messages": [{**asked, "content": row["question"]}, answer]}, ""),  # ms-swift puts the image first
        ({**good, "messages": [{**asked, "content": "<image>\n" + row["question"]}, answer]}, ""),
        ({**other, "rejected_messages": again, "rejected_images": [path]}, ""),
        ({**good, "rejected_images": [paths[0]]}, "`rejected_images` differ from `images`"),
        ({**good, "messages": [{**asked, "content": "<image><image>" + row["question"]}, answer]}, "2 images"),
        ({**good, "rejected_response": "see <image>"}, "<image> in an answer"),
        ({**good, "rejected_response": ["a"]}, "`rejected_response` is not text but list"),
        (other, "`rejected_response` is missing"),
        ({**other, "rejected_messages": [{**asked, "content": "Other?"}, answer]}, "ask another question"),
        ({**good, "messages": [asked]}, "not one question"),
    ]
    write_lines(folder, "swift", "ms_swift", [line for line, _ in lines])
    found, _ = tokenized(folder, {"dataset": "swift", "max_skipped_fraction": 1.0})
    assert found["row"] == [number for number, (_, words) in enumerate(lines) if not words]
    for column in SAME:
        assert len({json.dumps(value) for value in found[column]}) == 1, column
    reasons = skipped(folder)
    for number, (_, words) in enumerate(lines):
        assert not words or words in reasons[number], (number, reasons.get(number))


def test_a_promised_image_that_is_missing_is_no_text_only_pair(pairs):
    folder, made, paths, _ = pairs
    row = made[1]
    silent = {**trl(row, None), "prompt": message("user", row["question"])}
    write_lines(folder, "some", "trl_conversational", [silent, trl(row, None), trl(row, [paths[1]])])
    found, _ = tokenized(folder, {"dataset": "some", "max_skipped_fraction": 1.0, "allow_text_only": True})
    assert found["row"] == [0, 2] and found["image"][0] is None
    assert "the messages name an image, and there is none" in skipped(folder)[1]


def test_filters_and_other_columns_stay(pairs):
    folder, made, paths, _ = pairs
    lines = [
        {**trl(row, [path]), "origin_dataset": f"set {n}", "idx": n + 7}
        for n, (row, path) in enumerate(zip(made, paths, strict=True))
    ]
    write_lines(folder, "sets", "trl_conversational", lines)
    found, _ = tokenized(folder, {"dataset": "sets", "dataset_filter": {"origin_dataset": "set 1"}})
    assert found["source"] == ["set 1"] and found["pair_id"][0].startswith("8-")


def test_a_batch_is_one_map_call():
    """The columns of `convert` by hand: every row has one entry in each."""
    batch = {"messages": [None, "no json"], "rejected_response": ["a", "b"], "images": ["x", "y"]}
    out = message_rows.convert(batch, "ms_swift", "images", 1)
    assert {len(values) for values in out.values()} == {2} and out["question"] == [None, None]
    assert out[rows.UNREADABLE] == ["`messages` is missing", "`messages` is not a list of messages"]
