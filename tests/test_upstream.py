"""Each work-around for other packages' internals: what fails without it, and that it helps."""

from __future__ import annotations

import io
import json
import logging
from types import SimpleNamespace

import accelerate.utils
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import StateDictType, fully_shard
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, Trainer
from transformers.integrations import HfDeepSpeedConfig, deepspeed

from helpers.llava import tiny_llava
from helpers.recipes import random_model
from llava_orpo import upstream
from llava_orpo.checkpoint.published import expected_tensors
from llava_orpo.gpu.host_waits import Waits


def test_the_installed_versions_are_those_it_was_written_for(monkeypatch):
    assert upstream.other_versions() == ""
    monkeypatch.setitem(upstream.WRITTEN_FOR, "peft", "0.0.1")
    assert "(written for 0.0.1)" in upstream.other_versions()


def test_a_folder_is_checked_while_zero3_is_on():
    config = json.loads((random_model() / "config.json").read_text())
    expected = expected_tensors(config)
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with pytest.raises(Exception), torch.device("meta"):  # noqa: B017 - of what kind depends on DeepSpeed's set-up
            LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(config))
        assert expected_tensors(config) == expected
        assert deepspeed.is_deepspeed_zero3_enabled(), "it is on again afterwards"
        with upstream.without_zero_init():
            assert not deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
        del alive


def test_the_default_wrap_policy_finds_its_layers():
    model = get_peft_model(tiny_llava(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(Exception, match="Could not find the transformer layer class"):
        fsdp_auto_wrap_policy(model)
    upstream.keep_present_layer_names(model)
    assert callable(fsdp_auto_wrap_policy(model))
    inner = model.get_base_model()
    assert inner._no_split_modules == {"CLIPEncoderLayer", type(inner.get_decoder().layers[0]).__name__}


def test_a_frozen_tower_is_kept_out_of_autograd():
    model = tiny_llava().requires_grad_(False)
    model.gradient_checkpointing_enable()
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).get_base_model()
    tower = model.model.vision_tower

    def needs_gradients():
        return tower(torch.zeros(1, 3, 28, 28), output_hidden_states=True).hidden_states[0].requires_grad

    lora = next(name for name, p in tower.named_parameters() if p.requires_grad)
    assert upstream.keep_frozen_tower_out_of_autograd(tower) == 0, f"it is trained: {lora}"
    tower.requires_grad_(False)
    assert needs_gradients(), "transformers does not hook it any more: take the work-around out"
    assert upstream.keep_frozen_tower_out_of_autograd(tower) >= 1
    assert not needs_gradients()
    assert model.get_input_embeddings()(torch.tensor([5])).requires_grad, "the language model's hook stays"


def test_trainer_reads_the_loss_from_the_host():
    trainer = object.__new__(Trainer)
    trainer.args = SimpleNamespace(parallel_mode=None)
    trainer.control = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False)
    trainer.state = SimpleNamespace(global_step=6)
    trainer._globalstep_last_logged, trainer._total_loss_scalar = 4, 1.0
    trainer.store_flos = lambda: None
    logged = []
    trainer.log = lambda logs, start: logged.append(logs)

    def log(loss, norm):
        trainer._globalstep_last_logged = 4
        with Waits().counting() as waits:
            trainer._maybe_log_save_evaluate(loss, norm, None, None, 0, None, 0.0, learning_rate=0.5)
        return sum(waits.places().values())

    assert upstream.logs_now(trainer)
    loss, norm = torch.tensor(3.0), torch.tensor(0.25)
    mean = upstream.mean_loss(loss, trainer.args)
    assert mean == 3.0 and log(loss, norm) == 2, "transformers waits once itself now: take the work-around out"
    assert not upstream.logs_now(trainer)
    with upstream.loss_on_host():
        assert log(upstream.LossOnHost(3.0), 0.25) == 0
        assert log(torch.tensor(3.0), 0.25) == 1, "tensors are gathered as ever"
    assert logged == [{"loss": 1.5, "grad_norm": 0.25, "learning_rate": 0.5}] * 3
    assert trainer._total_loss_scalar == 10.0


