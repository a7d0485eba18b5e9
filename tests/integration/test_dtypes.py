"""One dtype for the whole model, the recipe's, from a checkpoint whose config names two (as the published one)."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from llamafactory.chat.chat_model import ChatModel
from llamafactory.train.tuner import export_model
from safetensors.torch import load_file, save_file

from helpers.recipes import build_trainer, photo_rows, random_model, recipe, write_rows
from llava_orpo import autoload
from llava_orpo.evaluation.session import open_session

LORA = {"finetuning_type": "lora", "lora_target": "q_proj,linear_1", "freeze_multi_modal_projector": False}
SERVED = {"plugins": "llava_orpo", "template": "llava_v16_mistral", "trust_remote_code": False}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A float16 checkpoint with `text_config.torch_dtype` bfloat16."""
    folder = tmp_path_factory.mktemp("published")
    for file in random_model().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(random_model() / "model.safetensors")
    save_file({n: w.half() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None), part.pop("torch_dtype", None)
    config["torch_dtype"], config["text_config"]["torch_dtype"] = "float16", "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dtypes(model, trainable: bool = False) -> Counter:
    """How many plain weights have which dtype; 4-bit ones are left out."""
    weights = [p for p in model.parameters() if p.requires_grad == trainable and type(p) is torch.nn.Parameter]
    return Counter(p.dtype for p in weights)


@pytest.mark.parametrize("quantization", [{}, {"quantization_bit": 4}], ids=["16 bit", "4 bit"])
def test_training(tmp_path, published, quantization):
    write_rows(tmp_path, photo_rows(1, 1))
    keys = {**LORA, **quantization, "bf16": True, "model_name_or_path": str(published)}
    model = build_trainer(tmp_path, keys).model
    assert set(dtypes(model)) == {torch.bfloat16} and set(dtypes(model, trainable=True)) == {torch.float32}


def test_full_tuning_starts_from_the_exact_weights(tmp_path, published):
    write_rows(tmp_path, photo_rows(1, 1))
    keys = {"finetuning_type": "full", "bf16": True, "model_name_or_path": str(published)}
    model = build_trainer(tmp_path, keys).model
    assert set(dtypes(model)) == {torch.bfloat16} and set(dtypes(model, trainable=True)) == {torch.float32}
    head = load_file(published / "model.safetensors")["language_model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight, head.float())


def test_evaluation(tmp_path, published):
    write_rows(tmp_path, photo_rows(2, 1))
    given = recipe(tmp_path, {"bf16": True, "model_name_or_path": str(published), "eval_dataset": "rows"})
    with open_session(given, str(tmp_path / "out")) as session:
        assert set(dtypes(session.model)) == {torch.bfloat16}
        config = session.model.config
        assert config.dtype == config.text_config.dtype == config.vision_config.dtype == torch.bfloat16
        batch = session.collator([session.rows[0]])
        assert session.forward(batch).sums.isfinite().all()


@pytest.mark.parametrize("asked", ["float32", "auto"])
def test_chat(published, asked):
    autoload.install()
    given = {**SERVED, "model_name_or_path": str(published), "infer_dtype": asked}
    model = ChatModel(given).engine.model
    assert set(dtypes(model)) == {torch.float16 if asked == "auto" else getattr(torch, asked)}
    assert model.config.text_config.dtype == model.config.dtype == model.dtype


@pytest.mark.parametrize("asked", ["bfloat16", "auto"])
def test_export(tmp_path, published, asked):
    autoload.install()
    given = {**SERVED, "model_name_or_path": str(published), "infer_dtype": asked}
    export_model({**given, "export_dir": str(tmp_path / "merged"), "export_device": "cpu"})
    name = "float16" if asked == "auto" else asked
    kinds = {weight.dtype for weight in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert kinds == {getattr(torch, name)}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    named = [part[key] for part in (config, config["text_config"]) for key in ("dtype", "torch_dtype") if key in part]
    assert named == [name, name]
