"""scripts/make_pairs.py and best_of: answers, rewards and pairs against plain references; bad input; resuming."""

from __future__ import annotations

import contextlib
import json
import math

import generate
import make_pairs
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from helpers.commands import exit_code
from helpers.judge_server import JudgeServer, Reply, shown
from helpers.recipes import photo_rows, random_model, tokenized, write_recipe, write_rows
from helpers.serving import random_adapter
from llava_orpo.data import images
from llava_orpo.data.conversation import full_prompt_ids
from llava_orpo.data.image_store import load_image
from llava_orpo.errors import UserError
from llava_orpo.evaluation import generation, session
from llava_orpo.evaluation.sampling import SeededSampling
from llava_orpo.pairs import making, sampling, self_reward
from llava_orpo.serving import client

TOKENS = 12
SETTINGS = generation.Settings(5, 0.8, 0.95, 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Back-off in milliseconds; a random model never ends an answer, so a quarter of its tokens do."""
    original = client.ChatClient.__init__
    monkeypatch.setattr(client.ChatClient, "__init__", lambda self, *args: original(self, *args, first_wait=0.002))
    for module in (generation, sampling):
        monkeypatch.setattr(module, "end_tokens", lambda conversation, tokenizer: [2, *range(40, 32000, 4)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The random model with larger weights: at transformers' 0.02 its answers hardly depend on image and prompt."""
    folder = tmp_path_factory.mktemp("base")
    for file in random_model().iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(random_model() / "model.safetensors")
    larger = {name: weight * 4 if weight.dim() == 2 else weight for name, weight in weights.items()}
    save_file(larger, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base):
    """Six rows on three images, the last one without an image; a recipe with an adapter on the random model."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = photo_rows(3, 2)
    rows[1]["question"] = "What is it?"
    rows[5]["image"] = None
    write_rows(folder, rows)
    random_adapter(base, folder / "adapter")
    random_adapter(base, folder / "earlier", seed=1)
    keys = {
        "allow_text_only": True,
        "per_device_eval_batch_size": 4,
        "adapter_name_or_path": str(folder / "adapter"),
        "eval_dataset": "rows",
        "model_name_or_path": str(base),
    }
    write_recipe(folder, keys)
    return folder


@pytest.fixture(scope="module")
def opened(folder):
    """A session of the recipe that kept its adapter, with the earlier adapter beside it."""
    import yaml

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    opened = session.open_session(recipe, str(folder / "session"), keep_adapter=True)
    self_reward.use_reference(opened, str(folder / "earlier"))
    return opened


@pytest.fixture
def make(folder, opened, monkeypatch, tmp_path):
    """Runs the command on the session that is open already; returns (exit code, summary or None)."""
    monkeypatch.setattr(making, "open_session", lambda *args, **more: contextlib.nullcontext(opened))
    monkeypatch.setattr(making.self_reward, "use_reference", lambda *args: None)

    def run(*words: str, out: str = "out"):
        common = [folder / "recipe.yaml", f"out={tmp_path / out}", f"max_new_tokens={TOKENS}", "temperature=0.8"]
        code = exit_code(make_pairs.main, *common, "answers=4", "length_ratio=20", *words)
        summary = tmp_path / out / "pairs.json"
        return code, json.loads(summary.read_text()) if summary.exists() else None

    return run


def rows_of(folder):
    return pq.read_table(folder / "pairs.parquet").to_pylist()


def test_answers_on_one_prefill_are_those_of_one_prompt_at_a_time(opened, tmp_path):
    positions = list(range(6))
    found = sampling.sample(opened, positions, tmp_path, SETTINGS, 3)
    for position in positions:
        row = dict(opened.rows[position])
        pictures = [load_image(row["image"])] if row["image"] else []
        inputs = generation.batch_inputs(opened, [full_prompt_ids(row, opened.image_token_id)], pictures)
        for number, seed in enumerate(sampling.answer_seeds(row, SETTINGS.seed, 3)):
            processor = SeededSampling([seed], SETTINGS.temperature, SETTINGS.top_p)
            (alone,) = generation.answer_batch(opened, inputs, SETTINGS.max_new_tokens, [processor])
            assert found[position]["answers"][number] == alone
    every = [text for record in found.values() for text in record["answers"]]
    assert len(set(every)) > 12  # they differ, so an exchange would show
    cut = [flag for record in found.values() for flag in record["cut"]]
    assert any(cut) and not all(cut)


def base_of(folder) -> str:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


@torch.no_grad()
def plain_rewards(folder, rows, questions_answers, reference) -> list[float]:
    """transformers and PEFT alone, one sequence at a time."""
    processor = AutoProcessor.from_pretrained(random_model())

    def logps(model) -> list[tuple[float, int]]:
        found = []
        for row, answer in questions_answers:
            image = load_image(rows[row]["image"]) if rows[row]["image"] else None
            content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": rows[row]["question"]}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}])
            begin = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
            inputs = processor(images=image, text=f"{prompt} {answer}</s>", return_tensors="pt")
            given = inputs["input_ids"][0, begin:]
            given_logps = model(**inputs).logits[0, begin - 1 : -1].log_softmax(-1).gather(-1, given[:, None])
            found.append((given_logps.double().sum().item(), len(given)))
        return found

    def load(adapter):
        base = AutoModelForImageTextToText.from_pretrained(base_of(folder)).eval()
        return base if adapter is None else PeftModel.from_pretrained(base, folder / adapter).eval()

    return [(a - b) / n for (a, n), (b, _) in zip(logps(load("adapter")), logps(load(reference)), strict=True)]


@pytest.mark.parametrize("reference", [None, "earlier"])
def test_self_reward_equals_plain_forwards(folder, opened, tmp_path, reference):
    texts = {0: ["Two red birds.", "A man", "yes"], 5: ["no image at all", "none"]}
    name = self_reward.BASE if reference is None else str(folder / reference)
    found = self_reward.rewards(opened, texts, tmp_path, name)
    flat = [(row, text) for row, own in texts.items() for text in own]
    expected = plain_rewards(folder, opened.rows, flat, reference)
    scores = [score for row in texts for score in found[row]["scores"]]
    assert scores == pytest.approx(expected, abs=2e-5)
    assert min(map(abs, scores)) > 1e-3 and len({round(score, 3) for score in scores}) == 5


def test_pairs_are_written_registered_and_read_by_training(make, folder, opened, tmp_path):
    code, summary = make("pairs_per_image=2", "name=made")
    assert code == 0
    written = rows_of(tmp_path / "out")
    assert summary["pairs"] == len(written) > 4 and summary["prompts"] == 6
    assert max(map(int, summary["images_by_pairs"])) <= 2
    originals = {
        row["question"]: row["image"] and row["image"]["bytes"]
        for row in pq.read_table(folder / "rows.parquet").to_pylist()
    }
    for row in written:
        assert (row["image"] and row["image"]["bytes"]) == originals[row["question"]]
        about = json.loads(row["origin_split"])
        assert about["chosen_score"] > about["rejected_score"] and about["scoring"] == "self"
    assert len({row["idx"] for row in written}) == len(written)
    (best, worst) = plain_rewards(folder, opened.rows, [(0, written[0]["chosen"]), (0, written[0]["rejected"])], None)
    assert best > worst
    train, evaluated = tokenized(tmp_path / "out", {"dataset": "made", "eval_dataset": "rows", "allow_text_only": True})
    assert len(train) == len(written) and len(evaluated) == 6
    assert [row["question"] for row in train] == [row["question"] for row in written]


def test_max_prompts_keeps_the_prompts_of_an_image_together():
    rows = Dataset.from_list(
        [{"image_hash": f"{i // 3}", "image": None, "prompt_ids": [i % 3]} for i in range(30)]
        + [{"image_hash": "0", "image": None, "prompt_ids": [0]}]  # asked before
    )
    assert making.prompts_of(rows, None) == list(range(30))
    assert making.prompts_of(rows, 6) == [0, 1, 2, 15, 16, 17]
    assert making.prompts_of(rows, 2) == [0, 1]


def test_an_interrupted_run_goes_on(make, tmp_path, monkeypatch):
    assert make(out="whole")[0] == 0
    original, asked = sampling.sample_batch, []

    def stops(session, inputs, settings, seeds):
        asked.append(len(seeds))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(session, inputs, settings, seeds)

    monkeypatch.setattr(sampling, "sample_batch", stops)
    with pytest.raises(KeyboardInterrupt):
        make(out="resumed")
    assert make(out="resumed")[0] == 0
    assert asked == [16, 8, 8]  # four of six prompts were kept
    assert rows_of(tmp_path / "resumed") == rows_of(tmp_path / "whole")
    monkeypatch.setattr(self_reward, "_scored", None)  # a third run neither samples nor scores
    assert make(out="resumed")[0] == 0 and asked == [16, 8, 8]


def test_equal_answers_are_counted_and_nothing_is_written(make, tmp_path, capsys):
    code, summary = make("temperature=0.000001")
    assert code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: No pair could be made of 6 prompts (")
    assert summary["pairs"] == 0 and not (tmp_path / "out" / "pairs.parquet").exists()
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert len(reasons) == 6 and "all answers are the same text" in reasons
    assert summary["answers_left_out"]["the same as another"] >= 3


def test_objects_and_images_without_annotations(make, opened, tmp_path, capsys):
    sampled = sampling.sample(opened, range(6), tmp_path, generation.Settings(TOKENS, 0.8, 1.0, 0), 4)
    words = sorted({w.lower() for record in sampled.values() for text in record["answers"] for w in text.split()})
    words = [word for word in words if word.isalpha()]
    name = opened.rows[0]["image_hash"]
    (tmp_path / "notes.json").write_text(json.dumps({name: words[::2], "another image": words[1::2]}))
    code, summary = make("scoring=objects", f"annotations={tmp_path / 'notes.json'}")
    assert summary["left_out"]["the image is not annotated"] >= 2 and summary["scoring"] == "objects"
    assert code == 0 and summary["pairs"] >= 1
    for row in rows_of(tmp_path / "out"):
        assert images.content_hash(row["image"]["bytes"]) == name
        about = json.loads(row["origin_split"])
        assert -1 <= about["rejected_score"] < about["chosen_score"] <= 0
    (tmp_path / "notes.json").write_text(json.dumps({"another image": ["cat"]}))
    assert make("scoring=objects", f"annotations={tmp_path / 'notes.json'}", out="none")[0] == 1
    assert "the image is not annotated" in capsys.readouterr().err.strip().splitlines()[-1]


def longer_wins(request, number):
    _, first, second, _ = shown(request)
    return Reply(f"VERDICT: {'TIE' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}")


def judge_words(server):
    return (
        "scoring=judge",
        f"judge_url={server.base_url}",
        "judge_model=j",
        "yes=true",
        "retries=0",
        "opponents=3",
        "concurrency=2",
    )


def test_judge_orders_answers_and_is_not_asked_twice(make, tmp_path):
    with JudgeServer(longer_wins) as server:
        code, summary = make(*judge_words(server))
        sent = len(server.requests)
        assert code == 0 and make(*judge_words(server))[0] == 0 and len(server.requests) == sent
    assert summary["pairs"] > 3
    for row in rows_of(tmp_path / "out"):
        assert len(row["chosen"]) > len(row["rejected"])


def test_a_judge_of_nonsense_and_one_that_dies(make, tmp_path, capsys):
    with JudgeServer(
        lambda request, number: Reply("as you like") if "What is it?" in str(request) else longer_wins(request, number)
    ) as server:
        code, summary = make(*judge_words(server))
        assert code == 1 and summary["not_answered"] == 1 and summary["pairs"] > 2
        assert "run the command again to ask them: no verdict: no verdict in: 'as you like'" in capsys.readouterr().err
    with JudgeServer(
        lambda request, number: longer_wins(request, number) if number < 9 else Reply("gone", 404)
    ) as server:
        assert make(*judge_words(server), out="dies")[0] == 1
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert "gone" in error and "Verdicts that came are kept" in error
    kept = len((tmp_path / "dies" / "verdicts.jsonl").read_text().splitlines())
    assert kept >= 6
    with JudgeServer(longer_wins) as server:  # at another address, the same judge: only what is missing is asked
        assert make(*judge_words(server), out="dies")[0] == 0
        once = len(server.requests)
    with JudgeServer(longer_wins) as server:
        assert make(*judge_words(server), out="anew")[0] == 0
        assert len(server.requests) == once + kept
    assert rows_of(tmp_path / "dies") == rows_of(tmp_path / "anew")


def by_seed(request, number):
    """An answer that its seed decides, of a length of its own."""
    text = "word " * (request.get("seed", 0) % 7 + 1) + str(request.get("seed", 0) % 5)
    return Reply(raw=json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))


def test_a_server_samples_with_seeds_of_their_own_and_may_die(make, folder, opened, tmp_path, capsys):
    with JudgeServer(by_seed, ["m"]) as server:
        words = f"base_url={server.base_url}", "concurrency=2", "retries=0"
        assert make(*words)[0] == 0
        sent = [request for request, _, _ in server.requests if "seed" in request]
        seeds = [seed & 0x7FFFFFFF for row in opened.rows for seed in sampling.answer_seeds(row, 0, 4)]
        assert sorted(request["seed"] for request in sent) == sorted(seeds) and len(set(seeds)) == 24
        assert {request["temperature"] for request in sent} == {0.8}

    def dies(request, number):
        return by_seed(request, number) if number < 14 or not broken else Reply("gone", 500)

    broken = True
    with JudgeServer(dies, ["m"]) as server:
        words = f"base_url={server.base_url}", "concurrency=1", "retries=0"
        assert make(*words, out="dies")[0] == 1
        assert "run the command again to ask them: no answer after 1 tries" in capsys.readouterr().err
        kept = len((tmp_path / "dies" / ".sampled_served.jsonl").read_text().splitlines()) - 1
        assert 2 <= kept < 6
        broken = False
        assert make(*words, out="dies")[0] == 0
    assert [row["chosen"] for row in rows_of(tmp_path / "dies")] == [row["chosen"] for row in rows_of(tmp_path / "out")]


def test_best_of_takes_the_answer_of_the_highest_reward(folder, opened, tmp_path):
    words = [str(folder / "recipe.yaml"), f"output_dir={tmp_path}", f"max_new_tokens={TOKENS}", "temperature=0.8"]
    assert generate.main([*words, "best_of=4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    (tmp_path / "x").mkdir()
    sampled = sampling.sample(opened, range(6), tmp_path / "x", generation.Settings(TOKENS, 0.8, 1.0, 0), 4)
    asked = [(position, text) for position in range(6) for text in sampled[position]["answers"] if text]
    rewards = plain_rewards(folder, opened.rows, asked, None)
    for position, line in enumerate(lines):
        own = {text: reward for (at, text), reward in zip(asked, rewards, strict=True) if at == position}
        (answer,) = line["answers"].values()
        assert math.isclose(max(own.values()), own[answer], abs_tol=1e-4) and len(own) > 1
    assert len(lines) == 6
    before = sorted(tmp_path.rglob(".sampled.jsonl"))[0].read_text()
    assert generate.main([*words, "best_of=4"]) == 0  # everything is saved
    assert sorted(tmp_path.rglob(".sampled.jsonl"))[0].read_text() == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["best_of=4"], "temperature"),
        (["best_of=4", "temperature=0.7", "models=base"], "needs an adapter"),
        (["best_of=1", "temperature=0.7"], "best_of=1"),
        (["best_of=4", "temperature=0.7", "base_url=http://127.0.0.1:1/v1"], "base_url"),
    ],
)
def test_best_of_refuses_what_cannot_work(folder, tmp_path, capsys, words, said):
    assert exit_code(generate.main, folder / "recipe.yaml", f"output_dir={tmp_path}", *words) in (1, 2)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said in error


@pytest.mark.parametrize(
    "words, said",
    [
        (["answers=1"], "answers=1: must be at least 2"),
        (["max_prompts=0"], "max_prompts=0: must be at least 1"),
        (["temperature=0"], "greedy answers are all equal"),
        (["scoring=best"], "must be one of self, judge, objects"),
        (["adapter_name_or_path=null"], "name the adapter"),
        (["scoring=judge"], "scoring=judge needs judge_url="),
        (["scoring=objects"], "needs annotations="),
        (["scoring=objects", "annotations=no.json"], "there is no file no.json"),
        (["annotations=no.json"], "annotations= is about scoring=objects"),
        (["model=m"], "base_url= is missing"),
        (["dataset=nothing"], "not registered"),
        (["reference=nowhere"], "reference"),
    ],
)
def test_contradictions_are_refused_in_a_line(folder, tmp_path, capsys, words, said):
    assert exit_code(make_pairs.main, folder / "recipe.yaml", f"out={tmp_path}", *words) == 2
    assert said in capsys.readouterr().err


def test_a_reference_without_an_adapter_is_refused(opened, folder):
    with pytest.raises(UserError, match="adapter_config.json"):
        self_reward.use_reference(opened, str(folder))


def test_an_image_that_does_not_decode_leaves_its_prompt_out(make, opened, monkeypatch):
    def unreadable(reference):
        if reference == opened.rows[0]["image"]:
            raise images.ImageError("truncated")
        return load_image(reference)

    monkeypatch.setattr(generation, "load_image", unreadable)
    code, summary = make()
    assert code == 0 and summary["left_out"]["bad image"] == 1
    monkeypatch.setattr(generation, "load_image", load_image)
    monkeypatch.setattr(self_reward, "load_image", unreadable)
    code, summary = make(out="later")
    assert code == 0 and summary["left_out"]["bad image"] == 1
