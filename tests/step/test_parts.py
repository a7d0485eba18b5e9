"""Micro-batches in parts of at most `max_tokens_per_step` tokens: what is cut where, and that nothing else changes."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.drawn import examples
from helpers.ranks import train
from helpers.recipes import build_trainer, photo_rows, recipe, run_cli, write_recipe, write_rows
from helpers.same_training import assert_same
from llava_orpo.errors import UserError
from llava_orpo.evaluation.session import open_session
from llava_orpo.step.batches import cut_to_fit
from llava_orpo.step.packing import TokenPair, pack, packed_length
from llava_orpo.step.parts import filled_up, num_tokens, parts_of
from llava_orpo.training import trainer as trainer_module

KEYS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "group_pairs_by_image": True,
    "per_device_train_batch_size": 6,
}
tokens = st.lists(st.integers(5, 7), min_size=1, max_size=5)
pairs = st.builds(TokenPair, prompt_ids=tokens, chosen_ids=tokens, rejected_ids=tokens)


@examples(60)
@given(st.lists(pairs, min_size=1, max_size=5))
def test_the_length_of_a_group_is_known_without_packing_it(group):
    assert packed_length(group) == pack([group]).num_tokens


@examples(60)
@given(st.lists(st.lists(pairs, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 60))
def test_groups_are_cut_in_order_and_as_little_as_the_limit_demands(groups, limit):
    def length(part):
        return sum(packed_length(group) for group in part)

    parts = cut_to_fit(groups, length, limit)
    assert [pair for part in parts for group in part for pair in group] == [p for group in groups for p in group]
    assert all(length(part) <= limit or len(part) == len(part[0]) == 1 for part in parts)
    if length(groups) <= limit:
        assert parts == [groups]
    whole = [group for group in groups if length([group]) <= limit]
    assert all(group in [piece for part in parts for piece in part] for group in whole), "a group that fits stays whole"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer whose micro-batch is three images with two pairs each."""
    folder = tmp_path_factory.mktemp("parts")
    write_rows(folder, photo_rows(3, 2))
    trainer = build_trainer(folder, {**KEYS, "output_dir": str(folder / "out")})
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at the start: lora_A would get no gradient
                torch.nn.init.normal_(parameter, std=0.02)
    return trainer


def batch(trainer, limit: int | None, features=None):
    collator = copy.copy(trainer.data_collator)
    collator.max_tokens = limit
    rows = features or [dict(trainer.train_dataset[i]) for i in range(6)]
    return collator(rows)


LIMITS = ["between images", "between the pairs of an image"]


def limits(trainer) -> dict[str, int]:
    """The limit under which every image is a part of its own, and the one under which every pair is."""
    groups = batch(trainer, None)["packed"].layout.groups
    longest = max(sum(group) for group in groups)
    alone = max(part["packed"].num_tokens for part in batch(trainer, 1)["parts"])
    assert alone < longest
    return {"between images": longest, "between the pairs of an image": alone}


def trained(trainer, made):
    """(loss, logged terms, gradients) of one training step on `made`, as the training loop calls it."""
    trainer.model.zero_grad()
    trainer._sums.clear()
    trainer.current_gradient_accumulation_steps = 1
    trainer._pairs_in_step = made["weights"].sum()
    trainer._anomalies.begin_step()
    loss = trainer.training_step(trainer.model, made)
    sums = trainer._sums.pop("train")
    count = sums.pop("")
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss, {key: (value / count).item() for key, value in sums.items()} | {"pairs": count.item()}, gradients


