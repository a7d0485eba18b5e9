"""scripts/gguf.sh: what the GGUF files hold, and (heavy) what llama-server answers from them."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import mistral_common
import pytest
import sentencepiece
from filelock import FileLock
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizerFast

from helpers.checkpoints import published_7b
from helpers.commands import run_script
from helpers.paths import ROOT
from helpers.recipes import CACHE, photo_rows, random_model, write_rows
from llava_orpo import export
from llava_orpo.checkpoint.files import CheckpointError
from llava_orpo.data.conversation import CONVERSATIONS
from llava_orpo.export import gguf
from llava_orpo.export.gguf_folder import write_folder
from llava_orpo.export.original_tokenizer import tokenizer_json

MISTRAL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
TEXTS = (
    "What is in the picture?",
    " two  blanks,\n\na line end and\ta tab",
    "Ünïcödé, 日本語, 🙂 and 12345.678",
    "reee the thethe antidisestablishmentarianism",
)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    """tokenizer.json of the published Mistral checkpoint's vocabulary: 32,000 pieces, <image> and <pad>."""
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(MISTRAL.read_bytes())
    added = {"content": "<image>", "special": True}, {"content": "<pad>", "special": True}
    config = {"added_tokens_decoder": {str(32000 + i): token for i, token in enumerate(added)}}
    return json.loads(tokenizer_json(folder, config))


def as_sentencepiece(words: gguf.Vocabulary) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece with the pieces and scores of a vocabulary: llama.cpp's tokenizer is a port of its BPE."""
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(words.tokens, words.scores, words.types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.add_dummy_prefix = words.space_prefix
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def test_the_scores_split_texts_as_the_tokenizer_does(mistral):
    words = gguf.vocabulary(mistral, 32064, "here")
    assert len(words.tokens) == 32002 and words.adds_bos and words.space_prefix and not words.joined_otherwise
    assert words.tokens[32000:] == ("<image>", "<pad>") and words.types[32000:] == (gguf.CONTROL, gguf.CONTROL)
    from tokenizers import Tokenizer

    exact = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(mistral)))
    port = as_sentencepiece(words)
    for text in TEXTS:
        assert port.encode(text) == exact(text, add_special_tokens=False).input_ids, text
    flat = gguf.Vocabulary(words.tokens, (-1000.0,) * 32002, words.types, True, True, ())  # llama.cpp's own scores
    assert any(as_sentencepiece(flat).encode(text) != port.encode(text) for text in TEXTS)


def test_a_tokenizer_that_does_not_fit_is_refused(mistral):
    with pytest.raises(CheckpointError, match="32002 tokens, but the model has 32000"):
        gguf.vocabulary(mistral, 32000, "here")
    with pytest.raises(CheckpointError, match="without byte fallback"):
        gguf.vocabulary({**mistral, "model": {**mistral["model"], "byte_fallback": False}}, 32064, "here")
    other = {**mistral, "model": {**mistral["model"], "merges": mistral["model"]["merges"][:-1]}}
    assert len(gguf.vocabulary(other, 32064, "here").joined_otherwise) == 1


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_chat_template_writes_the_prompt_around_llama_servers_marker(name):
    conversation = CONVERSATIONS[name]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(gguf.llama_cpp_template(conversation))
    marker = "<__media_a1B2__>"
    for image in (True, False):
        messages = [{"role": "user", "content": f"{marker if image else ''}What?"}]
        found = template.render(messages=messages, add_generation_prompt=True)
        assert found.replace(marker, "<image>") == conversation.render_prompt("What?", image)


def test_the_files_hold_what_the_features_need_and_nothing_behind_it():
    config = {
        "vision_feature_layer": -2,
        "vision_config": {"num_hidden_layers": 24},
        "image_grid_pinpoints": [[336, 672], [672, 336], [1008, 336]],
    }
    assert gguf.image_settings(config) == {
        "block_count": 23,
        "feature_layer": [23],
        "image_grid_pinpoints": gguf.grid_pinpoints(config),
    }
    assert gguf.grid_pinpoints(config) == [672, 336, 336, 672, 336, 1008]  # width first
    vision = [name for name in published_7b() if name.startswith("vision_tower.")]
    left_out = [name for name in vision if not gguf.is_used(name, config)]
    assert len(left_out) == 16 + 2
    assert all(".layers.23." in name or ".post_layernorm." in name for name in left_out)
    rest = {name for name in published_7b() if not name.startswith(("vision_tower.", "language_model."))}
    assert rest == set(gguf.PROJECTOR_NAMES)


