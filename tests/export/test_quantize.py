"""scripts/quantize.py: what is refused, what calibration reads, and (slow) whole runs in its environment."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quantize
import torch
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.commands import exit_code, run_script
from helpers.paths import ROOT
from helpers.recipes import CACHE, photo_rows, random_model, write_rows
from llava_orpo.checkpoint.files import CheckpointError, processor_files
from llava_orpo.checkpoint.published import load_checked
from llava_orpo.data import images, rows
from llava_orpo.export import calibration
from llava_orpo.export.quantized_folder import is_quantized
from llava_orpo.tiny.random_model import Geometry, write

# As many key-value heads as heads: AWQ then also smooths v_proj into o_proj, as for Vicuna.
WIDE = Geometry((128, 384, 2, 4, 4), (32, 64, 3, 2), tile=56)
TRAINED = ROOT / "outputs" / "tiny" / "merged"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder, photo_rows(6, 2))
    return folder


@pytest.fixture
def refused(monkeypatch, capsys, data, tmp_path):
    """Runs quantize and gives the message; fails if a model was loaded or something left behind."""

    def load(*_args, **_kwargs):
        raise AssertionError("the model was loaded before the input was refused")

    monkeypatch.setattr("llava_orpo.export.quantize.load_checked", load)

    def run(*words, model=None, source="rows", out=None, code=1):
        out = out or tmp_path / "out"
        before = sorted(out.parent.rglob("*"))
        argv = [
            "--model",
            model or random_model(),
            "--method",
            "gptq",
            "--data",
            source,
            "--out",
            out,
            "--dataset-dir",
            data,
            *words,
        ]
        capsys.readouterr()
        assert exit_code(quantize.main, *argv) == code
        assert sorted(out.parent.rglob("*")) == before
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return run


def test_wrong_models_are_refused(refused, tmp_path):
    assert "nothing is not a folder: --model is the folder" in refused(model=tmp_path / "nothing", code=2)
    original = tmp_path / "original"
    original.mkdir()
    assert "config.json does not exist" in refused(model=original)
    (original / "config.json").write_text('{"model_type": "llava_mistral"}')
    assert "convert_llava_checkpoint.py" in refused(model=original)
    (original / "config.json").write_text('{"model_type": "llava_next", "quantization_config": {}}')
    assert "quantized already" in refused(model=original)


def test_half_a_model_is_refused(refused, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for file in random_model().iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:-1000])
    assert "half-downloaded" in refused("--group-size", "64", model=half)


def test_widths_that_do_not_fit_the_groups_are_refused_with_the_size_that_fits(refused):
    message = refused()
    assert "layers with 64 inputs" in message and "--group-size 64" in message


def test_outputs_are_not_overwritten(refused, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    assert "already holds files" in refused("--group-size", "64", out=taken)
    (taken / "config.json").rename(taken / "notes.txt")
    assert "remove it yourself" in refused("--group-size", "64", "--overwrite", out=taken)
    model = random_model()
    assert "own folder" in refused("--group-size", "64", "--overwrite", model=model, out=model)


def test_wrong_data_is_refused(refused, data, tmp_path):
    def message(source):
        return refused("--group-size", "64", source=source)

    add_entry(data, "hub", {"hf_hub_url": "a/b", "formatting": "rlaif_v"})
    assert "has no dataset 'row'; it has hub, rows" in message("row")
    assert "not a local file" in message("hub")
    assert "does not exist" in message(str(tmp_path / "no.parquet"))
    pq.write_table(pa.table({"question": ["q"], "chosen": ["a"]}), tmp_path / "few.parquet")
    assert "no column image, rejected" in message(str(tmp_path / "few.parquet"))
    broken = [dict(row, image={"bytes": row["image"]["bytes"][:100], "path": None}) for row in photo_rows(2, 1)]
    write_rows(tmp_path, broken, "broken")
    assert "no usable row" in message(str(tmp_path / "broken.parquet"))
    (tmp_path / "text.parquet").write_text("question,chosen")
    assert "no parquet file" in message(str(tmp_path / "text.parquet"))
    block = {"filter": {"origin_dataset": "nowhere"}}
    add_entry(data, "empty", {"file_name": "rows.parquet", "formatting": "rlaif_v", "llava_orpo": block})
    assert "matches no row of empty" in message("empty")
    assert "--samples and --group-size must be positive" in refused("--samples", "0", code=2)
    assert "--heldout-fraction must be between 0 and 1" in refused("--heldout-fraction", "1", code=2)


def add_entry(folder: Path, name: str, entry: dict) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, name: entry}))


def test_pairs_are_random_distinct_and_usable(tmp_path):
    table = photo_rows(6, 2)
    table[3]["image"]["bytes"] = table[3]["image"]["bytes"][:200]
    table[5]["chosen"] = " "
    write_rows(tmp_path, table)
    source = calibration.find_source("rows", tmp_path)
    pairs, passed = calibration.choose_pairs(source, 100, 0.02)
    good = {(row["question"], row["chosen"], row["rejected"]) for i, row in enumerate(table) if i not in (3, 5)}
    assert {(pair["question"], pair["chosen"], pair["rejected"]) for pair in pairs} == good
    assert len(pairs) == len(table) - 2 and sum(passed.values()) == 2
    few, _ = calibration.choose_pairs(source, 4, 0.02)
    assert few == pairs[:4] and few == calibration.choose_pairs(source, 4, 0.02)[0]
    assert few != calibration.choose_pairs(source, 4, 0.02, seed=1)[0]
    assert [pair["image"] for pair in few] == [
        next(row["image"]["bytes"] for row in table if row["chosen"] == pair["chosen"]) for pair in few
    ]


def test_parts_and_filters_of_an_entry_are_honoured(tmp_path):
    table = photo_rows(8, 1)
    for number, row in enumerate(table):
        row["origin_dataset"] = "VQA v2" if number % 2 else "MSCOCO"
    write_rows(tmp_path, table)
    for part in ("train", "heldout"):
        block = {"part": part, "filter": {"origin_dataset": "coco mscoco".split()}}
        add_entry(tmp_path, part, {"file_name": "rows.parquet", "formatting": "rlaif_v", "llava_orpo": block})
        want = {
            row["chosen"]
            for row in table[::2]
            if rows.is_heldout(images.content_hash(row["image"]["bytes"]), 0.5) == (part == "heldout")
        }
        assert want, "the photographs must fall into both parts for this test to mean something"
        pairs, _ = calibration.choose_pairs(calibration.find_source(part, tmp_path), 100, 0.5)
        assert {pair["chosen"] for pair in pairs} == want


def test_no_image_of_the_held_out_part_is_calibrated_on(tmp_path, monkeypatch):
    """The command's --heldout-fraction decides which images are held out, as the recipe's key does in training."""
    table = photo_rows(12, 1)
    write_rows(tmp_path, table)
    entry = {"file_name": "rows.parquet", "formatting": "rlaif_v", "llava_orpo": {"part": "train"}}
    add_entry(tmp_path, "train", entry)
    hashes = [images.content_hash(row["image"]["bytes"]) for row in table]
    train = {image for image in hashes if not rows.is_heldout(image, 0.5)}
    assert train and len(train) < len(set(hashes)), "the photographs must fall into both parts"
    assert not any(rows.is_heldout(image, 0.02) for image in hashes), "the default must hold none of them out"
    seen = []

    class Reached(Exception):
        pass

    def embed_pairs(_model, _processor, _conversation, pairs, _device):
        seen.append({images.content_hash(pair["image"]) for pair in pairs})
        raise Reached

    monkeypatch.setattr(calibration, "embed_pairs", embed_pairs)
    words = [
        "--model",
        random_model(),
        "--method",
        "gptq",
        "--data",
        "train",
        "--out",
        tmp_path / "out",
        "--dataset-dir",
        tmp_path,
        "--group-size",
        "64",
    ]
    for more in (["--heldout-fraction", "0.5"], []):
        with pytest.raises(Reached):
            quantize.main([str(word) for word in [*words, *more]])
    assert seen == [train, set(hashes)]


def test_samples_are_what_the_language_model_reads_of_prompt_image_and_chosen():
    model = load_checked(random_model()).eval()
    processor = AutoProcessor.from_pretrained(random_model())
    conversation = calibration.checkpoint_conversation(processor, random_model())
    assert conversation.name == "llava_v16_mistral"
    row = photo_rows(1, 1)[0]
    pair = {**row, "image": row["image"]["bytes"]}
    with torch.no_grad():
        (sample,) = calibration.embed_pairs(model, processor, conversation, [pair], torch.device("cpu"))
        ours = model.lm_head(model.model.language_model(**sample).last_hidden_state)
        content = [{"type": "image"}, {"type": "text", "text": pair["question"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        picture = images.decode_rgb(pair["image"])
        inputs = processor(text=f"{prompt} {pair['chosen']}</s>", images=[picture], return_tensors="pt")
        theirs = model(**inputs).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_another_chat_template_is_refused():
    processor = AutoProcessor.from_pretrained(random_model())
    processor.chat_template = "{{ messages[0]['role'] }}: <image>"
    with pytest.raises(CheckpointError, match="its chat template writes .*which is not LLaVA-1.6's"):
        calibration.checkpoint_conversation(processor, random_model())


@pytest.fixture(scope="module")
def quantize_command():
    """The words that run scripts/quantize.py in its own environment, made if outputs/test-cache/ lacks it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    command = ["bash", str(ROOT / "scripts" / "quantize.sh")]
    with FileLock(CACHE / "venv-quantize.lock"):
        run(*command, "--help")
    return command


