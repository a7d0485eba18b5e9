"""Converting checkpoints: config, tokenizer and chat template of each family, bad input, memory."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import sentencepiece
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoProcessor, AutoTokenizer

from helpers.checkpoints import TABLE, published_7b
from helpers.original import original_config, original_model, write_original
from helpers.tokenizers import SENTENCEPIECE
from llava_orpo.checkpoint import files as checkpoint_files
from llava_orpo.checkpoint.published import CheckpointError, expected_tensors
from llava_orpo.data.conversation import CONVERSATIONS
from llava_orpo.export import convert
from llava_orpo.export.original_files import CLIP_L_336, chat_template, family, make_next_files, next_config

PIECES = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))
PUBLISHED = {  # liuhaotian/llava-v1.6-*: what config.json says of the LLM
    "mistral-7b": {"model_type": "llava_mistral", "intermediate_size": 14336, "num_key_value_heads": 8},
    "vicuna-7b": {"model_type": "llava", "intermediate_size": 11008, "num_key_value_heads": 32},
    "vicuna-13b": {
        "model_type": "llava",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
    },
    "34b": {
        "model_type": "llava",
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
    },
}
SHARED = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}


def published_original(name):
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = original_config(original_model(num_hidden_layers=1))
    return {**config, "image_grid_pinpoints": pinpoints, **SHARED, **PUBLISHED[name]}


def add_pieces(model: Path, count: int):
    """Lengthen a SentencePiece model to the 64,000 pieces of Yi."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    for number in range(count):
        proto.pieces.add(piece=f"\ue000{number}", score=-1e6 - number)
    model.write_bytes(proto.SerializeToString())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("original") / "llava", original_model())


def test_mistral_config_is_that_of_the_published_checkpoint():
    original = published_original("mistral-7b") | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    }
    config = next_config(original, dict(CLIP_L_336), 32000, 32064)
    assert expected_tensors(config) == published_7b()
    for key, value in TABLE["config"].items():
        if key not in ("text_config", "torch_dtype"):
            assert config[key] == value, key
    for key, value in TABLE["config"]["text_config"].items():
        assert config["text_config"][key] == value, key


@pytest.mark.parametrize(
    "name, rows, image, conversation",
    [
        ("mistral-7b", 32064, 32000, "llava_v16_mistral"),
        ("vicuna-7b", 32064, 32000, "llava_v16_vicuna"),
        ("vicuna-13b", 32064, 32000, "llava_v16_vicuna"),
        ("34b", 64064, 64000, "llava_v16_34b"),
    ],
)
def test_families(name, rows, image, conversation, original, tmp_path):
    config = published_original(name)
    if name == "34b":
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(original / file, tmp_path)
        add_pieces(tmp_path / "tokenizer.model", 32000)
        original = tmp_path
    files = make_next_files(original, config, None)
    made = json.loads(files["config.json"])
    assert made["image_token_index"] == image
    shapes = expected_tensors(made)
    width = config["hidden_size"]
    assert shapes["language_model.lm_head.weight"] == (rows, width)
    heads = config["num_key_value_heads"] * width // config["num_attention_heads"]
    assert shapes["language_model.model.layers.1.self_attn.k_proj.weight"] == (heads, width)
    assert len(shapes) == 396 + 9 * config["num_hidden_layers"] + 3
    assert family(config).name == conversation
    tokens = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert tokens[str(image)]["content"] == "<image>"
    assert (str(image + 1) in tokens) == (name == "mistral-7b")  # <pad>
    assert Tokenizer.from_str(files["tokenizer.json"]).token_to_id("<image>") == image


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_chat_template_renders_the_conversation(conversation):
    template = jinja2.Environment().from_string(chat_template(conversation))
    question, answer = "Is {{ this }} a\n'cat'?", 'No,\n"none".'
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    prompt = conversation.render_prompt(question, has_image=True)
    assert template.render(messages=[user], add_generation_prompt=True) == prompt
    whole = prompt + conversation.render_response(answer)
    assert template.render(messages=[user, assistant]) == whole
    second = {"role": "user", "content": "Sure?"}
    messages = [{"role": "system", "content": "Be brief."}, user, assistant, second]
    turns = conversation.render_prompt("Sure?", has_image=True, system="Be brief.", history=[(question, answer)])
    assert template.render(messages=messages, add_generation_prompt=True) == turns


@pytest.fixture(scope="module")
def converted(original):
    out = original.parent / "hf"
    convert.convert(original, out, convert.make_plan(original, None, None))
    return out


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


PARTS = st.sampled_from([" ", "  ", "\n", "[INST]", "<", "s>", "the", "▁", "é", "猫", "🐈"])
TEXT = st.text() | st.lists(PARTS).map("".join)


