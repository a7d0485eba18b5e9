"""Wrong, half-downloaded or full places: a clear error before long work, nothing half-written looks whole."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from helpers.checkpoints import write_base
from helpers.llava import tiny_llava
from llava_orpo.checkpoint import files as checkpoint_files
from llava_orpo.checkpoint.files import check_output, resolve_model_dir
from llava_orpo.checkpoint.published import CheckpointError, check_folder, load_checked, save_published


@pytest.fixture(scope="module")
def model():
    return tiny_llava(seed=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory, model):
    return write_base(tmp_path_factory.mktemp("base"), model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, base):
    return save_published(model, tmp_path_factory.mktemp("whole") / "out", base, max_shard_gb=0.0004)


@pytest.fixture
def out(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "copy")


def refused(folder, match):
    for use in (check_folder, load_checked):
        with pytest.raises(CheckpointError, match=match):
            use(folder)


def test_half_downloaded_shard(out):
    shard = out / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(out, r"model-00002-of-00003.safetensors \(\d+ bytes\) is not a whole safetensors file")


def test_empty_shard_and_git_lfs_pointer(out):
    shard = out / "model-00001-of-00003.safetensors"
    shard.write_bytes(b"")
    refused(out, "not a whole safetensors file")
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 4943\n")
    refused(out, "Git LFS pointer")


def test_missing_shard(out):
    (out / "model-00003-of-00003.safetensors").unlink()
    refused(out, "model-00003-of-00003.safetensors is missing")


def test_shard_without_a_tensor_of_the_index(out):
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"]["vision_tower.vision_model.extra"] = "model-00001-of-00003.safetensors"
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(out, "lacks vision_tower.vision_model.extra")


def test_config_of_another_size(out):
    config = json.loads((out / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (out / "config.json").write_text(json.dumps(config))
    refused(out, r"missing: language_model.model.layers.3.*and 3 more")
    config["text_config"] |= {"num_hidden_layers": 3, "vocab_size": 384}
    (out / "config.json").write_text(json.dumps(config))
    refused(out, r"wrong shape: .*embed_tokens.weight \(320, 64\) \(expected \(384, 64\)\)")


def test_cut_config_and_other_model_types(out):
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text[:100])
    refused(out, "not readable JSON")
    (out / "config.json").write_text(json.dumps({"model_type": "llava_mistral"}))
    refused(out, "'llava_mistral', not 'llava_next'.*convert_llava_checkpoint.py")
    (out / "config.json").unlink()
    refused(out, "config.json does not exist")


def test_no_weights_at_all(base):
    refused(base, "neither model.safetensors.index.json nor model.safetensors")


def test_missing_processor_files(tmp_path, model, base):
    poor = shutil.copytree(base, tmp_path / "poor")
    (poor / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer \(tokenizer.json\)"):
        save_published(model, tmp_path / "out", poor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poor"]


def test_filled_output_folder_is_kept(tmp_path, model, base):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):  # even asked to overwrite: this is no checkpoint
        with pytest.raises(CheckpointError, match="holds files"):
            save_published(model, out, base, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(out / "thesis.tex")
    with pytest.raises(CheckpointError, match="base model's own folder"):
        save_published(model, base, base, overwrite=True)


def test_overwrite_replaces_the_checkpoint(tmp_path, model, base):
    out = save_published(model, tmp_path / "out", base)
    (out / "stale.txt").write_text("from before")
    with pytest.raises(CheckpointError, match="ask to overwrite"):
        save_published(model, out, base)
    save_published(model, out, base, overwrite=True)
    check_folder(out)
    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_seen_before_writing(tmp_path, model, base, monkeypatch):
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=500_000))
    with pytest.raises(CheckpointError, match=r"Not enough disk space in .*: 0\.00\d GB needed, 0\.001 GB free"):
        save_published(model, tmp_path / "out", base)
    assert not list(tmp_path.iterdir())


def test_failure_while_writing_leaves_what_was_there(tmp_path, model, base, monkeypatch):
    out = save_published(model, tmp_path / "out", base)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real, calls = checkpoint_files.write_tensors, []

    def disk_fills_up(file, *more):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(file, *more)

    monkeypatch.setattr(checkpoint_files, "write_tensors", disk_fills_up)
    with pytest.raises(OSError, match="No space left"):
        save_published(model, out, base, max_shard_gb=0.0004, overwrite=True)
    assert "out.partial" in str(calls[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_leftover_of_a_killed_run_is_replaced(tmp_path, model, base):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    check_folder(save_published(model, tmp_path / "out", base))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_model_that_cannot_be_written(tmp_path, model, base):
    state = model.state_dict()
    with pytest.raises(CheckpointError, match="missing: image_newline"):
        save_published({k: v for k, v in state.items() if "newline" not in k}, tmp_path / "out", base)
    grown = {**state, "lm_head.weight": torch.zeros(384, 64)}
    with pytest.raises(CheckpointError, match=r"lm_head.weight \(384, 64\) \(expected \(320, 64\)\)"):
        save_published(grown, tmp_path / "out", base)
    with pytest.raises(CheckpointError, match="not in memory"):
        save_published({k: v.to("meta") for k, v in state.items()}, tmp_path / "out", base)
    with pytest.raises(CheckpointError, match="mixes torch.bfloat16, torch.float32"):
        save_published(
            {**state, "model.image_newline": state["model.image_newline"].bfloat16()}, tmp_path / "out", base
        )
    assert not list(tmp_path.iterdir())


def test_quantized_base(tmp_path, model, base):
    quantized = shutil.copytree(base, tmp_path / "base")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(CheckpointError, match="name the 16-bit base"):
        save_published(model, tmp_path / "out", quantized)


def test_resolve_model_dir(tmp_path, monkeypatch):
    assert resolve_model_dir(tmp_path) == tmp_path
    for wrong in (tmp_path / "absent", "./absent/model", "absent"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            resolve_model_dir(wrong)
    cached = tmp_path / "hub" / "models--owner--name"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve_model_dir("owner/name", cache_dir=str(tmp_path / "hub")) == snapshot
    with pytest.raises(CheckpointError, match="neither a folder nor reachable on the Hub"):
        resolve_model_dir("owner/other", cache_dir=str(tmp_path / "hub"))