def assert_equal(one, other, tolerance=1e-6):
    (loss, terms, gradients), (loss_2, terms_2, gradients_2) = one, other
    assert loss_2.item() == pytest.approx(loss.item(), rel=tolerance)
    assert terms_2 == pytest.approx(terms, rel=tolerance, abs=1e-6)
    assert gradients.keys() == gradients_2.keys() and gradients
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert total > 1e-3
    for name, gradient in gradients.items():
        assert (gradients_2[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7 * total, name


@pytest.mark.parametrize("where", LIMITS)
@pytest.mark.parametrize("broken", [False, True])
def test_loss_terms_and_gradients_equal_those_of_the_whole(trainer, where, broken):
    features = [dict(trainer.train_dataset[i]) for i in range(6)]
    if broken:  # one image can't be decoded: its pairs have no weight
        for row in features:
            if row["image_hash"] == features[0]["image_hash"]:
                row["image"] = b"no image"
    limit = limits(trainer)[where]
    whole, cut = batch(trainer, None, features), batch(trainer, limit, features)
    assert len(cut["parts"]) >= 3 and "packed" not in cut
    assert max(part["packed"].num_tokens for part in cut["parts"]) <= limit
    assert [row["pair_id"] for row in cut["rows"]] == [row["pair_id"] for row in whole["rows"]]
    assert cut["weights"].tolist() == whole["weights"].tolist() and (0.0 in cut["weights"]) == broken
    assert cut["bad_images"] == whole["bad_images"]
    expected = trained(trainer, whole)
    assert expected[1]["pairs"] == 6 - 2 * broken
    assert_equal(expected, trained(trainer, cut))


def test_forward_and_backward_of_the_parts_alternate(trainer, monkeypatch):
    """Never two graphs at a time, and never more tokens than the limit in one forward."""
    cut, done = batch(trainer, limits(trainer)["between the pairs of an image"]), []
    forward, backward = trainer.concatenated_forward, trainer.accelerator.backward

    def seen(model, part, is_ref_model=False):
        done.append(part["packed"].num_tokens)
        return forward(model, part, is_ref_model)

    monkeypatch.setattr(trainer, "concatenated_forward", seen)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss, **kw: (done.append("backward"), backward(loss)))
    trained(trainer, cut)
    assert done[1::2] == ["backward"] * len(cut["parts"])
    assert done[::2] == [part["packed"].num_tokens for part in cut["parts"]]
    assert trainer.floating_point_ops(cut) > trainer.floating_point_ops(batch(trainer, None)), "the image runs again"


def test_a_filled_up_batch_is_the_same_batch(trainer):
    """Engines that shard make every process run as many parts: those that are added change nothing."""
    limit = limits(trainer)["between images"]
    whole, cut = batch(trainer, None), batch(trainer, limit)
    longer = filled_up(cut, len(cut["parts"]) + 2)
    assert len(longer["parts"]) == len(cut["parts"]) + 2 and filled_up(cut, 1) is cut
    assert num_tokens(longer) > num_tokens(cut)
    exact, filled = trained(trainer, cut), trained(trainer, longer)
    assert torch.equal(exact[0], filled[0]) and exact[1] == filled[1]
    assert all(torch.equal(exact[2][name], gradient) for name, gradient in filled[2].items())
    assert len(parts_of(filled_up(whole, 3))) == 3
    assert_equal(trained(trainer, whole), trained(trainer, filled_up(whole, 3)), tolerance=0)
    with torch.no_grad():  # an evaluation
        terms, output = trainer.pair_losses(trainer.model, longer)
        expected_terms, expected = trainer.pair_losses(trainer.model, whole)
    assert len(terms["loss"]) == 6 and len(output["logps_sum"]) == 12
    for key, value in {**expected_terms, **expected}.items():
        torch.testing.assert_close({**terms, **output}[key], value, rtol=1e-5, atol=1e-5)


def test_processes_of_an_engine_that_shards_agree_on_the_number_of_parts(trainer, monkeypatch):
    """In several processes of such an engine, and only there; another process has 1, 4 and 1 parts."""
    limit = limits(trainer)["between images"]
    batches = [batch(trainer, limit), batch(trainer, None), batch(trainer, None)]
    asked = []

    def all_reduce(counts, op):
        asked.append(counts.tolist())
        counts.copy_(torch.maximum(counts, torch.tensor([1, 4, 1])))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for together, processes, max_tokens in ((False, 2, limit), (True, 1, limit), (True, 2, None)):
        one = stub(together, processes, max_tokens)
        assert trainer_module.SharedPrefixTrainer._in_lockstep(one, batches) is batches and not asked
    run = trainer_module.SharedPrefixTrainer._in_lockstep(stub(True, 2, limit), batches)
    assert asked == [[3, 1, 1]]
    assert [len(parts_of(each)) for each in run] == [3, 4, 1] and run[0] is batches[0] and run[2] is batches[2]
    assert [bool(part.get("filler")) for part in run[1]["parts"]] == [False, True, True, True]


def stub(together: bool, processes: int, max_tokens: int | None) -> SimpleNamespace:
    return SimpleNamespace(
        data_collator=SimpleNamespace(max_tokens=max_tokens),
        _all_forwards_together=together,
        args=SimpleNamespace(world_size=processes, device="cpu"),
    )


def test_it_is_said_once_that_batches_run_in_parts(trainer, monkeypatch):
    said: list[str] = []
    for kind in ("info_rank0", "warning_rank0"):
        monkeypatch.setattr(trainer_module.logger, kind, said.append)
    monkeypatch.setattr(trainer, "_told_of_parts", set())
    cut = batch(trainer, limits(trainer)["between images"])
    trainer._tell_of_parts(filled_up(batch(trainer, None), 2))
    assert said == [], "a batch that is not cut"
    for limit in (5000, 5000, 10, 10):
        monkeypatch.setattr(trainer.data_collator, "max_tokens", limit)
        trainer._tell_of_parts(cut)
    assert len(said) == 2
    assert "runs in 3 parts of at most" in said[0] and "longer than the 10 that a forward may have" in said[1]


def test_the_plan_s_limit_stands_back_behind_the_key(trainer, monkeypatch):
    monkeypatch.setattr(trainer.data_collator, "max_tokens", None)
    trainer.limit_tokens(3000)
    assert trainer.data_collator.max_tokens == 3000
    monkeypatch.setattr(trainer.plugin, "max_tokens_per_step", 2000)
    trainer.limit_tokens(1000)
    assert trainer.data_collator.max_tokens == 3000
    monkeypatch.setattr(trainer.plugin, "max_tokens_per_step", None)
    monkeypatch.setattr(trainer, "bco_gemma", 0.5)  # the parts' baselines would be others
    trainer.limit_tokens(1000)
    assert trainer.data_collator.max_tokens == 3000


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"max_tokens_per_step": 40}, r"max_tokens_per_step: 40 is less than the \d+ tokens of the longest pair"),
        ({"max_tokens_per_step": 9999, "shared_prefix": False}, "is for the shared-prefix step"),
        ({"max_tokens_per_step": 9999, "pref_loss": "sigmoid", "pref_bco_weight": 0.5}, "not go with pref_bco_weight"),
        ({"max_tokens_per_step": 0}, "max_tokens_per_step: 0 is not allowed; it must be a whole number, 1 or more"),
    ],
)
def test_limits_that_cannot_be_kept_are_refused(tmp_path, keys, sentence):
    write_rows(tmp_path, photo_rows(1, 2))
    with pytest.raises(UserError, match=sentence):
        build_trainer(tmp_path, {**KEYS, **keys})


