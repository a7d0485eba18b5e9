"""adapter.py: an adapter of another base model is refused before a merge."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from helpers.checkpoints import write_base
from helpers.llava import tiny_llava
from llava_orpo.checkpoint.adapter import check_adapter
from llava_orpo.checkpoint.published import CheckpointError, save_published


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = tiny_llava(seed=1)
    folder = tmp_path_factory.mktemp("adapters")
    return save_published(model, folder / "llava-tiny", write_base(folder / "config", model))


def write_adapter(folder, base, **settings):
    settings = {"target_modules": "all-linear", "modules_to_save": ["multi_modal_projector"], **settings}
    adapted = get_peft_model(tiny_llava(seed=1), LoraConfig(r=4, **settings))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(params=[{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}])
def adapter(request, tmp_path, base):
    return write_adapter(tmp_path / "adapter", base, **request.param)


def test_adapter_of_this_base(adapter, base):
    check_adapter(adapter, base)


def test_wider_base(adapter, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    other = shutil.copytree(base, tmp_path / "llava-wide")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"not trained on .*-wide but on .*-tiny.* is \(128, 128\)"):
        check_adapter(adapter, other)


def test_shallower_base(adapter, base, tmp_path):
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    other = shutil.copytree(base, tmp_path / "llava-shallow")
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.2\..*the base has no weight of that name"):
        check_adapter(adapter, other)


def test_adapter_of_another_architecture(adapter, base):
    name = "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight"
    save_file({name: torch.zeros(4, 64)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: the base has no weight of that name"):
        check_adapter(adapter, base)


def test_whole_weight_of_another_shape(adapter, base):
    name = "base_model.model.model.language_model.norm.weight"
    save_file({name: torch.zeros(32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} \(32,\): the base's language_model.model.norm"):
        check_adapter(adapter, base)


def set_base(adapter, name):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(name)}))


def test_moved_base_and_same_shapes(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    moved = shutil.copytree(base, tmp_path / "moved")
    check_adapter(adapter, moved)  # another folder, the same weights

    (sibling := tmp_path / "sibling").mkdir()
    shutil.copytree(base, sibling / "llava-tiny")
    weights = load_file(sibling / "llava-tiny" / "model.safetensors")
    weights["language_model.model.layers.2.self_attn.v_proj.weight"][0, 0] += 1
    save_file(weights, sibling / "llava-tiny" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="was trained on .*llava-tiny, not on .*sibling/llava-tiny"):
        check_adapter(adapter, sibling / "llava-tiny")


@pytest.mark.parametrize(
    "trained_on",
    ["llava-hf/LLaVA-Tiny", "/gone/llava-tiny", "/x/models--llava-hf--llava-tiny/snapshots/0123abcd", ""],
)
def test_base_known_by_name_only(tmp_path, base, trained_on):
    adapter = write_adapter(tmp_path / "adapter", base)
    set_base(adapter, trained_on)
    check_adapter(adapter, base)


def test_other_name_names_both_and_the_remedy(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    set_base(adapter, "llava-hf/llava-v1.6-vicuna-7b-hf")
    with pytest.raises(CheckpointError, match=r"vicuna-7b-hf, not on .*llava-tiny.*base_model_name_or_path"):
        check_adapter(adapter, base)


def test_not_an_adapter_folder(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not a .whole. adapter folder"):
        check_adapter(adapter, base)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json does not exist"):
        check_adapter(adapter, base)
