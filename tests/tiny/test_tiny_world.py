"""The demo world and the tiny model made for it (llava_orpo.tiny, scripts/make_demo_data.py, make_tiny_llava.py)."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import datasets
import make_tiny_llava
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from helpers.paths import ROOT
from llava_orpo.tiny import training, world, world_pairs
from llava_orpo.tiny.model import make_processor, make_tokenizer

SCRIPTS = ROOT / "scripts"

SCHEMA = [
    "ds_name",
    "image",
    "question",
    "chosen",
    "rejected",
    "origin_dataset",
    "origin_split",
    "idx",
    "image_path",
]


def run(script: str, *flags: object) -> str:
    command = [sys.executable, str(SCRIPTS / script), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    run("make_demo_data.py", "--out", out, "--train-pairs", 300, "--dev-pairs", 50, "--heldout-pairs", 300)
    return out


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    run("make_tiny_llava.py", "--out", out, "--sight-steps", 0, "--steps", 0)
    return out


def rows_of(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / f"demo_{split}.parquet").to_pylist()


# --- the data ---------------------------------------------------------------------------------------------------


def test_schema_is_that_of_rlaif_v(data):
    loaded = datasets.Dataset.from_parquet(str(data / "demo_train.parquet"), cache_dir=str(data / "cache"))
    assert loaded.column_names == SCHEMA
    assert isinstance(loaded.features["image"], datasets.Image)
    assert all(loaded.features[name].dtype == "string" for name in SCHEMA if name != "image")
    assert loaded[0]["image"].mode == "RGB"
    rows = rows_of(data, "train")
    assert len(rows) == 300
    assert {row["origin_dataset"] for row in rows} == {"DemoGrid", "DemoStrip", "DemoBoard"}
    origin = [json.loads(row["origin_split"]) for row in rows]
    assert {o["type"] for o in origin} == {"question answering", "detailed description"}
    assert {o["model"] for o in origin} == {"demo-writer-a", "demo-writer-b"}
    assert all(row["chosen"] != row["rejected"] for row in rows)


def test_several_pairs_per_image_and_varied_aspect_ratios(data):
    rows = rows_of(data, "train")
    pairs = collections.Counter(row["image"]["bytes"] for row in rows)
    assert set(list(pairs.values())[:-1]) == {3, 4, 5}  # the last picture may be cut off by the count
    ratios = [width / height for width, height in (Image.open(io.BytesIO(b)).size for b in pairs)]
    assert min(ratios) < 0.5 and max(ratios) > 2 and len({round(r, 2) for r in ratios}) > 20


def test_no_image_is_shared_between_the_splits(data):
    seen = {s: {hashlib.sha256(r["image"]["bytes"]).digest() for r in rows_of(data, s)} for s in world_pairs.SEEDS}
    assert not seen["train"] & seen["heldout"] and not seen["train"] & seen["dev"] and not seen["dev"] & seen["heldout"]


def test_same_seed_same_bytes_and_a_complete_file_is_left_alone(data, tmp_path):
    path = data / "demo_dev.parquet"
    again = tmp_path / "demo_dev.parquet"
    seed = world_pairs.SEEDS["dev"]
    assert world_pairs.write_split(again, "dev", 50, seed)
    assert again.read_bytes() == path.read_bytes()
    before = again.stat().st_mtime_ns
    assert not world_pairs.write_split(again, "dev", 50, seed)
    assert again.stat().st_mtime_ns == before
    assert world_pairs.write_split(again, "dev", 50, seed + 1)
    assert again.read_bytes() != path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["demo_dev.parquet"]


# --- truth ------------------------------------------------------------------------------------------------------


def described(scene: world.Scene) -> str:
    """An independent reading of a scene in the words of writer b's description."""
    sentences = []
    for i, (color, shape) in enumerate(scene.objects):
        row, column = i // scene.columns, i % scene.columns
        level = {1: [""], 2: ["top ", "bottom "], 3: ["top ", "middle ", "bottom "]}[scene.rows][row]
        side = {1: [""], 2: ["left ", "right "], 3: ["left ", "middle ", "right "]}[scene.columns][column]
        sentences.append(f"The {level}{side}one is {'an' if color == 'orange' else 'a'} {color} {shape}.")
    number = {2: "two", 3: "three", 4: "four", 6: "six"}[len(scene.objects)]
    return f"There are {number} shapes on a {scene.background} background. " + " ".join(sentences)


