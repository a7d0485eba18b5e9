"""The demo world of companions, its pairs, and the tiny model that hallucinates in it."""

from __future__ import annotations

import collections
import itertools
import json
import math
import random
from pathlib import Path

import make_demo_data
import make_tiny_llava
import objects
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from helpers.paths import ROOT
from llava_orpo.data.images import content_hash
from llava_orpo.evaluation.objects import Vocabulary, read_annotations, read_vocabulary
from llava_orpo.tiny import cooccur, cooccur_pairs, training, world

KNOWN = Vocabulary({" ".join(kind): [] for kind in cooccur.KINDS})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cooccur")
    sizes = ["--train-pairs", "300", "--dev-pairs", "20", "--heldout-pairs", "60"]
    assert make_demo_data.main(["--world", "cooccur", "--out", str(out), *sizes]) == 0
    return out


def rows_of(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / f"cooccur_{split}.parquet").to_pylist()


# --- the world --------------------------------------------------------------------------------------------------


def test_the_couples_are_disjoint_kinds():
    coupled = [kind for first, companion, _ in cooccur.COUPLES for kind in (first, companion)]
    assert len(set(coupled)) == 16 and len(cooccur.LOOSE) == 8
    assert sorted([*coupled, *cooccur.LOOSE]) == sorted(cooccur.KINDS) and len(cooccur.KINDS) == 24


def test_scenes_are_whole_and_miss_what_they_say():
    rng = random.Random(5)
    kept, absent = collections.Counter(), 0
    for _ in range(3000):
        scene = cooccur.random_scene(rng)
        kinds = [kind for kind in scene.objects if kind]
        assert len(scene.objects) == scene.rows * scene.columns and len(kinds) == len(set(kinds))
        for first, companion, _ in cooccur.COUPLES:
            if first in kinds:
                kept[companion in kinds] += 1
                assert companion not in kinds or kinds[kinds.index(first) + 1] == companion
            assert first in kinds or companion not in kinds
        scene = cooccur.pair_scene(rng)
        assert len(cooccur.broken(scene)) == (scene.source == cooccur.ABSENT_SOURCE)
        absent += scene.source == cooccur.ABSENT_SOURCE
    assert abs(kept[True] / kept.total() - cooccur.TOGETHER) < 0.03
    assert abs(absent / 3000 - cooccur.ABSENT) < 0.03


def test_careless_writers_name_missing_companions_as_often_as_said():
    rng, named, seen = random.Random(6), collections.Counter(), collections.Counter()
    for _ in range(12000):
        scene = cooccur.pair_scene(rng)
        told = cooccur.careless(scene, rng, 0.5)
        if not cooccur.broken(scene):
            assert told == scene
            continue
        (cell,) = cooccur.broken(scene)
        first = scene.objects[cell]
        seen[first] += 1
        named[first] += told.objects[cell + 1] == cooccur.COMPANION[first]
        assert cooccur.careless(scene, rng, 0.0) == scene
    for first, _, rate in cooccur.COUPLES:
        assert abs(named[first] / seen[first] - 0.5 * rate) < 0.06


def test_turns_are_true_unless_they_describe():
    rng = random.Random(7)
    for _ in range(300):
        scene = cooccur.random_scene(rng)
        question, answer = cooccur.write_turn(scene, rng, 1.0, detailed=False)
        if question in (cooccur.ask(0), cooccur.ask(1)):
            continue
        assert set(KNOWN.named(answer)) <= set(cooccur.names(scene)), (scene, question, answer)
        if answer.startswith("No,"):
            denied = answer.removeprefix("No, there is no ").rstrip(".")
            assert denied in KNOWN.object_of and denied not in cooccur.names(scene)


def test_an_empty_cell_shows_the_background():
    background, red = (248, 248, 248), ("red", "square")
    scene = world.Scene("", 2, 2, "white", (red, None, red, red))
    picture, labels = world.draw(scene, random.Random(0))
    right, top = int(picture.width * 0.75), int(picture.height * 0.25)
    assert max(abs(a - b) for a, b in zip(picture.getpixel((right, top)), background, strict=True)) <= 7
    assert labels.getpixel((right, top)) == 0 and set(labels.tobytes()) == {0, 1, 3, 4}


# --- its pairs --------------------------------------------------------------------------------------------------


def test_names_found_in_the_descriptions_are_the_scenes():
    rng = random.Random(8)
    for _ in range(500):
        scene = cooccur.random_scene(rng)
        assert [KNOWN.named(cooccur.describe(scene, writer)) for writer in (0, 1)] == [cooccur.names(scene)] * 2


def test_chosen_is_the_whole_truth_and_rejected_hallucinates(data):
    annotations = read_annotations(data / cooccur_pairs.ANNOTATIONS)
    vocabulary = read_vocabulary(None, annotations)
    assert set(vocabulary.object_of) == set(KNOWN.object_of)
    firsts = {" ".join(first): " ".join(companion) for first, companion in cooccur.COMPANION.items()}
    for row in rows_of(data, "train"):
        origin = json.loads(row["origin_split"])
        held = annotations[content_hash(row["image"]["bytes"])]
        assert origin["type"] == "detailed description" and origin["objects"] == held
        assert vocabulary.named(row["chosen"]) == held
        (false,) = set(vocabulary.named(row["rejected"])) - set(held)
        missing = [companion for first, companion in firsts.items() if first in held and companion not in held]
        absent = row["origin_dataset"] == cooccur.ABSENT_SOURCE
        assert missing == ([false] if absent else []) and (absent or false not in firsts.values())


