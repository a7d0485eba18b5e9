"""`recompute`: as many decoder layers run twice as asked for, and no bit of a loss or gradient changes."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from helpers.ranks import train_on_processes
from helpers.recipes import build_trainer, photo_rows, recipe, step, write_rows
from helpers.same_training import adapter
from llava_orpo import precheck, upstream
from llava_orpo.errors import UserError
from llava_orpo.integration.run import current
from llava_orpo.step.attention import unwrap
from llava_orpo.training import recompute, workflow
from llava_orpo.training import trainer as trainer_module

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,down_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}
FULL = {"finetuning_type": "full", "freeze_multi_modal_projector": False}
GROUPED = {"group_pairs_by_image": True}
HEAVY = pytest.mark.heavy
ON = {"disable_gradient_checkpointing": False}
CASES = {
    "lora": LORA,
    "full-grouped-nonreentrant": {**FULL, **GROUPED, "use_reentrant_gc": False},
    "lora-grouped-nonreentrant": {**LORA, **GROUPED, "use_reentrant_gc": False},
    "full": FULL,
}
QUICK = ("lora", "full-grouped-nonreentrant")


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


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else HEAVY) for n in CASES])
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


# auto -----------------------------------------------------------------------------------------------------------


TRAIN = {**LORA, **ON, "per_device_train_batch_size": 2, "max_steps": 3, "save_steps": 2, "logging_steps": 1}


def train(folder, name, **keys):
    """Trains in this process as `llamafactory-cli train` would; returns the adapter."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train.callbacks import LogCallback

    *arguments, _ = get_train_args(recipe(folder, {**TRAIN, "output_dir": str(folder / name), **keys}))
    workflow.run_dpo(current(), *arguments, [LogCallback()])
    return adapter(folder / name)


@pytest.fixture(scope="module")
def built(folder):
    """(a trainer that takes no steps, its `FewestLayers`)."""
    trainer = build_trainer(folder, TRAIN)
    trainer.create_optimizer()
    (chooser,) = choosers(trainer)
    return trainer, chooser


def choosers(trainer) -> list[recompute.FewestLayers]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, recompute.FewestLayers)]


@pytest.fixture
def said(monkeypatch):
    """The lines of the log about `recompute`."""
    lines = []
    for kind in ("info_rank0", "warning_rank0"):
        monkeypatch.setattr(recompute.logger, kind, lines.append)
    return lines


@pytest.fixture
def runs(monkeypatch):
    """How many layers were recomputed in each forward that trains, the tried ones among them."""
    seen, packed = [], trainer_module.packed_logps

    def counted(model, *args, **kwargs):
        if model.training:
            seen.append(upstream.recomputed(unwrap(model).get_decoder().layers))
        return packed(model, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "packed_logps", counted)
    return seen


class OutOfMemory:
    """Raises torch's error in the last layer's attention, at the calls of the given numbers."""

    def __init__(self, monkeypatch, *at: int):
        self.calls, self.at = 0, at
        packed = trainer_module.packed_logps

        def failing(model, *args, **kwargs):
            self.calls += 1
            if self.calls - 1 not in self.at:
                return packed(model, *args, **kwargs)
            layer = unwrap(model).get_decoder().layers[-1]
            handle = layer.self_attn.register_forward_pre_hook(self._fail)
            try:
                return packed(model, *args, **kwargs)
            finally:
                handle.remove()

        monkeypatch.setattr(trainer_module, "packed_logps", failing)

    def _fail(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(scope="module")
def whole(folder, built):
    """The adapter of a training that recomputes every layer, and the bytes computed for each number of layers."""
    traces = built[1].traces()
    return train(folder, "whole", recompute="all"), [traces.need(count) for count in range(traces.layers + 1)]


def limit_of(monkeypatch, limit):
    monkeypatch.setattr(recompute, "memory_limit", lambda device: int(limit))


@pytest.mark.parametrize(
    "count", [pytest.param(0, marks=pytest.mark.heavy), 1, pytest.param(2, marks=pytest.mark.heavy)]
)
def test_auto_takes_the_fewest_layers_and_changes_nothing(folder, whole, monkeypatch, said, runs, count):
    expected, needed = whole
    assert needed[0] > needed[1] > needed[2] > recompute.RESERVE
    limit_of(monkeypatch, needed[count] + 1)
    found = train(folder, f"auto-{count}")
    assert runs == [count] * 4, "the longest batch is tried once before three steps"
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert f"auto recomputes {count} of 2 decoder layers." in said[-1] and "GB computed for the longest" in said[0]


def test_it_goes_back_one_notch_at_a_time(folder, whole, monkeypatch, said, runs):
    limit_of(monkeypatch, 1e12)
    OutOfMemory(monkeypatch, 0, 1)
    found = train(folder, "back")
    assert runs == [0, 1, 2, 2, 2, 2]
    assert all(torch.equal(tensor, whole[0][name]) for name, tensor in found.items())
    assert [line for line in said if "does not fit" in line] == [
        f"recompute: the longest batch does not fit with {n} of 2 layers recomputed; now {n + 1} are." for n in (0, 1)
    ]


def test_what_never_fits_stops_before_the_first_step(built, monkeypatch):
    trainer, chooser = built
    monkeypatch.setattr(trainer.data_collator, "max_tokens", None)  # this is put back
    OutOfMemory(monkeypatch, 0, 1, 2, 3)  # the last time with a pair alone
    with pytest.raises(UserError, match="Out of memory before the first step.*Lower per_device_train_batch_size"):
        chooser._tried(unwrap(trainer.model).get_decoder().layers, 0)


def test_no_limit_is_set_where_a_loss_needs_the_whole_batch(built, monkeypatch, said):
    trainer, chooser = built
    monkeypatch.setattr(trainer, "bco_gemma", 1.0)
    OutOfMemory(monkeypatch, 0, 1, 2)
    with pytest.raises(UserError, match="Out of memory before the first step"):
        chooser._tried(unwrap(trainer.model).get_decoder().layers, 0)
    assert trainer.data_collator.max_tokens is None and not any("run in parts" in line for line in said)


def test_a_batch_that_does_not_fit_with_all_layers_runs_in_parts(folder, whole, monkeypatch, said, runs):
    limit_of(monkeypatch, 1e12)
    OutOfMemory(monkeypatch, 0, 1, 2)
    found = train(folder, "tried parts")
    assert runs == [0, 1, 2] + [2, 2] * 4, "each step has two pairs, and so had the try"
    assert_about_equal(found, whole[0])
    assert [line for line in said if "run in parts" in line]


def test_parts_are_computed_where_a_pair_fits_and_a_batch_does_not(folder, built, whole, monkeypatch, said, runs):
    pairs = [pair for group in built[1].traces().groups for pair in group]
    one = max(built[1]._traces_of([[pair]]).need(2) for pair in pairs)
    assert one < whole[1][2]
    limit_of(monkeypatch, (one + whole[1][2]) / 2)
    found = train(folder, "computed parts")
    assert runs == [2, 2] * 4
    assert_about_equal(found, whole[0])
    assert ["run in parts" in line for line in said] == [False, True, False]


def assert_about_equal(found, expected):
    """Sums over pairs are added up in another order."""
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-4 * expected[name].abs().max().item()), name