@pytest.mark.parametrize("seed", range(20))
def test_chosen_is_true_of_the_scene_and_rejected_is_not(seed):
    rng = random.Random(seed)
    scene = world.random_scene(rng)
    for detailed in (True, False, False, False):
        pair = world_pairs._pair(scene, rng, detailed)
        true = {
            (world.ask(scene, key, writer), world.answer(scene, key, value, writer))
            for key, value in world.facts(scene).items()
            for writer in (0, 1)
        }
        assert (pair["question"], pair["chosen"]) in true
        assert (pair["question"], pair["rejected"]) not in true
    assert world.answer(scene, ("describe",), scene.objects, 1) == described(scene)


def test_facts_of_a_known_scene():
    objects = (("red", "circle"), ("blue", "star"), ("red", "square"), ("green", "star"))
    found = world.facts(world.Scene("DemoGrid", 2, 2, "white", objects))
    assert found["color at", 1] == "blue" and found["shape at", 2] == "square"
    assert found["object at", 3] == ("green", "star") and found["row", 1] == objects[2:]
    assert found["count", "star"] == ("circle", "star", "square", "star")
    assert found["is there", "red", "circle"] and not found["is there", "blue", "circle"]
    assert found["color of", "circle"] == "red" and ("color of", "star") not in found
    assert found["shape of", "green"] == "star" and ("shape of", "red") not in found
    assert found["where", "green", "star"] == 3
    assert found["side", ("blue", "star"), ("red", "circle")] == "right"
    assert ("side", ("green", "star"), ("blue", "star")) not in found  # one above the other
    assert found["same color", 0, 2] == ("red", "red") and found["same shape", 0, 1] == ("circle", "star")


def test_conclusions_follow_from_what_is_named():
    objects = (("red", "circle"), ("blue", "star"), ("red", "square"), ("green", "star"))
    scene = world.Scene("DemoGrid", 2, 2, "white", objects)
    found = world.facts(scene)

    def says(*key: object) -> list[str]:
        return [world.answer(scene, key, found[key], writer) for writer in (0, 1)]

    assert says("count", "star") == [
        "I see a circle, a star, a square and a star, so two stars.",
        "With a circle, a star, a square and a star, it has two stars.",
    ]
    assert says("count", "triangle")[0].endswith("so no triangles.")
    assert says("count", "circle")[0].endswith("so one circle.")
    assert says("same color", 0, 2) == [
        "The top left one is red and the bottom left one is red, so the answer is yes.",
        "The top left one is red and the bottom left one is red, so they match.",
    ]
    assert says("same shape", 0, 1)[1].endswith("so they differ.")
    assert says("is there", "blue", "circle")[0] == "No, there is no blue circle."


def test_the_picture_shows_the_scene():
    rng = random.Random(0)
    for _ in range(30):
        scene = world.random_scene(rng)
        picture, labels = world.draw(scene, rng)
        for i, (color, _) in enumerate(scene.objects):
            row, column = divmod(i, scene.columns)
            at = (
                int((column + 0.5) * picture.width / scene.columns),
                int((row + 0.5) * picture.height / scene.rows),
            )
            near = min(
                world.COLORS,
                key=lambda c: sum((a - b) ** 2 for a, b in zip(world.COLORS[c], picture.getpixel(at), strict=True)),
            )
            assert near == color and labels.getpixel(at) == i + 1


# --- text alone must not tell -------------------------------------------------------------------------------------


def test_chosen_and_rejected_are_equally_likely_texts():
    """Count each (question kind, chosen, rejected) answer swap both ways: a sign test must not see a preference."""
    rng = random.Random(1)
    ways = collections.Counter()
    for _ in range(8000):
        scene = world.random_scene(rng)
        other = world.counterfactual(scene, rng)
        key = world.choose_question(scene, other, rng)
        a, b = (str(world.facts(s)[key]) for s in (scene, other))
        ways[key[0], min(a, b), max(a, b), a < b] += 1
    for kind, low, high in {k[:3] for k in ways}:
        forth, back = ways[kind, low, high, True], ways[kind, low, high, False]
        n = forth + back
        assert n < 30 or abs(forth - back) < 4.5 * n**0.5, (kind, low, high, forth, back)