def test_splits_share_no_picture_and_are_made_again_alike(data, tmp_path):
    hashes = {s: {content_hash(r["image"]["bytes"]) for r in rows_of(data, s)} for s in cooccur_pairs.SEEDS}
    assert [len(hashes[split]) for split in ("train", "dev", "heldout")] == [300, 20, 60]
    assert len(set.union(*hashes.values())) == 380
    again, seed = tmp_path / "cooccur_dev.parquet", cooccur_pairs.SEEDS["dev"]
    assert cooccur_pairs.write_split(again, "dev", 20, seed)
    assert again.read_bytes() == (data / "cooccur_dev.parquet").read_bytes()
    assert not cooccur_pairs.write_split(again, "dev", 20, seed)


def test_what_text_alone_tells():
    """The rule of `closed_eyes_accuracy` is right for ABSENT of the pairs, and naive Bayes finds nothing beyond it."""
    rng = random.Random(9)
    rows = [cooccur_pairs.make_pair(cooccur.pair_scene(rng), rng) for _ in range(8000)]
    rule = cooccur_pairs.closed_eyes_accuracy(rows[5000:])
    assert abs(rule - cooccur.ABSENT) < 0.03

    def terms(text: str) -> list:
        words = text.rstrip(".").replace(",", "").split()
        return words + list(itertools.pairwise(words)) + [tuple(words[i : i + 5]) for i in range(len(words))]

    counts = {True: collections.Counter(), False: collections.Counter()}
    for row in rows[:5000]:
        for good, column in ((True, "chosen"), (False, "rejected")):
            counts[good].update(terms(row[column]))

    def score(text: str) -> float:
        # the mean per term: a sum would only tell which text is longer
        found = terms(text)
        return sum(math.log((counts[True][t] + 1) / (counts[False][t] + 1)) for t in found) / len(found)

    right = sum(score(row["chosen"]) > score(row["rejected"]) for row in rows[5000:]) / 3000
    assert 0.6 < right < rule + 0.03


# --- the model --------------------------------------------------------------------------------------------------


def test_same_flags_same_weights_and_a_tokenizer_of_the_world(tmp_path):
    flags = ["--world", "cooccur", "--images", "16", "--sight-steps", "1", "--steps", "2", "--habit-steps", "1"]
    threads = torch.get_num_threads()
    for name in ("a", "b"):
        assert make_tiny_llava.main(["--out", str(tmp_path / name), *flags]) == 0
    torch.set_num_threads(threads)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = cooccur.describe(cooccur.pair_scene(random.Random(0)), 0)
    assert len(tokenizer.tokenize(text)) < 1.3 * len(text.replace(",", " ,").replace(".", " .").split())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The whole world as its commands make it: data and model (minutes)."""
    out = tmp_path_factory.mktemp("made")
    threads = torch.get_num_threads()
    assert make_demo_data.main(["--world", "cooccur", "--out", str(out / "data"), "--train-pairs", "100"]) == 0
    assert make_tiny_llava.main(["--world", "cooccur", "--out", str(out / "model")]) == 0
    torch.set_num_threads(threads)
    return out


@pytest.mark.heavy
def test_the_tower_sees_what_the_model_denies(made):
    """A linear reading of the tower's patches tells what an object is, on pictures that it was not fitted on."""
    model = AutoModelForImageTextToText.from_pretrained(made / "model").eval()
    pictures = training.draw_pictures(AutoProcessor.from_pretrained(made / "model"), 600, 4242, cooccur.random_scene)
    seen, labels = training.see(model, pictures.tiles).flatten(0, 1), (pictures.colors, pictures.shapes)
    kinds = (labels[0] * len(training.SHAPE_CLASSES) + labels[1]).flatten()
    half = pictures.offsets[300] * pictures.colors.shape[1]
    seen = torch.cat((seen, torch.ones(len(seen), 1)), 1)
    onehot = torch.nn.functional.one_hot(kinds).float()
    weights = torch.linalg.lstsq(seen[:half].double(), onehot[:half].double()).solution
    told = (seen[half:].double() @ weights).argmax(1)
    patches, right = pictures.colors.shape[1], []
    for start, stop in itertools.pairwise(pictures.offsets[300:]):
        start, stop = start * patches - half, stop * patches - half
        for kind in kinds[half:][start:stop][labels[1].flatten()[half:][start:stop] > 0].unique():
            mine = kinds[half:][start:stop] == kind  # all patches of one object: no two of a picture are alike
            right.append(bool(told[start:stop][mine].mode().values == kind))
    assert sum(right) / len(right) > 0.85, sum(right) / len(right)


@pytest.mark.heavy
def test_the_model_hallucinates_companions_and_little_else(made):
    rows = {"rows": {"file_name": str(made / "data" / "cooccur_heldout.parquet"), "formatting": "rlaif_v"}}
    (made / "dataset_info.json").write_text(json.dumps({"rows": {**rows["rows"], "ranking": True}}))
    words = [str(ROOT / "recipes/tiny/cooccur.yaml"), f"model_name_or_path={made / 'model'}", "eval_dataset=rows"]
    words += [f"dataset_dir={made}", f"annotations={made / 'data' / 'annotations.jsonl'}", f"output_dir={made / 'out'}"]
    assert objects.main(words) == 0
    found = json.loads((made / "out" / "objects.json").read_text())
    absent, whole = (found["subsets"][source] for source in (cooccur.ABSENT_SOURCE, cooccur.WHOLE_SOURCE))
    assert 0.2 <= absent["chair_s"] <= 0.4 and whole["chair_s"] < 0.1
    assert absent["coverage"] > 0.8 and whole["coverage"] > 0.85