def test_single_layers_are_recomputed():
    layers = tiny_llava().get_decoder().layers
    with pytest.raises(ValueError, match="no checkpointing function"):
        upstream.recompute_first(layers, 1)
    upstream.recompute_first(layers, 0)
    model = tiny_llava()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    decoder, runs = model.get_decoder().train(), [0, 0, 0]
    for number, layer in enumerate(decoder.layers):

        def count(*_, number=number):
            runs[number] += 1

        layer.mlp.register_forward_pre_hook(count)  # the second run may stop within the layer
    for wanted in (3, 2, 0):
        upstream.recompute_first(decoder.layers, wanted)
        assert upstream.recomputed(decoder.layers) == wanted
        runs[:] = [0, 0, 0]
        decoder(torch.ones(1, 4, dtype=torch.int64)).last_hidden_state.sum().backward()
        assert runs == [2] * wanted + [1] * (3 - wanted)
    with pytest.raises(ValueError, match="Linear is no GradientCheckpointingLayer"):
        upstream.recompute_first([torch.nn.Linear(1, 1)], 0)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_moments_of_fsdp2_are_loaded(tmp_path, one_process, monkeypatch):
    import transformers.trainer

    monkeypatch.setattr(accelerate.utils.fsdp_utils, "logger", logging.getLogger())  # its own needs accelerate's state

    def trained(steps: int):
        model = fully_shard(torch.nn.Linear(2, 2), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        return model, optimizer

    plugin = SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.SHARDED_STATE_DICT, state_dict_config=None)
    accelerator = SimpleNamespace(process_index=0, wait_for_everyone=lambda: None)
    model, optimizer = trained(2)
    accelerate.utils.save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(tmp_path))
    model, resumed = trained(0)
    accelerate.utils.load_fsdp_optimizer(plugin, accelerator, resumed, model, str(tmp_path))
    assert not resumed.state, "accelerate loads it itself now: take the work-around out"
    with upstream.fsdp_optimizer_loaded():
        transformers.trainer.load_fsdp_optimizer(plugin, accelerator, resumed, model, str(tmp_path))
    for left, right in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert right["step"] == 2 and torch.equal(left["exp_avg"].full_tensor(), right["exp_avg"].full_tensor())
        assert left["exp_avg"].full_tensor().abs().max() > 0


def test_a_sharded_model_is_saved(tmp_path):
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    trainer = object.__new__(Trainer)
    saved = []
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), get_state_dict=lambda model: "all")
    trainer.model, trainer.is_fsdp_enabled = None, True
    trainer.args = SimpleNamespace(should_save=True, push_to_hub=False, output_dir=str(tmp_path))
    trainer._save = lambda folder, state_dict: saved.append(state_dict)
    trainer.save_model()
    assert saved == [], "transformers saves it itself now: take the work-around out"
    with upstream.whole_weights(trainer.accelerator):
        trainer.save_model()
    assert saved == ["all"] and plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT


def test_an_optimizer_is_loaded_onto_a_numbered_cpu(monkeypatch):
    registry = [entry for entry in torch.serialization._package_registry if entry[2] is not upstream._same_storage]
    monkeypatch.setattr(torch.serialization, "_package_registry", registry)
    saved = io.BytesIO()
    torch.save({"step": torch.arange(3)}, saved)
    saved.seek(0)
    with pytest.raises(RuntimeError, match="don't know how to restore data location"):
        torch.load(saved, map_location=torch.device("cpu:0"), weights_only=True)
    upstream.load_onto_numbered_cpus()
    upstream.load_onto_numbered_cpus()  # twice is once
    assert sum(entry[2] is upstream._same_storage for entry in torch.serialization._package_registry) == 1
    saved.seek(0)
    loaded = torch.load(saved, map_location=torch.device("cpu:0"), weights_only=True)
    assert torch.equal(loaded["step"], torch.arange(3))
