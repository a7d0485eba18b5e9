"""evals/generate.py: the same answers as plain transformers one at a time, whatever the batch; resumable."""

from __future__ import annotations

import io
import json
from pathlib import Path

import generate
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.recipes import other_model, photo_rows, random_model, write_recipe, write_rows
from llava_orpo.data import images
from llava_orpo.errors import UserError
from llava_orpo.evaluation import generation
from llava_orpo.evaluation.sampling import SeededSampling


@pytest.fixture(scope="module")
def rows():
    made = photo_rows(4, 2, aspect="mixed")
    made[1]["question"] = made[0]["question"]  # one prompt with two pairs
    made[2]["question"] = "  Is the text </s> or <image> in it?\n"
    made[5]["image"] = None
    data = io.BytesIO()
    Image.open(io.BytesIO(made[6]["image"]["bytes"])).save(data, "PNG")
    made[6]["image"] = made[7]["image"] = {"bytes": data.getvalue(), "path": "x.png"}
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("generate")
    write_rows(folder, rows)
    write_recipe(folder, {"eval_dataset": "rows", "allow_text_only": True})
    return folder


def run(folder: Path, out: str, *overrides: str) -> list[dict]:
    words = [str(folder / "recipe.yaml"), f"output_dir={folder / out}", "max_new_tokens=6", *overrides]
    assert generate.main(words) == 0
    return read(folder / out)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "generations.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def greedy(folder):
    return run(folder, "greedy", "models=base", "per_device_eval_batch_size=3")


