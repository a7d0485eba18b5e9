"""evals/benchmarks.py: the demo task's data and measures, and a run through the real lmms-eval."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
from collections import Counter

import benchmarks
import measures
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.paths import ROOT
from helpers.recipes import random_model, recipe, write_recipe
from llava_orpo.errors import UserError
from llava_orpo.tiny import object_questions, world


@pytest.fixture(scope="module")
def questions():
    return object_questions.questions(160)


def test_questions_are_balanced(questions):
    """No wording or category gives the answer away."""
    wording = [row["question"].split(" an ")[0].split(" a ")[0] for row in questions]
    counted = Counter((row["answer"], row["category"], words) for row, words in zip(questions, wording, strict=True))
    assert len(counted) == 8 and set(counted.values()) == {20}


def test_answers_are_true_of_the_pictures(monkeypatch):
    scenes = []
    draw = world.draw
    monkeypatch.setattr(world, "draw", lambda scene, rng: (scenes.append(scene), draw(scene, rng))[1])
    rows = object_questions.questions(160)
    for row, scene in zip(rows, scenes, strict=True):
        color, shape = re.search(r"(\w+) (\w+)(?: in the picture)?\?$", row["question"]).groups()
        assert ((color, shape) in scene.objects) == (row["answer"] == "yes")
        if row["answer"] == "no" and row["category"] == "adversarial":
            near = {(world.partner(color), shape), (color, world.partner(shape))}
            assert near & set(scene.objects)
    assert rows == object_questions.questions(160)


def test_measures_by_hand():
    said = ["Yes, there is.", " no", "YES", "No, none.", "Maybe yes", "Not a star", "yes"]
    true = ["yes", "yes", "no", "no", "yes", "no", "yes"]
    results = [
        measures.process_results({"answer": t, "category": "random"}, [s])["accuracy"]
        for s, t in zip(said, true, strict=True)
    ]
    assert [r["said"] for r in results] == ["yes", "no", "yes", "no", "", "", "yes"]
    assert measures.accuracy(results) == 3 / 7
    assert measures.precision(results) == 2 / 3
    assert measures.recall(results) == 2 / 4
    assert measures.yes_ratio(results) == 3 / 7
    assert measures.precision(results[1:2]) == 0.0


def test_metrics_and_table(capsys):
    values = {
        "alias": "pope",
        "samples": 9,
        "pope_f1_score,none": 0.5,
        "pope_f1_score_stderr,none": "N/A",
        "pope_accuracy,none": 0.75,
        "pope_accuracy_stderr_clt,none": 0.1,
        "submission,none": None,
    }
    assert benchmarks.metrics_of(values) == {"pope_f1_score": 0.5, "pope_accuracy": 0.75}
    benchmarks.print_table({"base": {"pope": {"f1": 0.5}}, "tuned": {"pope": {"f1": 0.625}}})
    assert "0.5000                  0.6250" in capsys.readouterr().out


def test_without_lmms_eval_the_way_is_shown(tmp_path):
    if benchmarks.importlib.util.find_spec("lmms_eval"):
        pytest.skip("lmms-eval is in this environment")
    path = write_recipe(tmp_path, {})
    with pytest.raises(UserError, match=f"bash scripts/benchmarks.sh {path} tasks=pope"):
        benchmarks.main([str(path), "tasks=pope"])


@torch.no_grad()
def plain_answer(model, processor, row: dict) -> str:
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_through_the_real_harness(tmp_path):
    """scripts/benchmarks.sh, environment included: lmms-eval sees the answers that plain transformers gives."""
    model = AutoModelForImageTextToText.from_pretrained(random_model()).eval()
    processor = AutoProcessor.from_pretrained(random_model())
    rows = object_questions.questions(7)
    expected = {"base": [plain_answer(model, processor, row) for row in rows]}
    torch.manual_seed(0)
    targets = r".*language_model.*(q_proj|v_proj)"
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "tuned")
    loaded = AutoModelForImageTextToText.from_pretrained(random_model())
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "tuned").eval()
    expected["tuned"] = [plain_answer(loaded, processor, row) for row in rows]
    assert expected["tuned"] != expected["base"] and len(set(expected["base"])) > 1

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(tmp_path, {"per_device_eval_batch_size": 3})))
    command = [
        "bash",
        "scripts/benchmarks.sh",
        str(tmp_path / "recipe.yaml"),
        f"models=base,{tmp_path / 'tuned'}",
        "tasks=demo_objects",
        "limit=7",
        f"output_dir={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    table = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    for name, answers in expected.items():
        lines = (tmp_path / "out" / f"samples_{name}_demo_objects.jsonl").read_text().splitlines()
        samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
        assert [sample["resps"][0][0] for sample in samples] == answers
        results = [measures.process_results(row, [text])["accuracy"] for row, text in zip(rows, answers, strict=True)]
        assert table[name]["demo_objects"]["accuracy"] == pytest.approx(measures.accuracy(results))
        assert table[name]["demo_objects"]["yes_ratio"] == pytest.approx(measures.yes_ratio(results))
    assert "demo_objects  accuracy" in done.stdout

    unknown = [*command[:4], "tasks=popee", *command[5:]]
    done = subprocess.run(unknown, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode != 0 and "no task popee" in done.stderr
