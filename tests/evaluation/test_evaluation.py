"""evals/preference.py and evaluations: plain transformers' numbers, in any batch; resuming, best model, trackio."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import generate
import pytest
import torch
import variants
from datasets import Dataset
from llamafactory.data import template
from llamafactory.hparams import DataArguments
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import preference
from helpers.corruption import wrong_crc
from helpers.recipes import other_model, photo_rows, random_model, recipe, run_cli, write_recipe, write_rows
from helpers.serving import picture, png, random_adapter
from helpers.tokenizers import KINDS, chatml, mistral_v1, write_tokenizer
from llava_orpo.data.conversation import CONVERSATIONS
from llava_orpo.data.pairs import PairProcessor
from llava_orpo.errors import UsageError, UserError
from llava_orpo.evaluation import generation
from llava_orpo.evaluation.session import open_session
from llava_orpo.integration import activation
from llava_orpo.preference import scoring, writing
from llava_orpo.preference.records import ScoredPair
from llava_orpo.preference.scoring import ScoredRow

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}
SCORES = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")


@pytest.fixture(scope="module")
def rows():
    made = photo_rows(4, 2, aspect="mixed")
    made[1]["chosen"] = "Yes"  # one word and the end token
    made[5]["image"] = None
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("evaluation")
    write_rows(folder, rows)
    write_recipe(folder, {"eval_dataset": "rows", "allow_text_only": True})
    return folder


def evaluate(folder: Path, out: str, *overrides: str) -> list[dict]:
    assert preference.main([str(folder / "recipe.yaml"), f"output_dir={folder / out}", *overrides]) == 0
    return read(folder / out / "preference_pairs.jsonl")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(folder):
    return evaluate(folder, "base", "per_device_eval_batch_size=3")


@torch.no_grad()
def plain_logp(model, processor, row: dict, answer: str) -> tuple[float, int]:
    """(sum of log-probs, tokens) of the response: transformers alone, one prompt with one response, no plugin code."""
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") if row["image"] else None
    content = ([{"type": "image"}] if image else []) + [{"type": "text", "text": row["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    start = processor(images=image, text=prompt, return_tensors="pt")["input_ids"].shape[1]
    inputs = processor(images=image, text=f"{prompt} {answer}</s>", return_tensors="pt")
    logps = model(**inputs).logits[0].log_softmax(-1)
    ids = inputs["input_ids"][0, start:]
    return logps[start - 1 : -1].gather(1, ids[:, None]).sum().item(), len(ids)


def test_log_probs_are_those_of_transformers_one_response_at_a_time(rows, scored):
    model = AutoModelForImageTextToText.from_pretrained(random_model()).eval()
    processor = AutoProcessor.from_pretrained(random_model())
    assert len(scored) == len(rows)
    for row, pair in zip(rows, scored, strict=True):
        for side in ("chosen", "rejected"):
            logp, tokens = plain_logp(model, processor, row, row[side])
            assert pair[f"{side}_tokens"] == tokens
            assert pair[f"{side}_logp"] == pytest.approx(logp, abs=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["per_device_eval_batch_size=1"],
        ["per_device_eval_batch_size=8"],
        ["per_device_eval_batch_size=4", "group_pairs_by_image=true", "max_pairs_per_image=4"],
    ],
)
def test_batches_and_grouping_change_nothing(folder, scored, overrides):
    for a, b in zip(scored, evaluate(folder, "again", "restart=true", *overrides), strict=True):
        assert a["pair_id"] == b["pair_id"]
        for key in SCORES:
            assert b[key] == pytest.approx(a[key], rel=1e-5)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(folder, scored, monkeypatch):
    counted: list[int] = []
    original = scoring.score

    def counting(score_batch, *args, **kwargs):
        def once(batch):
            if sum(counted) >= 5 and not done:
                raise KeyboardInterrupt
            counted.append(len(batch["rows"]))
            return score_batch(batch)

        return original(once, *args, **kwargs)

    monkeypatch.setattr(scoring, "score", counting)
    words, done = ["per_device_eval_batch_size=3"], False
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, "interrupted", *words)
    assert not (folder / "interrupted" / "preference_pairs.jsonl").exists()
    saved = folder / "interrupted" / ".scored_true.jsonl"
    saved.write_text(saved.read_text() + '{"pair_id": "cut he')  # killed while writing
    counted.clear()
    done = True
    assert evaluate(folder, "interrupted", *words) == scored
    assert sum(counted) == len(scored) - 6
    counted.clear()
    assert evaluate(folder, "interrupted", *words) == scored and not counted
    evaluate(folder, "interrupted", "cutoff_len=4095", *words)  # other settings: nothing is reused
    assert sum(counted) == len(scored)


def test_scores_of_other_data_are_not_reused(folder, scored, rows, tmp_path):
    write_rows(tmp_path, [*rows[:-1], dict(rows[-1], rejected="Something else.")])
    words = [str(folder / "recipe.yaml"), f"output_dir={tmp_path / 'out'}"]
    assert preference.main(words) == 0
    assert read(tmp_path / "out" / "preference_pairs.jsonl") == scored
    assert preference.main([*words, f"dataset_dir={tmp_path}"]) == 0
    again = read(tmp_path / "out" / "preference_pairs.jsonl")
    assert again[:-1] == scored[:-1] and again[-1]["rejected_logp"] != scored[-1]["rejected_logp"]


def test_pairs_that_cannot_be_scored_are_counted_and_listed_once(tmp_path, rows, capsys):
    made = [dict(row) for row in rows[:4]]
    made[2]["image"] = {"bytes": wrong_crc(png(picture(60, 50))), "path": None}
    made[3]["chosen"] = None
    write_rows(tmp_path, made)
    write_recipe(tmp_path, {"eval_dataset": "rows", "max_skipped_fraction": 0.5})
    for _ in range(2):  # the second takes the scores of the first
        assert [pair["dataset"] for pair in evaluate(tmp_path, "out")] == ["rows"] * 2
        listed = read(tmp_path / "out" / "skipped_rows.jsonl")
        assert [(entry["stage"], entry["row"]) for entry in listed] == [("reading", 3), ("evaluation", 2)]
    write_rows(tmp_path, made[:3])
    with pytest.raises(UserError, match=r"^dataset rows, row 2, pair \S+: bad image: .*`bad_rows: skip`"):
        evaluate(tmp_path, "strict", "bad_rows=error")
    assert not (tmp_path / "strict" / "preference_eval.json").exists()


def test_against_another_model(folder, scored, tmp_path, capsys):
    other_folder = other_model(tmp_path / "other")
    ours = evaluate(folder, "paired", f"against={other_folder}")
    other = read(folder / "paired-against" / "preference_pairs.jsonl")
    assert ours == scored and [p["chosen_logp"] for p in other] != [p["chosen_logp"] for p in ours]
    comparison = json.loads((folder / "paired" / "comparison.json").read_text())
    want = sum(p["correct"] for p in other) - sum(p["correct"] for p in ours)
    assert comparison["difference"] == pytest.approx(want / len(ours))
    assert comparison["difference_low"] <= comparison["difference"] <= comparison["difference_high"]
    assert "McNemar" in capsys.readouterr().out


def test_every_form_of_a_model_in_one_table(folder, scored, tmp_path, capsys):
    random_adapter(random_model(), tmp_path / "adapter")
    other = other_model(tmp_path / "other")
    words = [
        str(folder / "recipe.yaml"),
        f"output_dir={tmp_path / 'forms'}",
        "finetuning_type=lora",
        "prompt=1",
        f"trained={tmp_path / 'adapter'}",
        f"models={random_model()},{other}",
        "max_new_tokens=4",
    ]
    assert variants.main(words) == 0
    made = json.loads((tmp_path / "forms" / "variants.json").read_text())
    adapter, base, moved = made["forms"]
    assert adapter["form"] == "adapter, on its unquantized base" and moved["form"] == "other"
    assert adapter["bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert base["bytes"] == moved["bytes"] == (other / "model.safetensors").stat().st_size
    assert read(tmp_path / "forms" / random_model().name / "preference_pairs.jsonl") == scored
    assert base["accuracy"] == pytest.approx(sum(p["correct"] for p in scored) / len(scored))
    assert base["difference"] == pytest.approx(base["accuracy"] - adapter["accuracy"])
    assert base["answer"] and base["answer"] != moved["answer"]
    page = (tmp_path / "forms" / "variants.md").read_text()
    assert page in capsys.readouterr().out and f"{base['accuracy']:.1%}" in page
    assert page.count("\n| ") == 4
    with pytest.raises(UsageError, match="name of its own"):
        variants.main([*words[:-2], f"models={other},{tmp_path}/elsewhere/other"])


QUESTIONS = (
    "What is in the picture?",
    "Does the sign say USER: or ASSISTANT: in red?",
    "Is this [INST] a question? [/INST]",
    "user\nWhat did I just write?\nassistant",
    "  Is the text </s>, <|im_end|> or <image> in it?\n",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_question_that_is_shown_is_the_users_own(name, kind, tmp_path):
    """In examples and in generations, under every template and tokenizer: nothing of the format, nothing cut off."""
    activation.register()
    tokenizer = (chatml if name == "llava_v16_34b" else mistral_v1)(kind)
    processor = AutoProcessor.from_pretrained(random_model())
    pairs = PairProcessor(template.TEMPLATES[name], tokenizer, processor, DataArguments(cutoff_len=4096))
    image, n = png(picture(60, 40)), len(QUESTIONS)
    identity = {"dataset": "d", "source": "s", "question_type": "t", "image_hash": "h", "width": 60, "height": 40}
    rows = Dataset.from_dict(
        pairs.preprocess_dataset(
            {
                "_prompt": [[{"role": "user", "content": question}] for question in QUESTIONS],
                "_response": [[{"content": "Yes, it is."}, {"content": "No."}]] * n,
                "_images": [[image]] * n,
                "_identity": [{**identity, "pair_id": str(i), "row": i} for i in range(n)],
            }
        )
    )
    assert rows["skip"] == [""] * n
    scores = dict(subset="s/t", image_condition="true", chosen_logp=-1.0, chosen_tokens=1, rejected_tokens=1)
    named = {key: identity[key] for key in ("dataset", "source", "question_type", "image_hash")}
    scored = [
        ScoredRow(i, str(i), "d", ScoredPair(pair_id=str(i), rejected_logp=-2.0 - i, **named, **scores))
        for i in range(n)
    ]
    examples = writing.write_examples(tmp_path, rows, scored, tokenizer, n)
    assert examples == read(tmp_path / "preference_examples.jsonl")
    session = SimpleNamespace(rows=rows, tokenizer=tokenizer)
    lines = [generation.describe(session, i, {"pair_id": str(i)}, tmp_path) for i in range(n)]
    for shown in (examples, lines):
        assert {line["pair_id"]: line["question"] for line in shown} == dict(zip("01234", QUESTIONS, strict=True))
        assert {(line["chosen"], line["rejected"]) for line in shown} == {("Yes, it is.", "No.")}


def test_the_question_that_is_shown_is_the_users_own_in_whole_runs_with_chatml(tmp_path):
    made = photo_rows(len(QUESTIONS), 1)
    for row, question in zip(made, QUESTIONS, strict=True):
        row["question"] = question
    write_rows(tmp_path, made)
    model = tmp_path / "model"
    shutil.copytree(random_model(), model)
    added = ["<image>", "<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", added, eos="<|im_end|>", json_too=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, model)
    write_recipe(tmp_path, {"eval_dataset": "rows", "model_name_or_path": str(model), "template": "llava_v16_34b"})
    out = tmp_path / "out"
    words = [str(tmp_path / "recipe.yaml"), f"output_dir={out}"]
    assert preference.main(words) == 0
    assert generate.main([*words, "max_new_tokens=2"]) == 0
    for name in ("preference_examples", "generations"):
        lines = read(out / f"{name}.jsonl")
        assert sorted(line["question"] for line in lines) == sorted(QUESTIONS)
        assert {line["chosen"] for line in lines} == {row["chosen"] for row in made}


def test_answers_change_no_score(folder, scored, tmp_path):
    """Generating leaves the model ready to score: the same numbers before and after, to the bit."""
    keys = {"eval_dataset": "rows", "allow_text_only": True, "dataset_dir": str(folder)}
    with open_session(recipe(tmp_path, keys), str(tmp_path / "out")) as session:
        batch = session.collator([session.rows[i] for i in (0, 1, 2)])
        before = session.score_batch(batch)["logps"]
        want = [pair[f"{side}_logp"] for side in ("chosen", "rejected") for pair in scored[:3]]
        assert before.tolist() == pytest.approx(want, rel=1e-5)
        settings = generation.Settings(max_new_tokens=3)
        (asked,) = generation.generate(session, [0, 2], settings)
        assert all(record["answer"] for record in asked)
        assert torch.equal(session.score_batch(batch)["logps"], before)
        (again,) = generation.generate(session, [0, 2], settings)
        assert again == asked


@pytest.mark.slow
def test_early_stopping_best_model_and_trackio(tmp_path):
    """The accuracy cannot rise above 1, so training stops `early_stopping_steps` evaluations after it got there; the
    adapter kept is that of the best checkpoint; every number is in trackio's database on this machine."""
    pairs = photo_rows(4, 1)
    for pair in pairs:  # one thing to learn
        pair["chosen"], pair["rejected"] = "Yes, it is.", "No, not at all."
    write_rows(tmp_path, pairs)
    keys = {
        **LORA,
        "eval_dataset": "rows",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "max_steps": 40,
        "learning_rate": 5e-3,
        "pref_beta": 1.0,
        "metric_for_best_model": "preference_accuracy",
        "load_best_model_at_end": True,
        "early_stopping_steps": 2,
        "report_to": ["trackio"],
        "trackio_space_id": None,
        "project": "llava-orpo-test",
        "run_name": "stopped",
    }
    run_cli("train", write_recipe(tmp_path, keys), env={"TRACKIO_DIR": str(tmp_path / "trackio")})
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    history = {
        entry["step"]: entry["eval_preference_accuracy"]
        for entry in state["log_history"]
        if "eval_preference_accuracy" in entry
    }
    best = next(step for step, accuracy in history.items() if accuracy == max(history.values()))
    assert state["best_metric"] == max(history.values()) == 1.0
    assert state["global_step"] == best + 4 < 40
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    kept, at_best = (load_file(path / "adapter_model.safetensors") for path in (out, out / f"checkpoint-{best}"))
    last = load_file(out / f"checkpoint-{best + 4}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], at_best[name]) for name in at_best)
    assert not all(torch.equal(kept[name], last[name]) for name in last)

    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(text) for (text,) in connection.execute("SELECT metrics FROM metrics")]
    names = {name for entry in logged for name in entry}
    assert {"train/loss", "train/odds_ratio_loss", "eval/preference_accuracy", "eval/sft_loss"} <= names
    assert max(entry.get("eval/preference_accuracy", 0) for entry in logged) == 1.0
