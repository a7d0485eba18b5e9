"""scripts/convert_llava_checkpoint.py: weights pass unchanged, either way and back."""

from __future__ import annotations

import json

import convert_llava_checkpoint
import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from helpers.checkpoints import published_7b, read_tensors, write_base
from helpers.commands import exit_code
from helpers.llava import tiny_llava
from helpers.original import VOCABULARY, original_model, original_tensors, write_original
from llava_orpo.checkpoint.files import CheckpointError, read_json
from llava_orpo.checkpoint.published import load_checked, save_published
from llava_orpo.export import convert as conversion
from llava_orpo.export.original_weights import EMBEDDING, LM_HEAD, from_original, padding_rows, to_original


def convert(source, out, files_from=None, vision_tower=None, **options):
    conversion.convert(source, out, conversion.make_plan(source, files_from, vision_tower), **options)
    return out


WEIGHTS = ("safetensors", "bin", "index.json")


def files(folder, ignore=WEIGHTS):
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.endswith(ignore)}


@pytest.fixture(scope="module")
def model():
    return original_model()


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def original(request, tmp_path_factory, model):
    return write_original(tmp_path_factory.mktemp("original") / "llava", model, bins=request.param == "bin")


@pytest.fixture(scope="module")
def converted(original):
    return convert(original, original.parent / "hf", max_shard_gb=0.002)


def test_names_of_the_published_7b_go_back_and_forth():
    originals = [to_original(name) for name in published_7b()]
    assert [from_original(name) for name in originals] == list(published_7b())
    assert {
        "model.embed_tokens.weight",
        "model.layers.31.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.image_newline",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.23.self_attn.q_proj.bias",
    } <= set(originals)


def test_converted_model_is_the_same_model(model, converted):
    loaded, info = LlavaNextForConditionalGeneration.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values())
    assert (loaded.config.text_config.vocab_size, loaded.config.image_token_id) == (32064, 32000)
    assert loaded.config.text_config.model_type == "mistral"
    assert loaded.dtype == torch.bfloat16
    assert len(list(converted.glob("model-*.safetensors"))) > 2
    tensors = read_tensors(converted)
    for name, tensor in original_tensors(model).items():
        assert torch.equal(tensors[from_original(name)][: len(tensor)], tensor), name

    processor = AutoProcessor.from_pretrained(converted)
    image = torch.randint(0, 255, (40, 75, 3), dtype=torch.uint8).numpy()
    inputs = processor(images=image, text="[INST] <image>\nWhat? [/INST]", return_tensors="pt")
    inputs = inputs.to(torch.bfloat16)
    with torch.no_grad():
        ours = loaded(**inputs).logits
        inputs["input_ids"][inputs["input_ids"] == 32000] = model.config.image_token_id
        reference = model(**inputs).logits
    assert torch.equal(ours[..., :VOCABULARY], reference)
    assert reference.float().std() > 0.1


def test_original_to_transformers_and_back_is_bit_exact(model, original, converted, tmp_path):
    back = convert(converted, tmp_path / "back")
    want, got = original_tensors(model), read_tensors(back)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == want[name].dtype for name in want)
    for name, content in files(original).items():
        assert (back / name).read_bytes() == content, name

    again = convert(back, tmp_path / "again")
    want, got = read_tensors(converted), read_tensors(again)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert files(again).keys() == files(converted).keys()
    for name, content in files(converted, ignore=(*WEIGHTS, "converted_from.json")).items():
        assert (again / name).read_bytes() == content, name


def test_transformers_to_original_and_back_is_bit_exact(tmp_path):
    model = tiny_llava(seed=8)
    model.config.image_token_index = model.config.image_token_id = 300  # 300 rows of LLaVA's, 20 behind them
    hf = save_published(model, tmp_path / "hf", write_base(tmp_path / "base", model))
    original = convert(hf, tmp_path / "original")
    assert read_tensors(original)["lm_head.weight"].shape == (300, 64)
    back = convert(original, tmp_path / "back")
    want, got = read_tensors(hf), read_tensors(back)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    for name, content in files(hf).items():
        assert (back / name).read_bytes() == content, name


