"""RLAIF-V rows: subsets, held-out split, untouched image bytes, disk, layouts, bad rows, lengths."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.recipes import photo_rows, random_model, tokenized, write_rows
from llava_orpo.data import image_store, images
from llava_orpo.data.anyres import processor_geometry


def register(folder: Path, name: str, **entry) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    info[name] = {"file_name": "rows.parquet", "formatting": "rlaif_v", "ranking": True, **entry}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_original_bytes_reach_the_decoder(tmp_path, monkeypatch):
    made = photo_rows(3, 1)
    write_rows(tmp_path, made)
    train, _ = tokenized(tmp_path, {})
    assert [image_store.read_bytes(ref) for ref in train["image"]] == [row["image"]["bytes"] for row in made]

    seen = []
    original = images.decode_rgb
    monkeypatch.setattr(images, "decode_rgb", lambda source: (seen.append(source), original(source))[1])
    from transformers import AutoProcessor

    from llava_orpo.step.collator import SharedPrefixCollator

    processor = AutoProcessor.from_pretrained(random_model())
    SharedPrefixCollator(processor, 32000)([train[i] for i in range(3)])
    assert seen == [row["image"]["bytes"] for row in made]


def test_no_pass_writes_the_images_again(tmp_path):
    made = photo_rows(12, 2, aspect="mixed")
    write_rows(tmp_path, made)
    cache = tmp_path / "cache"
    tokenized(tmp_path, {"cache_dir": str(cache)})
    written = sum(f.stat().st_size for f in cache.rglob("*") if f.is_file())
    image_bytes = sum(len(row["image"]["bytes"]) for row in made)
    assert image_bytes < written < 1.1 * image_bytes  # the one Arrow copy, and texts, ids, hashes


def test_registered_subsets_filters_and_joined_datasets(tmp_path):
    write_rows(tmp_path, photo_rows(8, 2))
    register(tmp_path, "detail", llava_orpo={"filter": {"origin_split": "detailed description"}})
    register(tmp_path, "coco", llava_orpo={"filter": {"origin_dataset": ["coco"]}})
    assert len(tokenized(tmp_path, {"dataset": "rows"})[0]) == 16
    detail, _ = tokenized(tmp_path, {"dataset": "detail"})
    assert len(detail) == 8 and set(detail["question_type"]) == {"detailed description"}
    both, _ = tokenized(tmp_path, {"dataset": "detail,coco"})
    assert len(both) == 8 + 4 and set(both["dataset"]) == {"detail", "coco"}
    narrow, _ = tokenized(tmp_path, {"dataset": "detail", "dataset_filter": {"origin_dataset": ["coco", "TEXT-VQA"]}})
    assert len(narrow) == 4 and set(narrow["source"]) == {"COCO", "TextVQA"}
    as_text, _ = tokenized(tmp_path, {"dataset_filter": '{"origin_dataset": "coco"}'})
    assert len(as_text) == 4
    limited, _ = tokenized(tmp_path, {"dataset": "coco", "max_samples": 3})  # counted after the filter
    assert len(limited) == 3 and set(limited["source"]) == {"COCO"}
    with pytest.raises(ValueError, match=r"(?s)matches no row of rows.*'VQAv2' \(4\)"):
        tokenized(tmp_path, {"dataset_filter": {"origin_dataset": "none"}})


def test_train_and_heldout_never_share_an_image(tmp_path):
    write_rows(tmp_path, photo_rows(40, 2))
    register(tmp_path, "train", llava_orpo={"part": "train"})
    register(tmp_path, "held", llava_orpo={"part": "heldout"})
    keys = {"dataset": "train", "eval_dataset": "held", "heldout_fraction": 0.3}
    train, held = tokenized(tmp_path, keys)
    assert len(train) + len(held) == 80 and len(train) and len(held)
    assert not set(train["image_hash"]) & set(held["image_hash"])
    again, _ = tokenized(tmp_path, keys)
    assert again["pair_id"] == train["pair_id"]


def test_json_lines_with_image_paths_and_rlhf_v(tmp_path):
    made = photo_rows(2, 1)
    (tmp_path / "pictures").mkdir()
    lines, rlhf = [], []
    for i, row in enumerate(made):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(row["image"]["bytes"])
        line = {k: v for k, v in row.items() if k != "image"} | {"image": f"pictures/{i}.jpg"}
        lines.append(line)
        texts = json.dumps({k: row[k] for k in ("question", "chosen", "rejected")})
        rlhf.append({"text": texts, "image": f"pictures/{i}.jpg", "origin_dataset": "RLHF", "idx": i})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "rlhf.json").write_text(json.dumps(rlhf))
    write_rows(tmp_path, made)
    register(tmp_path, "lines", file_name="lines.jsonl")
    register(tmp_path, "rlhf", file_name="rlhf.json")
    reference, _ = tokenized(tmp_path, {})
    for name in ("lines", "rlhf"):
        other, _ = tokenized(tmp_path, {"dataset": name})
        for column in ("prompt_ids", "chosen_ids", "rejected_ids", "num_image_tokens", "image_hash"):
            assert other[column] == reference[column], (name, column)


def test_literal_image_placeholder_stays_text(tmp_path):
    made = photo_rows(1, 1)
    made[0].update(question="What does <image> mean? </s>", chosen="<image> is text", rejected="a [INST] <image>")
    write_rows(tmp_path, made)
    train, _ = tokenized(tmp_path, {})
    row = train[0]
    assert row["prompt_ids"].count(32000) == 1 and row["prompt_ids"].count(2) == 0
    assert 32000 not in row["chosen_ids"] + row["rejected_ids"]
    assert row["chosen_ids"].count(2) == 1 == row["rejected_ids"].count(2)


def test_bad_rows_are_skipped_counted_and_listed(tmp_path):
    made = photo_rows(8, 1)
    whole = made[1]["image"]["bytes"]
    made[0]["chosen"] = None
    made[1]["image"]["bytes"] = whole[: len(whole) // 2]
    made[2]["image"] = None
    made[3]["image"] = {"bytes": b"not an image", "path": None}
    made[4]["rejected"] = made[4]["chosen"]
    write_rows(tmp_path, made)
    with pytest.raises(ValueError, match=r"5 of 8 pairs \(62.5%\).*skipped_rows.jsonl"):
        tokenized(tmp_path, {})
    train, _ = tokenized(tmp_path, {"max_skipped_fraction": 0.9})
    assert len(train) == 3
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    reasons = {entry["row"]: entry["reason"] for entry in listed}
    assert sorted(reasons) == [0, 1, 2, 3, 4]
    for row, words in {0: "chosen` is missing", 1: "truncated", 2: "no image", 3: "bad image", 4: "same text"}.items():
        assert words in reasons[row]
    text_only, _ = tokenized(tmp_path, {"max_skipped_fraction": 0.9, "allow_text_only": True})
    assert len(text_only) == 4 and text_only["image"].count(None) == 1


def test_full_verification_finds_damage_inside(tmp_path):
    made = photo_rows(2, 1)
    out = io.BytesIO()
    Image.open(io.BytesIO(made[0]["image"]["bytes"])).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    made[0]["image"]["bytes"] = bytes(data)
    write_rows(tmp_path, made)
    assert len(tokenized(tmp_path, {"max_skipped_fraction": 0.6})[0]) == 2
    assert len(tokenized(tmp_path, {"max_skipped_fraction": 0.6, "verify_images": "full"})[0]) == 1


def test_cutoff_shortens_responses_never_the_image(tmp_path):
    made = photo_rows(2, 1)
    made[0].update(chosen="word " * 50, rejected="other " * 20)
    write_rows(tmp_path, made)
    full, _ = tokenized(tmp_path, {})
    prompt = len(full[0]["prompt_ids"]) + full[0]["num_image_tokens"] - 1
    cut, _ = tokenized(tmp_path, {"cutoff_len": prompt + 7})
    assert len(cut[0]["chosen_ids"]) == len(cut[0]["rejected_ids"]) == 7
    assert cut[0]["prompt_ids"] == full[0]["prompt_ids"] and cut[0]["num_image_tokens"] == full[0]["num_image_tokens"]
    assert cut[0]["chosen_ids"] == full[0]["chosen_ids"][:7]
    with pytest.raises(ValueError, match="do not fit cutoff_len: raise it.*4096 is safe"):
        tokenized(tmp_path, {"cutoff_len": 64})


def test_max_tiles_limits_tokens_as_the_model_counts_them(tmp_path):
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    from helpers.recipes import recipe

    write_rows(tmp_path, photo_rows(4, 1, aspect="mixed"))
    full, _ = tokenized(tmp_path, {})
    few, _ = tokenized(tmp_path, {"anyres_max_tiles": 2})
    assert sum(few["num_image_tokens"]) < sum(full["num_image_tokens"])
    model_args, _, _, finetuning_args, _ = get_train_args(recipe(tmp_path, {"anyres_max_tiles": 2, "do_train": False}))
    module = load_tokenizer(model_args)
    model = load_model(module["tokenizer"], model_args, finetuning_args)
    assert max(processor_geometry(module["processor"]).num_tiles(w, h) for w in (9, 900) for h in (9, 900)) == 3
    for row in few:
        picture = images.decode_rgb(image_store.read(row["image"]))
        inputs = module["processor"].image_processor([picture], return_tensors="pt")
        with torch.no_grad():
            features = model.get_image_features(**inputs).pooler_output[0]
        assert len(features) == row["num_image_tokens"]


def test_streaming_is_refused_with_a_reason(tmp_path):
    write_rows(tmp_path, photo_rows(1, 1))
    with pytest.raises(ValueError, match="^streaming: true is not supported"):
        tokenized(tmp_path, {"streaming": True, "max_steps": 1})
