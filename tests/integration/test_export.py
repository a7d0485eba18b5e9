"""`llamafactory-cli export`: one command, tensor by tensor where it can, with the files of a merge in memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from llamafactory.train.tuner import export_model
from safetensors.torch import load_file, save_file

from helpers.recipes import random_model
from helpers.serving import random_adapter
from llava_orpo import autoload
from llava_orpo.checkpoint.files import CheckpointError
from llava_orpo.checkpoint.merge import NotStreamed, StreamedMerge
from llava_orpo.checkpoint.published import check_folder
from llava_orpo.export import model_card
from llava_orpo.integration import export
from llava_orpo.preference import records


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base in float16 whose config names bfloat16 too, as the published one; adapter on decoder and projector)"""
    folder = tmp_path_factory.mktemp("made")
    base = shutil.copytree(random_model(), folder / "base")
    weights = load_file(base / "model.safetensors")
    save_file({n: w.half() for n, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["dtype"], config["text_config"]["dtype"] = "float16", "bfloat16"
    (base / "config.json").write_text(json.dumps(config))
    return base, random_adapter(base, folder / "adapter")


def run(made, out: Path, **keys) -> Path:
    autoload.install()
    base, adapter = made
    given = {"plugins": "llava_orpo", "template": "llava_v16_mistral", "model_name_or_path": str(base)}
    given |= {"adapter_name_or_path": str(adapter), "export_dir": str(out), "export_device": "cpu"}
    export_model({key: value for key, value in {**given, **keys}.items() if value is not None})
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_memory(monkeypatch, why: str = "a test asks for it") -> None:
    def refuse(*args):
        raise NotStreamed(why)

    monkeypatch.setattr(export, "streamed", refuse)


@pytest.fixture
def whole_loads(monkeypatch):
    """How many times the whole model was loaded."""
    from transformers import LlavaNextForConditionalGeneration as Model

    count, load = [], Model.from_pretrained.__func__
    monkeypatch.setattr(
        Model, "from_pretrained", classmethod(lambda cls, *a, **k: count.append(1) or load(cls, *a, **k))
    )
    return count


@pytest.mark.parametrize("asked", ["bfloat16", "float32", "auto"])
def test_every_file_is_that_of_the_export_from_memory(tmp_path, made, monkeypatch, whole_loads, asked):
    found = contents(run(made, tmp_path / "streamed" / "merged", infer_dtype=asked))
    assert not whole_loads
    in_memory(monkeypatch)
    expected = contents(run(made, tmp_path / "whole" / "merged", infer_dtype=asked))
    assert whole_loads
    assert found == expected and {"README.md", "Modelfile", "chat_template.jinja", "tokenizer.json"} <= found.keys()
    check_folder(tmp_path / "streamed" / "merged")
    kind = torch.float16 if asked == "auto" else getattr(torch, asked)
    weights = load_file(tmp_path / "streamed" / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {kind}
    base = load_file(made[0] / "model.safetensors")
    assert sum(not torch.equal(weights[name], base[name].to(kind)) for name in base) == 7  # 2 layers of 3, linear_1


def test_without_an_adapter_only_the_dtype_changes(tmp_path, made, whole_loads):
    out = run(made, tmp_path / "cast", adapter_name_or_path=None, infer_dtype="bfloat16")
    weights, base = (load_file(folder / "model.safetensors") for folder in (out, made[0]))
    assert not whole_loads and all(torch.equal(weights[name], base[name].bfloat16()) for name in base)


def test_what_cannot_be_streamed_is_said_and_done_in_memory(tmp_path, made, whole_loads, caplog, monkeypatch):
    lines = []
    monkeypatch.setattr(export.logger, "info_rank0", lines.append)
    out = run(made, tmp_path / "auto", infer_dtype="bfloat16", export_device="auto")
    assert whole_loads and lines == [
        "The whole model is loaded for the merge: `export_device: auto` merges on whatever device there is."
    ]
    streamed = run(made, tmp_path / "cpu", infer_dtype="bfloat16")
    assert contents(out)["model.safetensors"] == contents(streamed)["model.safetensors"]  # there is no GPU here
    assert lines[1:] == []


def test_an_interrupted_merge_leaves_no_half_folder(tmp_path, made, monkeypatch):
    out = run(made, tmp_path / "out", infer_dtype="bfloat16")
    before, fetch, calls = contents(out), StreamedMerge.fetch, []

    def interrupted(self, name, dtype):
        calls.append(name)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return fetch(self, name, dtype)

    monkeypatch.setattr(StreamedMerge, "fetch", interrupted)
    for where, keys in ((out, {"overwrite_export_dir": True}), (tmp_path / "new", {})):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            run(made, where, infer_dtype="float32", **keys)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and contents(out) == before
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="already holds files"):
        run(made, out, infer_dtype="float32")
    run(made, out, infer_dtype="float32", overwrite_export_dir=True)
    assert contents(out)["model.safetensors"] != before["model.safetensors"]


def test_a_quantized_base_and_the_bases_own_folder_are_refused(tmp_path, made):
    base = shutil.copytree(made[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(CheckpointError, match="is a quantized checkpoint; name the 16-bit base"):
        run((base, made[1]), tmp_path / "out", adapter_name_or_path=None)
    with pytest.raises(CheckpointError, match="base model's own folder"):
        run(made, made[0], overwrite_export_dir=True)
    assert not (tmp_path / "out").exists() and (made[0] / "model.safetensors").is_file()


class Hub:
    """Stands for huggingface_hub.HfApi; nothing leaves the machine."""

    calls: list = []
    has_card = False

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repository, **keys):
        self.calls.append(("create_repo", repository, keys))

    def file_exists(self, repository, name):
        return self.has_card

    def upload_folder(self, repo_id, folder_path, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        names = [path.name for path in Path(folder_path).iterdir()]
        self.calls.append(("upload", repo_id, sorted(filter_repo_objects(names, ignore_patterns=ignore_patterns))))
        return f"https://huggingface.co/{repo_id}"


@pytest.mark.parametrize("how", ["streamed", "in memory"])
def test_pushes_what_was_written(tmp_path, made, monkeypatch, how):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    if how == "in memory":
        in_memory(monkeypatch)
    keys = {"export_hub_model_id": "me/model", "hf_hub_token": "hf_secret", "infer_dtype": "bfloat16"}
    out = run(made, tmp_path / "out", **keys)
    assert Hub.calls[:2] == [("token", "hf_secret"), ("create_repo", "me/model", {"private": None, "exist_ok": True})]
    (_, repository, uploaded), *more = Hub.calls[2:]
    assert repository == "me/model" and more == []
    assert set(uploaded) == {path.name for path in out.iterdir()} - {"Modelfile"}  # written after the upload
    assert 'from_pretrained("me/model"' in (out / "README.md").read_text()
    assert "hf_secret" not in (out / "README.md").read_text()
    monkeypatch.setattr(Hub, "has_card", True)
    run(made, out, overwrite_export_dir=True, **keys)
    assert "README.md" not in Hub.calls[-1][2], "the card of the repository may be somebody's own text"


def test_weights_of_a_hub_id_are_found_in_the_cache(tmp_path, made, monkeypatch, whole_loads):
    cached = tmp_path / "hub" / "models--owner--name"
    snapshot = cached / "snapshots" / ("a" * 40)
    shutil.copytree(made[0], snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    keys = {"cache_dir": str(tmp_path / "hub"), "infer_dtype": "bfloat16", "adapter_name_or_path": None}
    out = run(made, tmp_path / "out", model_name_or_path="owner/name", **keys)
    assert not whole_loads
    same = run(made, tmp_path / "same", infer_dtype="bfloat16", adapter_name_or_path=None)
    assert contents(out)["model.safetensors"] == contents(same)["model.safetensors"]
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors"):
        run(made, tmp_path / "none", model_name_or_path="owner/name", **keys)
    assert not (tmp_path / "none").exists()


def note(folder: Path, registry: Path) -> dict:
    """What a training leaves beside its adapter; returns its recipe."""
    (registry / "dataset_info.json").write_text(json.dumps({"pairs": {"hf_hub_url": "openbmb/RLAIF-V-Dataset"}}))
    recipe = {"model_name_or_path": "/home/me/base", "dataset": "pairs", "dataset_dir": str(registry), "lora_rank": 4}
    recipe |= {"pref_loss": "orpo", "output_dir": "/home/me/private/out", "hf_hub_token": "hf_secret"}
    model_card.note_training(folder, recipe)
    for step, accuracy in ((0, 0.5), (100, 0.75), (200, 0.8)):
        metrics = {"n": 40, "logps/margin": 0.1, "sft_loss": 1.0, "preference_accuracy": accuracy}
        metrics |= {"preference_accuracy_low": accuracy - 0.1, "preference_accuracy_high": accuracy + 0.1}
        entry = {"step": step, "epoch": 1.0, "dataset": "pairs_heldout", "metrics": metrics}
        records.append_history(folder / "preference_eval.json", entry)
    return recipe


def test_the_card_says_what_the_model_was_made_from(tmp_path, made):
    adapter = shutil.copytree(made[1], tmp_path / "run")
    recipe = note(adapter, tmp_path)
    text = (run((made[0], adapter), tmp_path / "out") / "README.md").read_text()
    code = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert f"- Adapter: run, SHA-256 of adapter_model.safetensors: `{code}`" in text and "- Base: base\n" in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown.keys() == recipe.keys() - {"hf_hub_token"} and shown["lora_rank"] == 4
    assert shown["output_dir"] == "out" and shown["model_name_or_path"] == "base"
    meta = yaml.safe_load(text.split("---\n")[1])
    assert meta["datasets"] == ["openbmb/RLAIF-V-Dataset"] and meta["license"] == "cc-by-nc-4.0"
    assert "| step 200 | 40 | 80.0 % (70.0 to 90.0) |" in text and "| before | 40 | 50.0 %" in text
    assert "secret" not in text and "/home/me" not in text and str(tmp_path) not in text


def test_the_card_of_a_checkpoint_tells_its_own_step(tmp_path, made):
    folder = tmp_path / "run" / "checkpoint-100"
    shutil.copytree(made[1], folder)
    note(tmp_path / "run", tmp_path)
    text = model_card.merged_card("merged", "owner/base", made[0], [folder])
    assert "| step 100 | 40 | 75.0 %" in text and "step 200" not in text
    assert "base_model: owner/base" in text and "- Adapter: checkpoint-100, SHA-256" in text


def test_what_is_not_known_is_said(tmp_path, made):
    text = model_card.merged_card("merged", str(made[0]), made[0], [made[1]])
    assert "The recipe and the data of the training are not known" in text and "No evaluation was given" in text
    assert str(made[0].parent) not in text and "SHA-256" in text
    (tmp_path / "README.md").write_text(text)
    assert model_card.is_stock(tmp_path / "README.md"), "scripts/model_card.py may write it again"
    assert model_card.origin_of(tmp_path / "README.md") == model_card.made_from(str(made[0]), [made[1]])
    assert model_card.origin_of(tmp_path / "none.md") == ""
