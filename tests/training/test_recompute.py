"""`recompute`: as many decoder layers run twice as asked for, and no bit of a loss or gradient changes."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from helpers.recipes import build_trainer, photo_rows, recipe, step, write_rows
from llava_orpo import precheck, upstream
from llava_orpo.errors import UserError
from llava_orpo.step.attention import unwrap

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,down_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}
FULL = {"finetuning_type": "full", "freeze_multi_modal_projector": False}
GROUPED = {"group_pairs_by_image": True}
ON = {"disable_gradient_checkpointing": False}
CASES = {
    "lora": LORA,
    "lora-grouped-nonreentrant": {**LORA, **GROUPED, "use_reentrant_gc": False},
    "full-grouped": {**FULL, **GROUPED},
    "full-nonreentrant": {**FULL, "use_reentrant_gc": False},
}


@contextmanager
def forwards(trainer):
    """How often each decoder layer runs its forward inside, by number."""
    counts = [0] * len(unwrap(trainer.model).get_decoder().layers)

    def count(number):
        def hook(*_):
            counts[number] += 1

        return hook

    layers = unwrap(trainer.model).get_decoder().layers
    handles = [layer.self_attn.register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    yield counts
    for handle in handles:
        handle.remove()


def one_step(trainer):
    with forwards(trainer) as counts:
        loss, _, gradients = step(trainer, [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    return counts, loss, gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recompute")
    write_rows(folder, photo_rows(2, 2))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_do_not_change_by_a_bit(folder, name):
    trainer = build_trainer(folder, {**CASES[name], **ON, "recompute": 1})
    found = {1: one_step(trainer)}
    for count in (2, 0):
        upstream.recompute_first(unwrap(trainer.model).get_decoder().layers, count)
        found[count] = one_step(trainer)
    assert {count: runs for count, (runs, *_) in found.items()} == {0: [1, 1], 1: [2, 1], 2: [2, 2]}
    for count in (1, 0):
        assert_same(found[count], found[2])


def assert_same(found, expected):
    (_, loss, gradients), (_, other_loss, others) = found, expected
    assert loss == other_loss and gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert sum(gradient.abs().max() > 0 for gradient in gradients.values()) > 4


def test_llamafactorys_key_means_none(folder):
    every = one_step(build_trainer(folder, {**LORA, **ON}))
    assert every[0] == [2, 2], "auto is all on a CPU"
    for keys in ({"disable_gradient_checkpointing": True}, {**ON, "recompute": "none"}):
        none = one_step(build_trainer(folder, {**LORA, **keys}))
        assert none[0] == [1, 1]
        assert_same(none, every)


def test_llamafactorys_own_step_takes_the_key(folder):
    trainer = build_trainer(folder, {**LORA, **ON, "shared_prefix": False, "recompute": 1})
    assert one_step(trainer)[0] == [2, 1]


def test_a_trained_vision_tower_keeps_its_own_checkpointing(folder):
    keys = {**LORA, **ON, "freeze_vision_tower": False, "lora_target": "all", "recompute": 1}
    trainer = build_trainer(folder, keys)
    tower = unwrap(trainer.model).model.vision_tower.vision_model.encoder.layers
    assert all(layer.gradient_checkpointing for layer in tower)


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"disable_gradient_checkpointing": True, "recompute": "all"}, "recompute: all contradicts disable_gradient_"),
        ({"disable_gradient_checkpointing": True, "recompute": 1}, "recompute: 1 contradicts disable_gradient_"),
        ({**ON, "gradient_checkpointing": True, "recompute": "none"}, "recompute: none contradicts gradient_check"),
        ({**ON, "recompute": 3}, "recompute: 3 is more than the model's 2 decoder layers; set `recompute: all`."),
    ],
)
def test_contradictions_are_refused_by_name(folder, keys, line):
    with pytest.raises(UserError) as refused:
        build_trainer(folder, {**LORA, **keys})
    assert line in str(refused.value) and "\n" not in str(refused.value)
    (problem,) = precheck.problems(recipe(folder, {**LORA, **keys}))
    assert problem == str(refused.value)
