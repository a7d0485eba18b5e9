"""Column `context`: a clean beginning of an answer that both responses go on from (C-DPO, arXiv 2507.12455)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.recipes import photo_rows, tokenized, write_rows
from helpers.tokenizers import mistral_v1
from llava_orpo.data import rlaif_v, rows
from llava_orpo.data.conversation import CONVERSATIONS, with_context

MISTRAL = CONVERSATIONS["llava_v16_mistral"]
CASES = [
    ("The picture shows a cat.", "It sleeps on a mat.", "It chases a dog."),
    ("The picture shows a cat. ", "It sleeps.", "It barks."),
    ("The picture shows a cat.", " It sleeps.", "\nIt barks."),
    ("A cat lies under", "neath the table.", "a tree."),
    ("It is 1", "2 o'clock.", "23 o'clock."),
    ("猫が", "寝ている。", "走る。"),
    ("A <image> and </s> stay text.", "So does <image>.", "</s>"),
    ("Ends with a line.\n", "\nThen this.", "Then that."),
    ("", "It sleeps.", "It barks."),
]


def whole_ids(context: str, response: str) -> list[int]:
    """The ids of the whole text, in one piece, as `encode_pairs` gives them without a context."""
    text = with_context(context, response)
    ((prompt, chosen, _),) = MISTRAL.encode_pairs(mistral_v1(), ["What is it?"], [text], ["."], [True])
    return prompt + chosen


@pytest.mark.parametrize("context, chosen, rejected", CASES)
def test_prompt_context_and_response_are_the_ids_of_the_whole_text(context, chosen, rejected):
    ((prompt, *answers),) = MISTRAL.encode_pairs(mistral_v1(), ["What is it?"], [chosen], [rejected], [True], [context])
    for answer, ids in zip((chosen, rejected), answers, strict=True):
        assert prompt + ids == whole_ids(context, answer)
    # Plain tokenization of the plain text, where no special token is written out in it.
    if "<" not in context + chosen + rejected:
        text = MISTRAL.render_prompt("What is it?", True) + MISTRAL.render_response(with_context(context, chosen))
        assert prompt + answers[0] == mistral_v1()(text).input_ids
    without = MISTRAL.encode_prompt(mistral_v1(), "What is it?", True)
    assert prompt[: len(without)] == without and (len(prompt) > len(without)) == bool(context)
    tokens = mistral_v1().convert_ids_to_tokens(answers[0])
    assert context.strip() == "" or "cat" not in "".join(tokens)  # the context is not in the response


def test_a_piece_across_the_boundary_belongs_to_the_responses():
    """ "under" + "neath" is one piece for the chosen answer alone: the prompt ends where both still agree."""
    pair = MISTRAL.encode_pairs(mistral_v1(), ["Where?"], ["x neath"], ["x"], [False], ["wonder ful"])
    ((prompt, chosen, rejected),) = pair
    for answer, ids in (("x neath", chosen), ("x", rejected)):
        ((start, whole, _),) = MISTRAL.encode_pairs(
            mistral_v1(), ["Where?"], [with_context("wonder ful", answer)], ["."], [False]
        )
        assert prompt + ids == start + whole


def with_contexts(folder) -> list[dict]:
    made = photo_rows(5, 1)
    contexts = ["A start of it.", None, "", made[3]["chosen"], "One thing. " + made[4]["rejected"] + " "]
    for name in ("rows", "without"):
        write_rows(folder, made, name)
    table = pq.read_table(folder / "rows.parquet").append_column("context", pa.array(contexts))
    pq.write_table(table.replace_schema_metadata(None), folder / "rows.parquet")
    return [{**row, "context": context} for row, context in zip(made, contexts, strict=True)]


@pytest.fixture
def context_loss(monkeypatch):
    """Stands for a recipe with `preference_loss: dpo_context`."""
    monkeypatch.setattr(rlaif_v, "_wants_context", lambda arguments: True)


def test_rows_with_a_context(tmp_path, context_loss):
    made = with_contexts(tmp_path)
    plain, _ = tokenized(tmp_path, {"dataset": "without"})
    found, _ = tokenized(tmp_path, {"max_skipped_fraction": 1.0})
    assert list(found["row"]) == [0, 1, 2]
    for column in ("prompt_ids", "chosen_ids", "rejected_ids", "pair_id"):
        assert list(found[column])[1:] == list(plain[column])[1:3]  # without a context they are as before
    begun, bare = found[0], plain[0]
    context = mistral_v1().decode(begun["prompt_ids"][len(bare["prompt_ids"]) :])
    assert context.strip() == made[0]["context"] and begun["question"] == bare["question"]
    listed = (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()
    reasons = {entry["row"]: entry["reason"] for entry in map(json.loads, listed)}
    assert reasons == {
        3: "`context` contains the whole answer: nothing is left of `chosen`",
        4: "`context` contains the whole answer: nothing is left of `rejected`",
    }


def test_the_other_step_masks_the_context(tmp_path, context_loss):
    with_contexts(tmp_path)
    found, _ = tokenized(tmp_path, {"max_skipped_fraction": 1.0, "shared_prefix": False})
    row = found[0]
    for side in ("chosen", "rejected"):
        learnt = [label for label in row[f"{side}_labels"] if label != -100]
        assert learnt == row[f"{side}_ids"] and row[f"{side}_input_ids"][-len(learnt) :] == learnt
        assert len(row[f"{side}_labels"]) == len(row["prompt_ids"]) - 1 + row["num_image_tokens"] + len(learnt)


def test_without_that_loss_the_column_is_not_used_and_that_is_said_once(tmp_path, monkeypatch):
    with_contexts(tmp_path)
    said = []
    monkeypatch.setattr(rlaif_v.logger, "warning_rank0", said.append, raising=False)
    found, _ = tokenized(tmp_path, {})
    plain, _ = tokenized(tmp_path, {"dataset": "without"})
    for column in ("prompt_ids", "chosen_ids", "rejected_ids", "pair_id"):
        assert list(found[column]) == list(plain[column])
    assert said == ["rows: the column `context` is not used: it needs `preference_loss: dpo_context`."]


def test_what_a_context_must_not_be():
    row = {"chosen": "A.", "rejected": "B."}
    assert rows.context_of(row) == rows.context_of({**row, "context": " "}) == ""
    for context, words in ((3, "not text but int"), ("half \ud83d", "half a character"), ("It. B.", "of `rejected`")):
        with pytest.raises(rows.RowError, match=words):
            rows.context_of({**row, "context": context})
    with pytest.raises(rows.RowError, match="nothing is left of `chosen`"):
        rows.context_of({"context": "All of it.", "chosen": " ", "rejected": "B."})


def test_the_key_decides():
    assert rlaif_v._wants_context(SimpleNamespace(preference_loss="dpo_context"))
    assert not rlaif_v._wants_context(SimpleNamespace(preference_loss="dpo"))
    assert not rlaif_v._wants_context(SimpleNamespace())