def test_a_text_only_guesser_stays_near_chance():
    """Naive Bayes on words, trained on 4000 pairs' texts, does not beat chance on 2000 others."""
    rows = world_pairs.make_pairs("train", 6000, seed=99)
    counts = {True: collections.Counter(), False: collections.Counter()}
    for row in rows[:4000]:
        for good, column in ((True, "chosen"), (False, "rejected")):
            words = row[column].split()
            counts[good].update(words + list(itertools.pairwise(words)))

    def score(text: str) -> float:
        words = text.split()
        terms = words + list(itertools.pairwise(words))
        return sum(math.log((counts[True][t] + 1) / (counts[False][t] + 1)) for t in terms)

    right = sum(score(row["chosen"]) > score(row["rejected"]) for row in rows[4000:])
    assert 0.45 < right / 2000 < 0.55


def test_equal_length_in_tokens(untrained):
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    rows = world_pairs.make_pairs("train", 1000, seed=5)
    for row in rows:
        assert len(tokenizer.tokenize(row["chosen"])) == len(tokenizer.tokenize(row["rejected"])), row


# --- the model --------------------------------------------------------------------------------------------------


def test_untrained_model_loads_whole_and_generates(untrained):
    model, info = AutoModelForImageTextToText.from_pretrained(untrained, output_loading_info=True)
    assert not any(info.values()), info
    config = model.config
    assert (config.model_type, config.text_config.model_type) == ("llava_next", "mistral")
    assert config.vision_config.model_type == "clip_vision_model"
    assert len(config.image_grid_pinpoints) == 5 and config.vision_feature_layer == -2
    assert config.vision_feature_select_strategy == "default"
    assert config.text_config.hidden_size % 128 == 0 and config.text_config.intermediate_size % 128 == 0
    assert config.text_config.vocab_size % 64 == 0
    processor = AutoProcessor.from_pretrained(untrained)
    image = world.draw(world.random_scene(random.Random(0)), random.Random(0))[0]
    message = {"role": "user", "content": [{"type": "text", "text": "What is there?"}, {"type": "image"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    assert prompt == "[INST] <image>\nWhat is there? [/INST]"
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > inputs["input_ids"].shape[1]


def test_tensor_names_are_the_published_ones(untrained):
    with safe_open(untrained / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "image_newline",
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
    } <= names
    assert all(
        n == "image_newline"
        or n.startswith(("language_model.", "vision_tower.vision_model.", "multi_modal_projector."))
        for n in names
    )


def test_chat_template_writes_the_whole_conversation(untrained):
    processor = AutoProcessor.from_pretrained(untrained)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
        {"role": "user", "content": [{"type": "text", "text": "Two?"}]},
    ]
    assert processor.apply_chat_template(turns) == "[INST] <image>\nOne? [/INST] Yes.</s> [INST] Two? [/INST]"


@pytest.fixture(scope="session")
def tokenizer(untrained):
    return AutoTokenizer.from_pretrained(untrained)


@given(text=st.text(st.characters(exclude_categories=("Cs",))))
@example(" ")
@example("  two  spaces\n")
@example("a ▁ b")
def test_tokenizer_round_trip(tokenizer, text):
    """Decoding takes away the ▁ in front of every text, so the text's own first space stays. The one character that
    cannot come back is a ▁ of the text itself: pieces write spaces so."""
    special = ("<s>", "</s>", "<unk>", "<pad>", "<image>")
    if any(s in text for s in special):
        return
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text.replace("▁", " ")


def test_tokenizer_is_of_the_llama_kind(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    image, pad = tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    assert (image, pad) == (len(tokenizer) - 2, len(tokenizer) - 1)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("[INST] <image>\nWhat is red? [/INST] It is.</s>")["input_ids"])
    at = pieces.index("<image>")
    assert pieces[0] == "<s>" and pieces[at - 1] == "▁"  # "[INST] " keeps its space as a piece of its own
    assert pieces[at + 1 : at + 4] == ["▁", "<0x0A>", "What"]  # the mark of a legacy tokenizer, before the newline
    assert pieces[-5:] == ["]", "▁It", "▁is", ".", "</s>"]


def test_tokenizer_is_read_back_as_it_was_made(tmp_path):
    """From the model's folder, where config.json says llava_next, and as saved again from there, without that file."""
    made, folder, again = make_tokenizer(7, turns=50), tmp_path / "model", tmp_path / "adapter"
    make_processor(made).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llava_next"}')
    AutoProcessor.from_pretrained(folder).save_pretrained(again)
    texts = ["[INST] <image>\nWhat? [/INST] It is.</s> [INST] So? [/INST]", " a", "</s> </s>\n", "", "▁"]
    want = made(texts)["input_ids"]
    pieces = made.convert_ids_to_tokens(want[0])
    assert pieces[pieces.index("</s>") :][:4] == ["</s>", "▁", "▁", "["]  # the mark and the text's own space
    for place in (folder, again):
        assert AutoTokenizer.from_pretrained(place)(texts)["input_ids"] == want
        assert AutoProcessor.from_pretrained(place).tokenizer(texts)["input_ids"] == want
        assert json.loads((place / "tokenizer_config.json").read_text())["legacy"] is True
        described = json.loads((place / "tokenizer.json").read_text())
        assert described["pre_tokenizer"] is None
        assert [part["type"] for part in described["normalizer"]["normalizers"]] == ["Prepend", "Replace"]


def test_training_tokenizes_turns_as_the_processor_does(untrained):
    """tokenize_turns leaves out the tokens that every prompt starts with, and nothing else."""
    processor = AutoProcessor.from_pretrained(untrained)
    turns = [("What is red?", "It is a star."), ("\n", " "), ("", "")]
    start = processor.tokenizer("[INST] <image>\n")["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(start)[-3:] == ["<image>", "▁", "<0x0A>"]
    for (question, answer), (ids, response) in zip(turns, training.tokenize_turns(processor, turns), strict=True):
        prompt = f"[INST] <image>\n{question} [/INST]"
        assert start + ids == processor.tokenizer(f"{prompt} {answer}</s>")["input_ids"]
        assert start + ids[:-response] == processor.tokenizer(prompt)["input_ids"]


def test_same_seed_same_weights_and_a_complete_folder_is_left_alone(tmp_path, capsys):
    def make(name: str) -> Path:
        flags = ["--images", "24", "--sight-steps", "2", "--steps", "2", "--habit-steps", "1"]
        threads = torch.get_num_threads()
        assert make_tiny_llava.main(["--out", str(tmp_path / name), *flags]) == 0
        torch.set_num_threads(threads)
        return tmp_path / name / "model.safetensors"

    first, second = make("a"), make("b")
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    before = first.stat().st_mtime_ns
    make("a")
    assert "already there" in capsys.readouterr().out
    assert first.stat().st_mtime_ns == before


def test_branches_are_trained_as_if_alone(untrained):
    """Scores of a turn laid out with others behind one shared prefix equal those of the turn by itself."""
    model = AutoModelForImageTextToText.from_pretrained(untrained).eval()
    prefix, turns = [1, 5, 9, 11], [([7, 8, 20], 2), ([30, 31, 32, 33], 1)]
    mask, position_ids, labels = training.branch_layout(len(prefix), turns, 16)
    ids = prefix + [i for turn, _ in turns for i in turn]
    ids += [0] * (16 - len(ids))
    with torch.no_grad():
        packed = model.model.language_model(
            input_ids=torch.tensor([ids]), attention_mask=mask[None, None], position_ids=position_ids[None]
        ).last_hidden_state[0]
        start = len(prefix)
        for turn, response in turns:
            alone = model.model.language_model(input_ids=torch.tensor([prefix + turn])).last_hidden_state[0]
            stop = start + len(turn)
            torch.testing.assert_close(packed[start:stop], alone[len(prefix) :], rtol=1e-4, atol=1e-5)
            assert labels[stop - response - 1 : stop - 1].tolist() == turn[-response:]
            start = stop
    assert (labels != -100).sum() == 3