run = functools.partial(run_script, QUANTIZE_VENV="outputs/test-cache/venv-quantize")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def unpacked(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """A layer's weight from its stored tensors: eight 4-bit numbers an int32, lowest first, offset by 8."""

    def nibbles(packed, dim):
        parts = torch.stack([(packed >> (4 * i)) & 15 for i in range(8)], dim=dim + 1)
        return parts.flatten(dim, dim + 1) - 8

    scale = state[f"{layer}.weight_scale"]
    values = nibbles(state[f"{layer}.weight_packed"], 1)
    zero = torch.zeros_like(scale)
    if f"{layer}.weight_zero_point" in state:
        zero = nibbles(state[f"{layer}.weight_zero_point"], 0)[: len(scale)]
    assert state[f"{layer}.weight_shape"].tolist() == list(values.shape)
    groups = values.view(len(scale), scale.shape[1], -1)
    return ((groups - zero[..., None]) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_quantized_model_loads_in_plain_transformers_and_generates(method, quantize_command, data, tmp_path):
    base, out = tmp_path / "base", tmp_path / method
    write(WIDE, base)
    words = [
        "--model",
        base,
        "--method",
        method,
        "--data",
        "rows",
        "--dataset-dir",
        data,
        "--out",
        out,
        "--samples",
        8,
    ]
    printed = run(*quantize_command, *words)
    assert "Loaded again: nothing missing" in printed and "weights on disk" in printed

    for file in processor_files(base):
        assert (out / file).read_bytes() == (base / file).read_bytes()
    before, after = tensors(base), tensors(out)
    layers = [name.removesuffix(".weight") for name in before if is_quantized(name)]
    assert len(layers) == 14
    same = before.keys() - {f"{layer}.weight" for layer in layers}
    rescaled = {name for name in same if "layernorm" in name and "language_model" in name} if method == "awq" else set()
    for name in same - rescaled:
        assert torch.equal(before[name], after[name]), name
    assert {name.rpartition(".")[0] for name in after.keys() - same} == set(layers)

    model, info = AutoModelForImageTextToText.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(out)
    row = photo_rows(1, 1)[0]
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[images.decode_rgb(row["image"]["bytes"])], return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4

    state = model.state_dict()  # after a forward: weights unpacked by compressed-tensors
    plain = load_checked(base).eval()
    for layer in layers:
        name = layer.replace("language_model.model", "model.language_model") + ".weight"
        torch.testing.assert_close(state[name], unpacked(after, layer), rtol=1e-6, atol=1e-7)
        if method == "gptq":
            error = (state[name] - before[f"{layer}.weight"]).norm() / before[f"{layer}.weight"].norm()
            assert 0.01 < error < 0.25, layer  # rounding to 15 levels in groups of 128 leaves about 0.1
    with torch.no_grad():
        quantized, exact = model(**inputs).logits[0], plain(**inputs).logits[0]
    relative = (quantized - exact).norm() / (exact - exact.mean(0)).norm()
    assert 0 < relative < 0.35


@pytest.mark.heavy
@pytest.mark.xdist_group("quickstart")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_aligned_demo_model_loses_at_most_three_points(method, quantize_command, tmp_path):
    run("bash", "scripts/quickstart.sh")  # makes outputs/tiny/merged; what is done is reused
    out = tmp_path / method
    run(*quantize_command, "--model", TRAINED, "--method", method, "--data", "demo_train", "--out", out)
    recipe = ["recipes/tiny/llava16_orpo_qlora.yaml", "quantization_bit=null", "grounding_eval=false"]
    scores = tmp_path / "scores"
    run(
        sys.executable,
        "evals/preference.py",
        *recipe,
        f"model_name_or_path={out}",
        f"against={TRAINED}",
        f"output_dir={scores}",
    )
    comparison = json.loads((scores / "comparison.json").read_text())
    assert comparison["n"] >= 400
    assert comparison["accuracy_a"] - comparison["accuracy_b"] <= 0.03, comparison
