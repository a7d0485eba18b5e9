"""checkpoint/merge.py: the merge tensor by tensor is bit for bit PEFT's merge of the loaded model."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from helpers.checkpoints import read_tensors, write_base
from helpers.llava import tiny_llava
from llava_orpo.checkpoint import files, merge
from llava_orpo.checkpoint.files import CheckpointError
from llava_orpo.checkpoint.merge import NotStreamed, StreamedMerge
from llava_orpo.checkpoint.published import published_names, save_published, write_published

LANGUAGE_AND_PROJECTOR = ["q_proj", "v_proj", "down_proj", "linear_1"]
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"linear_1": 3}, "fan_in_fan_out": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
    "some layers": {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_base(folder: Path, dtype: torch.dtype = torch.float32, shard_gb: float = 0.0004, tied: bool = False) -> Path:
    model = tiny_llava(seed=3).to(dtype)
    if tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return save_published(
        model, folder, write_base(folder.with_name(folder.name + "-files"), model), max_shard_gb=shard_gb
    )


def make_adapter(folder: Path, base: Path, seed: int = 1, **settings) -> Path:
    """A trained adapter: everything it stores differs from its start."""
    torch.manual_seed(seed)
    keys = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    keys |= {"target_modules": LANGUAGE_AND_PROJECTOR, **settings}
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    model = get_peft_model(model, LoraConfig(**keys))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_in_memory(base: Path, adapters: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What transformers and PEFT make of it, by published name: an independent reference."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    state = model.state_dict()
    return {name: state[key].to(dtype) for name, key in published_names(state).items()}


def streamed(base: Path, adapters: list[Path], dtype: torch.dtype, out: Path, shard_gb: float = 5.0) -> Path:
    todo = StreamedMerge(base, adapters)
    keys = {"dtype": dtype, "max_shard_gb": shard_gb, "overwrite": False}
    return write_published(out, todo.base, todo.shapes, lambda name: todo.fetch(name, dtype), **keys)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [n for n in expected if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert different == []


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(folder / name, dtype) for name, dtype in DTYPES.items()}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("stored", "written"), [("fp32", "fp32"), ("fp16", "bf16")])
def test_every_tensor_is_that_of_the_merge_in_memory(tmp_path, bases, kind, stored, written):
    base, dtype = bases[stored], DTYPES[written]
    adapter = make_adapter(tmp_path / "adapter", base, **ADAPTERS[kind])
    expected = merged_in_memory(base, [adapter], dtype)
    assert_equal(read_tensors(streamed(base, [adapter], dtype, tmp_path / "out", shard_gb=0.0004)), expected)
    untouched = merged_in_memory(base, [], dtype)
    changed = sum(not torch.equal(expected[name], untouched[name]) for name in expected)
    assert changed == len(StreamedMerge(base, [adapter])._adapters[0].changed) > 1


def test_two_adapters_one_after_the_other(tmp_path, bases):
    one = make_adapter(tmp_path / "one", bases["fp16"])
    two = make_adapter(tmp_path / "two", bases["fp16"], seed=2, use_dora=True, target_modules=["q_proj", "up_proj"])
    found = read_tensors(streamed(bases["fp16"], [one, two], torch.bfloat16, tmp_path / "out"))
    assert_equal(found, merged_in_memory(bases["fp16"], [one, two], torch.bfloat16))
    other_way = merged_in_memory(bases["fp16"], [two, one], torch.bfloat16)
    assert any(not torch.equal(found[name], other_way[name]) for name in found)


def test_adapters_in_16_bit_and_of_an_older_peft(tmp_path, bases):
    adapter = make_adapter(tmp_path / "adapter", bases["bf16"], use_dora=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({n: w.bfloat16() for n, w in weights.items()}, adapter / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    for key in ("arrow_config", "lora_bias", "use_qalora", "trainable_token_indices", "target_parameters"):
        del settings[key]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = read_tensors(streamed(bases["bf16"], [adapter], torch.bfloat16, tmp_path / "out"))
    assert_equal(found, merged_in_memory(bases["bf16"], [adapter], torch.bfloat16))


def test_other_names_dtypes_and_a_single_file(tmp_path, bases):
    """A base as transformers 5.5 writes it itself: its own tensor names, and weights wider than its config says."""
    base = tmp_path / "base"
    shutil.copytree(bases["fp16"], base, ignore=shutil.ignore_patterns("model*"))
    state = {f"model.{n}" if "lm_head" not in n else n: w.float() for n, w in read_tensors(bases["fp32"]).items()}
    state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as old writers stored it
    save_file(state, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = merged_in_memory(base, [adapter], torch.bfloat16)
    assert_equal(read_tensors(streamed(base, [adapter], torch.bfloat16, tmp_path / "out")), expected)
    from_fp32 = merged_in_memory(bases["fp32"], [adapter], torch.bfloat16)
    assert any(not torch.equal(expected[n], from_fp32[n]) for n in expected), "fp16 comes first, as transformers loads"


def test_a_config_without_a_dtype(tmp_path, bases):
    base = shutil.copytree(bases["bf16"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(tmp_path / "adapter", base)
    found = read_tensors(streamed(base, [adapter], torch.float32, tmp_path / "out"))
    assert_equal(found, merged_in_memory(base, [adapter], torch.float32))


def test_tied_embeddings(tmp_path):
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base)
    expected = merged_in_memory(base, [adapter], torch.float32)
    expected.pop("language_model.lm_head.weight")
    assert_equal(read_tensors(streamed(base, [adapter], torch.float32, tmp_path / "out")), expected)
    touching = make_adapter(tmp_path / "touching", base, target_modules=["embed_tokens"])
    with pytest.raises(NotStreamed, match="the LM head shares"):
        StreamedMerge(base, [touching])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"bias": "all"}, "`bias: all`"),
        ({"lora_bias": True, "target_modules": ["linear_1"]}, "`lora_bias: True`"),
        ({"trainable_token_indices": [1, 2]}, "`trainable_token_indices: "),
        ({"target_modules": ["patch_embedding"]}, "Conv2d layers"),
    ],
)
def test_what_needs_the_whole_model_is_named(tmp_path, bases, settings, why):
    adapter = make_adapter(tmp_path / "adapter", bases["fp32"], **settings)
    with pytest.raises(NotStreamed, match=why):
        StreamedMerge(bases["fp32"], [adapter])


def edited(adapter: Path, keys: dict | None = None, weights=lambda given: given) -> Path:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **(keys or {})}))
    file = adapter / "adapter_model.safetensors"
    save_file(weights(load_file(file)), file, {"format": "pt"})
    return adapter


def test_starts_that_change_the_base_and_tensors_beside_the_layers(tmp_path, bases):
    adapter = edited(make_adapter(tmp_path / "pissa", bases["fp32"]), {"init_lora_weights": "pissa"})
    with pytest.raises(NotStreamed, match="`init_lora_weights: pissa` changes the base"):
        StreamedMerge(bases["fp32"], [adapter])
    head = {"base_model.model.lm_head.weight": torch.zeros(320, 64)}
    adapter = edited(make_adapter(tmp_path / "more", bases["fp32"]), weights=lambda given: given | head)
    with pytest.raises(NotStreamed, match=r"more than its layers' weights \(base_model.model.lm_head.weight\)"):
        StreamedMerge(bases["fp32"], [adapter])


def test_an_adapter_without_some_weights_is_refused(tmp_path, bases):
    """PEFT warns and merges the rest."""
    adapter = make_adapter(tmp_path / "adapter", bases["fp32"])
    edited(adapter, weights=lambda given: {n: w for n, w in given.items() if "layers.1" not in n})
    with pytest.raises(CheckpointError, match=r"lacks 10 weights of its layers in this model: .*layers\.1\."):
        StreamedMerge(bases["fp32"], [adapter])


def test_half_a_base_is_refused_before_anything_is_written(tmp_path, bases):
    base = shutil.copytree(bases["fp32"], tmp_path / "base")
    next(base.glob("model-00002*")).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        StreamedMerge(base, [])
    pickled = shutil.copytree(bases["fp32"], tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors*"))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotStreamed, match="not in safetensors files"):
        StreamedMerge(pickled, [])


def test_one_tensor_is_in_memory_at_a_time(tmp_path, bases, monkeypatch):
    """Of what was read, no more than one weight and its adapter is alive, and nothing after it was written."""
    adapter = make_adapter(tmp_path / "adapter", bases["fp32"], use_dora=True)
    alive, most, read = [0], [0], merge._read

    def counted(*arguments):
        tensor = read(*arguments)
        storage, size = tensor.untyped_storage(), tensor.nbytes
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(storage, lambda: alive.__setitem__(0, alive[0] - size))
        return tensor

    monkeypatch.setattr(merge, "_read", counted)
    out = streamed(bases["fp32"], [adapter], torch.float32, tmp_path / "out")
    largest = max(tensor.nbytes for tensor in read_tensors(out).values())
    whole = sum(tensor.nbytes for tensor in read_tensors(out).values())
    assert largest <= most[0] < 2 * largest < whole / 3
    assert alive[0] == 0


def test_files_are_byte_for_byte_those_of_safetensors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=generator),
        "a.half": torch.randn(7, generator=generator).half(),
        "ünïcode": torch.randn(2, 2, generator=generator),
        "c.scalar": torch.tensor(2.5),
        "d.empty": torch.zeros(0, 4),
        "e.ids": torch.arange(5),
        "f.packed": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "g.flags": torch.tensor([True, False, True]),
    }
    planned = {name: tensor.to("meta") for name, tensor in tensors.items()}
    for names in (["b.weight"], ["b.weight", "ünïcode", "c.scalar"], list(tensors)):
        files.write_tensors(tmp_path / "ours", {name: planned[name] for name in names}, tensors.__getitem__)
        save_file({name: tensors[name] for name in names}, tmp_path / "theirs", {"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes(), names
    with pytest.raises(CheckpointError, match=r"a.half is torch.float32 \(7,\); torch.float16 \(7,\) was planned"):
        files.write_tensors(tmp_path / "ours", {"a.half": planned["a.half"]}, lambda name: tensors[name].float())