@pytest.mark.parametrize("legacy", [True, False, None])
def test_tokenizer_is_of_the_published_kind_whatever_the_original_says(original, copy, legacy):
    """Vicuna's tokenizer_config.json says `legacy: false`, yet LLaVA trains on a mark after <image>. The ids that
    transformers records of llava-hf/llava-1.5-7b-hf, which has Vicuna's tokenizer, have a mark on either side too:
    29901, 29871, 32000, 29871, 13 for ": <image>\\n" (its tests/models/llava/test_processor_llava.py)."""
    settings = json.loads((copy / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    if legacy is None:
        del settings["legacy"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    files = make_next_files(copy, published_original("vicuna-7b"), None)
    assert json.loads(files["tokenizer_config.json"])["legacy"] is True
    assert files["tokenizer.json"] == make_next_files(original, published_original("vicuna-7b"), None)["tokenizer.json"]
    described = json.loads(files["tokenizer.json"])
    assert described["pre_tokenizer"] is None
    assert described["normalizer"] == {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    ids = Tokenizer.from_str(files["tokenizer.json"]).encode("USER: <image>\nWhat?").ids
    assert ids == [1, *PIECES.encode("USER: "), 32000, *PIECES.encode("\nWhat?")] and ids.count(28705) == 2


@given(TEXT, TEXT)
@example("[INST] ", "\nWhat is this? [/INST]")
@example("", "  two\n\nlines")
@settings(deadline=None)
def test_ids_are_those_llava_itself_trains_on(tokenizer, before, after):
    """LLaVA's tokenizer_image_token encodes what stands before and after <image>, each by itself."""
    assume(not any(token in before + after for token in ("<s>", "</s>", "<unk>", "<image>", "<pad>")))
    want = [1, *PIECES.encode(before), 32000, *PIECES.encode(after)]
    assert tokenizer(f"{before}<image>{after}").input_ids == want


def test_converted_processor(converted):
    processor = AutoProcessor.from_pretrained(converted)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    assert processor.tokenizer.pad_token == "<pad>" and processor.patch_size == 14
    assert processor.image_processor.image_grid_pinpoints == [
        [28, 56],
        [56, 28],
        [56, 56],
        [84, 28],
        [28, 84],
    ]
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    assert processor.apply_chat_template([user]) == "[INST] <image>\nWhat? [/INST]"


def refused(folder, match, tmp_path, **options):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=match):
        convert.convert(folder, tmp_path / "out", convert.make_plan(folder, None, None), **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture
def copy(tmp_path, original):
    return shutil.copytree(original, tmp_path / "copy")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_other_checkpoints(copy, tmp_path):
    edit_config(copy, image_aspect_ratio="pad")
    refused(copy, "not of LLaVA-1.6: image_aspect_ratio is 'pad', not 'anyres'", tmp_path)
    edit_config(copy, model_type="qwen2_vl")
    refused(copy, "model type 'qwen2_vl', neither llava_next nor LLaVA's", tmp_path)
    (copy / "config.json").unlink()
    refused(copy, "config.json does not exist", tmp_path)


def test_half_downloaded(copy, tmp_path):
    shard = copy / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(
        copy, r"00002-of-00003.safetensors \(\d+ bytes\) is not a whole safetensors file .* half-downloaded", tmp_path
    )
    shard.unlink()
    refused(copy, "00002-of-00003.safetensors is missing", tmp_path)


def test_half_downloaded_or_unsafe_bin(tmp_path):
    folder = write_original(tmp_path / "bins", original_model(), bins=True)
    shard = folder / "pytorch_model-00002-of-00003.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(folder, "00002-of-00003.bin cannot be read .* half-downloaded", tmp_path)
    torch.save({"model.norm.weight": Path("/")}, shard)
    refused(folder, "not safe to unpickle", tmp_path)
    shard.unlink()
    refused(folder, "00002-of-00003.bin is missing", tmp_path)


def test_wrong_sizes_and_unmapped_names(copy, tmp_path):
    edit_config(copy, intermediate_size=64)
    refused(copy, r"wrong shape: .*mlp.down_proj.weight \(32, 48\) \(expected \(32, 64\)\)", tmp_path)
    edit_config(copy, intermediate_size=48, vocab_size=32001)
    refused(copy, "<image> is token 32000 after tokenizer.model's 32000, not 32001", tmp_path)
    edit_config(copy, vocab_size=32000)
    extra = {
        "model.vision_resampler.proj": torch.zeros(2),
        "model.layers.0.mlp.router.weight": torch.zeros(2),
    }
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(extra, copy / "extra.safetensors")
    match = "No place for 2 of the original tensors: model.layers.0.mlp.router.weight, model.vision_resampler"
    refused(copy, match, tmp_path)


def test_full_disk_and_filled_folder(original, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    refused(original, "already holds files", tmp_path)
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    refused(original, "Not enough disk space", tmp_path)


def anonymous_memory():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory the Linux way")
@pytest.mark.parametrize("bins", [False, True])
def test_memory_is_about_one_shard(tmp_path, bins):
    """300 MB pass in shards of 20 MB (the largest tensor has 15 MB)."""
    model = original_model(intermediate_size=120_000, num_hidden_layers=13)
    source = write_original(tmp_path / "llava", model, shards=15, bins=bins)
    size = sum(file.stat().st_size for file in source.glob("*-of-*"))
    del model
    plan = convert.make_plan(source, None, None)
    peak, done, start = [0], threading.Event(), anonymous_memory()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert.convert(source, tmp_path / "out", plan, max_shard_gb=0.02)
    done.set()
    watcher.join()
    assert size > 290e6
    assert peak[0] - start < 80e6, f"{(peak[0] - start) / 1e6:.0f} MB"