def test_merged_model_without_sidecar(tmp_path, model, converted):
    """A model tuned after the conversion goes back with --files-from, or with a config made from its own."""
    merged = save_published(load_checked(converted), tmp_path / "merged", converted)
    config = read_json(merged / "config.json")
    config["text_config"]["pad_token_id"] = 32001
    (merged / "config.json").write_text(json.dumps(config))
    original = convert(merged, tmp_path / "original")
    config = read_json(original / "config.json")
    assert config["vocab_size"] == VOCABULARY and config["model_type"] == "llava_mistral"
    assert "pad_token_id" not in config  # a row the original does not have
    assert config["rope_theta"] == 10000.0 and config["num_key_value_heads"] == 2
    got = read_tensors(original)
    assert all(torch.equal(got[name], tensor) for name, tensor in original_tensors(model).items())


def test_files_from_a_published_folder(tmp_path, original, converted):
    donor = tmp_path / "donor"
    donor.mkdir()
    for name, content in files(converted).items():
        (donor / name).write_bytes(content)
    (donor / "chat_template.jinja").write_text("published template")
    out = convert(original, tmp_path / "out", files_from=donor)
    assert (out / "chat_template.jinja").read_text() == "published template"
    load_checked(out)


def test_clip_from_elsewhere(tmp_path, model):
    bare = write_original(tmp_path / "bare", model, tower=False)
    with pytest.raises(CheckpointError, match="give its CLIP folder as --vision-tower"):
        convert(bare, tmp_path / "out")
    out = convert(bare, tmp_path / "out", vision_tower=tmp_path / "clip")
    tensors = read_tensors(out)
    assert all(torch.equal(tensors[from_original(n)][: len(t)], t) for n, t in original_tensors(model).items())


def test_new_rows_follow_the_published_distribution():
    """transformers' conversion draws them from N(mean, 1e-5 covariance) of the embedding's rows."""
    torch.manual_seed(0)
    embedding = torch.randn(500, 6) @ torch.randn(6, 6) + torch.tensor([3.0, -1, 0, 2, 5, 1])
    rows, head = padding_rows(embedding, 20000)
    again, _ = padding_rows(embedding, 20000)
    assert torch.equal(rows, again) and not torch.equal(rows, head)
    mean = embedding.mean(0)
    covariance = 1e-5 * (embedding - mean).T @ (embedding - mean) / 500
    for new in (rows, head):
        torch.testing.assert_close(new.mean(0), mean, rtol=0, atol=5e-4)
        torch.testing.assert_close(new.T.cov(), covariance, rtol=0.05, atol=0.03 * covariance.diag().max().item())


def test_new_rows_in_the_checkpoint(converted):
    tensors = read_tensors(converted)
    for new in (tensors[EMBEDDING][VOCABULARY:], tensors[LM_HEAD][VOCABULARY:]):
        assert new.shape == (64, 32) and len(new.unique(dim=0)) > 1
        mean = tensors[EMBEDDING][:VOCABULARY].float().mean(0)
        assert (new.float() - mean).abs().max() < 6 * (1e-5**0.5) * 0.3


def test_command_line(original, tmp_path, capsys):
    run = [original, tmp_path / "out"]
    assert exit_code(convert_llava_checkpoint.main, *run, "--dry-run") == 0
    line = "model.embed_tokens.weight -> language_model.model.embed_tokens.weight [32064, 32]"
    assert f"{line}  (from [32000, 32])" in capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()

    assert exit_code(convert_llava_checkpoint.main, *run) == 0
    assert "to llava_next: 100%" in capsys.readouterr().err
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert exit_code(convert_llava_checkpoint.main, *run) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "already holds files" in error and error.count("\n") == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == written

    assert exit_code(convert_llava_checkpoint.main, tmp_path / "nothing", tmp_path / "new") == 2
    assert "nothing is not a folder: SOURCE is a checkpoint's folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_help_shows_the_examples_on_lines_of_their_own(capsys):
    assert exit_code(convert_llava_checkpoint.main, "-h") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    command = "python scripts/convert_llava_checkpoint.py"
    assert f"{command} liuhaotian/llava-v1.6-mistral-7b-folder out/llava-v1.6-mistral-7b-hf" in lines
    assert f"{command} out/merged out/merged-original" in lines