@torch.no_grad()
def plain_answer(model, processor, row: dict, max_new_tokens: int = 6) -> str:
    """transformers alone, batch of one; text that looks like special tokens is avoided by the caller."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") if row["image"] else None
    content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": row["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_equals_transformers_one_at_a_time(rows, greedy):
    model = AutoModelForImageTextToText.from_pretrained(random_model()).eval()
    processor = AutoProcessor.from_pretrained(random_model())
    by_question = {line["question"]: line["answers"]["base"] for line in greedy}
    compared = [row for row in rows if "<image>" not in row["question"]]
    expected = {row["question"]: plain_answer(model, processor, row) for row in compared}
    assert len(set(expected.values())) > 3  # the answers differ, so an exchange of rows would show
    assert {question: by_question[question] for question in expected} == expected


def test_lines_say_what_was_asked(rows, greedy, folder):
    kept = [0, 2, 3, 4, 5, 6, 7]  # pair 1 asks what pair 0 asks
    assert len(greedy) == len(kept)
    for line, index in zip(greedy, kept, strict=True):
        row = rows[index]
        assert {key: line[key] for key in ("question", "chosen", "rejected")} == {
            key: row[key] for key in ("question", "chosen", "rejected")
        }
        assert line["pair_id"].startswith(row["idx"] + "-") and line["dataset"] == "rows"
        assert line["subset"] == f"{row['origin_dataset']}/{json.loads(row['origin_split'])['type']}"
        if row["image"] is None:
            assert line["image"] is None
        else:
            path = folder / "greedy" / line["image"]["path"]
            assert path.read_bytes() == row["image"]["bytes"]
            assert path.name == f"{images.content_hash(row['image']['bytes'])}.{'png' if index > 5 else 'jpg'}"


def test_batch_size_changes_no_sample_but_the_seed_does(folder, greedy):
    sampled = ("temperature=0.8", "top_p=0.9", "models=base")
    one = run(folder, "one", "per_device_eval_batch_size=1", "seed=3", *sampled)
    assert run(folder, "many", "per_device_eval_batch_size=5", "seed=3", *sampled) == one
    assert one != greedy
    other = run(folder, "many", "per_device_eval_batch_size=5", "seed=4", "max_prompts=3", *sampled)
    same_prompts = {line["pair_id"] for line in other}
    assert len(other) == 3 and other != [line for line in one if line["pair_id"] in same_prompts]


def test_interrupted_run_resumes(folder, greedy, monkeypatch):
    original, asked = generation.generate, []

    def stops_after_one_batch(session, positions, settings):
        asked.append(len(positions))
        for number, batch in enumerate(original(session, positions, settings)):
            if number == 1 and len(asked) == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(generation, "generate", stops_after_one_batch)
    words = ("models=base", "per_device_eval_batch_size=3")
    with pytest.raises(KeyboardInterrupt):
        run(folder, "resumed", *words)
    (saved,) = (folder / "resumed").glob(".answers_*.jsonl")
    with saved.open("a") as file:
        file.write('{"position": 3, "answer": "cut o')  # killed while writing
    assert run(folder, "resumed", *words) == greedy
    assert asked == [7, 4]  # three of seven were kept
    assert run(folder, "resumed", *words) == greedy
    assert asked == [7, 4]  # nothing to ask
    run(folder, "resumed", "max_new_tokens=5", *words)
    assert asked == [7, 4, 7]  # other settings: all again


def test_several_models_in_one_file(folder, greedy, tmp_path):
    other = other_model(tmp_path / "other")
    lines = run(folder, "two", f"models=base,{other}", "max_prompts=2")
    assert [list(line["answers"]) for line in lines] == [["base", "other"]] * 2
    base = {line["pair_id"]: line["answers"]["base"] for line in greedy}
    assert [line["answers"]["base"] for line in lines] == [base[line["pair_id"]] for line in lines]
    assert all(line["answers"]["other"] != line["answers"]["base"] for line in lines)


def test_model_names():
    base = {"model_name_or_path": "m"}
    assert list(generation.named_models(base, "base, a/x/,b/y")) == ["base", "x", "y"]
    assert list(generation.named_models(base, ["a/x", "b/x"])) == ["a/x", "b/x"]
    assert list(generation.named_models({**base, "adapter_name_or_path": "o/run"}, None)) == ["m+run"]
    with pytest.raises(UserError, match="once"):
        generation.named_models(base, "base,base")


def test_unreadable_image_is_named_and_left_out(tmp_path, capsys):
    made = photo_rows(2, 1)
    data = io.BytesIO()
    Image.open(io.BytesIO(made[1]["image"]["bytes"])).save(data, "PNG")
    data = data.getvalue()
    middle = len(data) // 2
    made[1]["image"] = {"bytes": data[:middle] + bytes(64) + data[middle + 64 :], "path": None}
    write_rows(tmp_path, made)
    write_recipe(tmp_path, {"eval_dataset": "rows"})
    assert len(run(tmp_path, "out")) == 1
    assert "left out rows 1-" in capsys.readouterr().err


def test_spread_of_max_prompts():
    made = [{"image_hash": str(i // 2), "image": None, "prompt_ids": [i % 2]} for i in range(10)]
    assert generation.unique_prompts(made + made) == list(range(10))
    assert generation.unique_prompts(made, 4) == [0, 2, 5, 7]
    with pytest.raises(UserError, match="max_prompts=0"):
        generation.unique_prompts(made, 0)


def test_samples_follow_the_distribution():
    """Chi-square test of 4,000 draws against softmax with temperature and nucleus, computed here."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    p = torch.softmax(logits.double() / 0.7, 0)
    kept = p.cumsum(0) - p < 0.9  # the smallest set with at least 0.9; logits are in descending order
    p = (p * kept / p[kept].sum()).numpy()
    processor = SeededSampling(range(4000), temperature=0.7, top_p=0.9)
    drawn = processor(torch.zeros(4000, 1), logits.repeat(4000, 1)).argmax(1)
    counts = np.bincount(drawn.numpy(), minlength=6)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], 4000 * p[p > 0]).pvalue > 0.001
    repeated = SeededSampling([5, 9, 5], 0.7, 1.0)(torch.zeros(3, 1), logits.repeat(3, 1))
    assert torch.equal(repeated[0], repeated[2]) and not torch.equal(repeated[0], repeated[1])