def test_the_reference_model_keeps_to_the_limit_too(tmp_path, monkeypatch):
    write_rows(tmp_path, photo_rows(3, 2))
    trainer = build_trainer(tmp_path, {**KEYS, "pref_loss": "sigmoid"})
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # else policy and reference are the same
                torch.nn.init.normal_(parameter, std=0.02)
    limit, ran = limits(trainer)["between images"], []
    forward = trainer.concatenated_forward

    def seen(model, part, is_ref_model=False):
        ran.append((is_ref_model, part["packed"].num_tokens))
        return forward(model, part, is_ref_model)

    monkeypatch.setattr(trainer, "concatenated_forward", seen)
    expected = trained(trainer, batch(trainer, None))
    ran.clear()
    assert_equal(expected, trained(trainer, batch(trainer, limit)))
    assert [reference for reference, _ in ran] == [False, True] * 3 and max(tokens for _, tokens in ran) <= limit
    assert expected[1]["rewards/margins"] != 0


@pytest.mark.slow
def test_a_recipe_trains_and_evaluates_in_parts(tmp_path):
    """Through the real command, with gradient accumulation: adapters, logs and scores are those without a limit."""
    write_rows(tmp_path, photo_rows(4, 3))
    more = {
        "eval_dataset": "rows",
        "do_eval": True,
        "per_device_eval_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-3,  # else Adam makes a step of the whole learning rate out of a gradient that is rounding
        "max_pairs_per_image": 3,
    }
    keys = {**KEYS, **more}
    train(recipe(tmp_path, {**keys, "output_dir": str(tmp_path / "whole")}))
    path = write_recipe(tmp_path, {**keys, "output_dir": str(tmp_path / "parts")})
    done = run_cli("train", path, "max_tokens_per_step=135", env={"LLAMAFACTORY_VERBOSITY": "INFO"})
    assert (done.stdout + done.stderr).count("A micro-batch runs in") == 1
    assert_same(tmp_path / "whole", tmp_path / "parts", tolerance=1e-5)
    scores = [
        [json.loads(line) for line in (tmp_path / name / "preference_pairs.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert len(scores[0]) == 12 and [pair["pair_id"] for pair in scores[0]] == [pair["pair_id"] for pair in scores[1]]
    for whole, parts in zip(*scores, strict=True):
        for key in ("chosen_logp", "rejected_logp"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4), key


def test_the_commands_that_evaluate_keep_to_the_limit(tmp_path):
    write_rows(tmp_path, photo_rows(3, 2))
    keys = {"eval_dataset": "rows", "group_pairs_by_image": True, "per_device_eval_batch_size": 6}
    content, ran = recipe(tmp_path, {**KEYS, **keys, "max_tokens_per_step": 135}), []
    with open_session(content, str(tmp_path / "scores")) as session:
        rows = [dict(session.rows[i]) for i in range(6)]
        cut = session.collator(rows)
        forward = session.forward
        session.forward = lambda part: ran.append(part["packed"].num_tokens) or forward(part)
        scores = session.score_batch(cut)["logps"]
        session.collator.max_tokens = None
        expected = session.score_batch(session.collator(rows))["logps"]
    assert len(ran) == len(cut["parts"]) + 1 and max(ran[:-1]) <= 135 < ran[-1]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
