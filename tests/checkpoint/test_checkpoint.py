"""checkpoint.py: published tensor names, writing a merged model, loading it completely."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, LlavaNextConfig, LlavaNextForConditionalGeneration

from helpers.checkpoints import TABLE, logits, published_7b, read_tensors, write_base
from helpers.llava import tiny_llava
from llava_orpo.checkpoint.published import (
    LM_HEAD,
    CheckpointError,
    check_folder,
    check_load,
    expected_tensors,
    load_checked,
    published_name,
    published_names,
    save_published,
)


@pytest.fixture(scope="module")
def model():
    return tiny_llava(seed=3)


@pytest.fixture
def base(tmp_path, model):
    return write_base(tmp_path / "base", model)


def test_mapping_covers_the_published_7b_exactly():
    with torch.device("meta"):
        state = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(TABLE["config"])).state_dict()
    names = published_names(state)
    assert {name: tuple(state[key].shape) for name, key in names.items()} == published_7b()
    assert expected_tensors(TABLE["config"]) == published_7b()
    assert len(published_7b()) == 687


def test_names_of_every_transformers_layout_lead_to_the_published_one():
    for name in published_7b():
        assert published_name(name) == name
        in_memory_55 = "lm_head.weight" if name == LM_HEAD else "model." + name.replace("model.model", "model")
        written_55 = name if name == LM_HEAD else "model." + name
        for other in (
            in_memory_55,
            written_55,
            in_memory_55.replace("vision_model.", ""),
            name.replace("vision_model.", ""),
        ):
            assert published_name(other) == name


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight.absmax",
        "model.visual.blocks.0.attn.qkv.weight",
    ],
)
def test_unknown_names_are_named(name):
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        published_names(["model.image_newline", name])


def test_two_names_of_one_tensor():
    with pytest.raises(CheckpointError, match="same tensor"):
        published_names(["model.image_newline", "image_newline"])


def test_written_folder_is_whole_and_loads_in_plain_transformers(tmp_path, model, base):
    out = save_published(model, tmp_path / "out", base, max_shard_gb=0.0004)
    tensors = read_tensors(out)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_tensors(model.config.to_dict())
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert max(f.stat().st_size for f in out.glob("model-*.safetensors")) < 420_000
    for file in base.iterdir():  # tokenizer, image settings, chat template, generation config and config alike
        assert (out / file.name).read_bytes() == file.read_bytes()
    check_folder(out)
    AutoProcessor.from_pretrained(out)
    loaded, info = LlavaNextForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(logits(loaded), logits(model))


def test_state_dict_and_dtype(tmp_path, model, base):
    out = save_published(model.state_dict(), tmp_path / "out", base, dtype=torch.bfloat16)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, base))
    assert config["dtype"] == "bfloat16" and before["dtype"] == "float32"
    assert {**config, "dtype": 0, "text_config": 0, "vision_config": 0} == {
        **before,
        "dtype": 0,
        "text_config": 0,
        "vision_config": 0,
    }
    loaded = load_checked(out)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_merged_lora_gives_the_logits_of_base_plus_adapter(tmp_path, base, dtype, tolerance):
    """In bf16, the headline recipe's case, merging rounds to 8 bits of mantissa: 2 % of the logits' norm."""
    model = tiny_llava(seed=5).to(dtype)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        plain, want = logits(tiny_llava(seed=5).to(dtype)), logits(adapted)
    with pytest.raises(CheckpointError, match="merge"):
        save_published(adapted, tmp_path / "out", base)
    got = logits(load_checked(save_published(adapted.merge_and_unload(), tmp_path / "out", base, dtype=dtype)))
    assert (want - plain).abs().max() > 0.1  # the adapter matters
    assert (got - want).norm() <= tolerance * want.norm()


def test_tied_lm_head_is_written_once(tmp_path):
    model = tiny_llava(seed=2)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    out = save_published(model, tmp_path / "out", write_base(tmp_path / "base", model))
    assert LM_HEAD not in read_tensors(out)
    assert torch.equal(logits(load_checked(out)), logits(model))


def test_layout_of_another_transformers_is_refused_not_random(tmp_path, model, base):
    """transformers 5.6 writes `vision_tower.embeddings.*`; 5.5 finds no vision tower there."""
    from safetensors.torch import save_file

    state = {
        name.replace("vision_model.", ""): model.state_dict()[key]
        for name, key in published_names(model.state_dict()).items()
    }
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    check_folder(base)  # whole, only under names this transformers cannot read
    with pytest.raises(CheckpointError, match="missing .*vision_tower.*export the model again"):
        load_checked(base)


def test_check_load_names_everything():
    info = {
        "missing_keys": {"a.b"},
        "unexpected_keys": {"c.d", "x.position_ids"},
        "mismatched_keys": {("e", 1, 2)},
    }
    with pytest.raises(CheckpointError, match=r"missing .*a\.b; unexpected: c\.d; of another shape: \('e', 1, 2\)"):
        check_load(info, "here")
    check_load({"missing_keys": set(), "unexpected_keys": {"x.position_ids"}, "mismatched_keys": set()}, "here")