def test_adapters_and_quantized_folders_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        gguf.read_model(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llava_next", "quantization_config": {}}')
    with pytest.raises(CheckpointError, match="is quantized"):
        gguf.read_model(tmp_path)


def test_a_gguf_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    programs = tmp_path / "llama.cpp" / "build" / "bin"
    programs.mkdir(parents=True)
    fake = '#!/bin/sh\n[ "$3" = Q8_0 ] && cp "$1" "$2" || { echo "no such type"; exit 1; }\n'
    (programs / "llama-quantize").write_text(fake)
    (programs / "llama-quantize").chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))

    def write(model, out, *_):
        files = [out / "model-f32.gguf", out / "mmproj-f32.gguf"]
        for file in files:
            file.write_text("GGUF")
        return files

    converter = SimpleNamespace(write=write)  # llama.cpp's own packages are in its environment alone
    monkeypatch.setitem(sys.modules, "llava_orpo.export.llama_cpp", converter)
    monkeypatch.setattr(export, "llama_cpp", converter, raising=False)
    out = tmp_path / "out"
    files = write_folder(random_model(), out, ["q8_0"])
    assert files == [out / "model-f32.gguf", out / "mmproj-f32.gguf", out / "model-q8_0.gguf"]
    assert sorted(out.iterdir()) == sorted(files)
    with pytest.raises(CheckpointError, match="q9 failed: no such type"):
        write_folder(random_model(), tmp_path / "broken", ["q8_0", "q9"])
    assert not list(tmp_path.glob("broken*"))
    with pytest.raises(CheckpointError, match="already holds files"):
        write_folder(random_model(), out, [])
    assert len(write_folder(random_model(), out, [], overwrite=True)) == len(list(out.iterdir())) == 2
    with pytest.raises(CheckpointError, match="no mmproj"):
        write_folder(random_model(), programs, [], overwrite=True)
    with pytest.raises(CheckpointError, match="own folder"):
        write_folder(random_model(), random_model(), [], overwrite=True)


@pytest.mark.heavy
def test_llama_server_answers_texts_as_transformers_does(tmp_path):
    """The first run builds llama.cpp: ten minutes of one core."""
    CACHE.mkdir(parents=True, exist_ok=True)
    write_rows(tmp_path, photo_rows(8, 1))
    command = ["bash", str(ROOT / "scripts" / "gguf.sh")]
    with FileLock(CACHE / "venv-gguf.lock"):
        run(*command, random_model(), tmp_path / "gguf", "q8_0")
    assert (tmp_path / "gguf" / "model-q8_0.gguf").stat().st_size < (
        tmp_path / "gguf" / "model-f32.gguf"
    ).stat().st_size
    assert written(tmp_path / "gguf" / "mmproj-f32.gguf", "block_count", "feature_layer") == [2, [2]]  # of three layers
    out, gguf_folder = tmp_path / "out", f"gguf={tmp_path / 'gguf'}"
    words = [gguf_folder, f"data={tmp_path / 'rows.parquet'}", "rows=8", "max_new_tokens=24", f"output_dir={out}"]
    run(*command, "compare", random_model(), *words)
    texts = json.loads((out / "parity.json").read_text())["texts"]
    assert texts["prompt_tokens_equal"] == texts["answers_equal"]["count"] == 8
    assert texts["answer_logp_difference"] < 1e-4


def written(file: Path, *keys: str) -> list:
    """Keys of clip.vision in a GGUF file, read by llama.cpp's own reader."""
    folder = ROOT / "outputs" / "test-cache" / "venv-gguf"
    code = "import gguf, json, sys; f = gguf.GGUFReader(sys.argv[1]).fields; "
    code += "print(json.dumps([f['clip.vision.' + k].contents() for k in sys.argv[2:]]))"
    env = {**os.environ, "PYTHONPATH": str(folder / "llama.cpp" / "gguf-py")}
    words = [str(folder / "bin" / "python"), "-c", code, str(file), *keys]
    return json.loads(subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout)


run = functools.partial(run_script, GGUF_VENV="outputs/test-cache/venv-gguf")