def test_the_longest_batch_is_tried_beside_what_later_steps_hold(built, monkeypatch, said):
    trainer, chooser = built
    monkeypatch.setattr(trainer.args, "gradient_accumulation_steps", 2)
    longest = max(row_tokens(row) for row in trainer.train_dataset)
    seen, forward = [], trainer.pair_losses

    def looked_at(model, batch):
        held = [p.grad is not None for p in model.parameters() if p.requires_grad]
        seen.append((all(held), model.training, max(row_tokens(row) for row in batch["rows"])))
        drawn()
        return forward(model, batch)

    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    monkeypatch.setattr(trainer, "pair_losses", looked_at)
    before = upstream.random_state()
    expected = drawn()
    upstream.set_random_state(before)
    trainer.model.eval()
    chooser.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert seen == said == [] and upstream.recomputed(unwrap(trainer.model).get_decoder().layers) == 2, "on a CPU"
    limit_of(monkeypatch, 1e12)
    chooser.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert seen == [(True, True, longest)]
    assert drawn() == expected, "the random states are those of a training without the try"
    assert all(p.grad is None for p in trainer.model.parameters()) and not trainer.model.training
    assert (
        chooser._planned(1, 2) == (2, recompute.NO_LIMIT)
        and "all layers recomputed; 0.0 GB can be had. It may not fit" in said[-1]
    )
    assert trainer._sums == {} and not trainer._anomalies.pairs(), "the try is in no log"


def row_tokens(row) -> int:
    return row["num_image_tokens"] + sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def test_a_later_out_of_memory_saves_the_state_and_names_the_key(folder, whole, monkeypatch):
    with monkeypatch.context() as patch:
        OutOfMemory(patch, 1)
        with pytest.raises(UserError) as stopped:
            train(folder, "later", recompute=1, dataloader_num_workers=0)
    assert str(stopped.value) == (
        "Out of memory in step 2, with 1 of 2 decoder layers recomputed: checkpoint-1 is saved. Set `recompute: 2`; "
        "the same command goes on from checkpoint-1."
    )
    found = train(folder, "later", recompute=2)
    assert all(torch.equal(tensor, whole[0][name]) for name, tensor in found.items())


EVALUATED = {"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 1, "recompute": 1}


@pytest.mark.parametrize(
    "keys, call, words",
    [
        pytest.param(
            {"recompute": "all"}, 0, "no step was made. Lower per_device_train_batch_size or anyres", marks=HEAVY
        ),
        ({"disable_gradient_checkpointing": True}, 0, "Leave `disable_gradient_checkpointing` and `recompute` out"),
        pytest.param(EVALUATED, 1, "during an evaluation: lower per_device_eval_batch_size; no checkp", marks=HEAVY),
    ],
)
def test_every_out_of_memory_has_its_remedy(folder, monkeypatch, keys, call, words):
    OutOfMemory(monkeypatch, call)
    with pytest.raises(UserError) as stopped:
        train(folder, "first", **keys)
    assert words in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.heavy
def test_processes_take_the_largest_need_and_go_back_together(folder):
    """Room for 0 and for 1 layer kept; the second process is out of memory at the first try: both recompute 2."""
    shared = {**TRAIN, "per_device_train_batch_size": 1, "ddp_timeout": 300}
    keys = [recipe(folder, {**shared, "output_dir": str(folder / n), "recompute": n}) for n in ("all", "auto")]
    printed = train_on_processes(folder, keys, 2, module="helpers.short_of_memory", LLAMAFACTORY_VERBOSITY="INFO")
    assert "does not fit with 1 of 2 layers recomputed; now 2 are" in printed
    assert "recompute: auto recomputes 2 of 2 decoder layers." in printed
    expected, found = adapter(folder / "all"), adapter(folder / "auto")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
