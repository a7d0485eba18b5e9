"""The plan's trace against real steps: peak memory as torch's profiler sees the allocator, FLOPs by torch's counter."""

from __future__ import annotations

import dataclasses
import itertools
import os

import measure
import pytest
import torch

from helpers.recipes import build_trainer, photo_rows, random_model, recipe, write_rows
from llava_orpo import loss_keys
from llava_orpo.plan.trace import PairSize, Setting, trace
from llava_orpo.step.batches import image_runs
from llava_orpo.step.order import Drawn, PaddedRows

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
    "gradient_accumulation_steps": 2,
}
CASES = {
    "small56": (4, {"group_pairs_by_image": True}),
    "small56_partly": (4, {"group_pairs_by_image": True, "disable_gradient_checkpointing": False, "recompute": 1}),
    "small56_damaged": (4, {"group_pairs_by_image": True, "pref_loss": None, "preference_loss": "mdpo"}),
    "tiny": (1, {"disable_gradient_checkpointing": False}),
    "tiny_bf16": (1, {"disable_gradient_checkpointing": False, "bf16": True}),
    "tiny_4bit": (1, {"quantization_bit": 4, "double_quantization": True}),
    "mid": (1, {"disable_gradient_checkpointing": False}),
}

LONG = ("mid", "tiny_bf16")  # half a minute each
SHORT_AND_LONG = [pytest.param(name, marks=pytest.mark.heavy if name in LONG else ()) for name in CASES]


def sizes_of(trainer, rows) -> list[list[PairSize]]:
    """The groups of a batch, as the plan sees them."""
    geometry = trainer.data_collator.processor.image_processor
    grouped = trainer.plugin.group_pairs_by_image
    head = len(os.path.commonprefix([row["prompt_ids"] for row in rows])) if len(rows) > 1 else 6
    keys = [row["image_hash"] if grouped else "" for row in rows]
    pixels = geometry([torch.zeros(3, rows[0]["height"], rows[0]["width"])], return_tensors="pt")["pixel_values"]
    return [
        [
            PairSize(
                row["num_image_tokens"],
                pixels.shape[1],
                row["width"],
                row["height"],
                head - 1,
                len(row["prompt_ids"]) - head,
                len(row["chosen_ids"]),
                len(row["rejected_ids"]),
                loss_keys.runs_damaged(vars(trainer.plugin)),
            )
            for row in (rows[i] for i in run)
        ]
        for run in image_runs(keys, range(len(rows)), 4)
    ]


def allocated(step) -> int:
    """The most bytes that a step held at once beyond what was there before, by the allocator's own records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("name", SHORT_AND_LONG)
def test_plan_against_a_real_step(tmp_path, name):
    size, more = CASES[name]
    keys = {**LORA, **more, "model_name_or_path": str(random_model(name.split("_")[0]))}
    keys["per_device_train_batch_size"] = size
    write_rows(tmp_path, photo_rows(1, size))
    trainer = build_trainer(tmp_path, keys)
    trainer.model = trainer.accelerator.prepare_model(trainer.model.train())
    rows = PaddedRows(trainer.train_dataset).__getitems__([Drawn(i) for i in range(size)])
    batch = trainer._prepare_inputs(trainer.data_collator(rows))

    def step():
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        trainer.accelerator.backward(loss)

    step()  # the gradients of an earlier micro-batch are there
    real = allocated(step)
    flops = measure.count_flops(step)["total"]
    setting = Setting.of(recipe(tmp_path, keys), "cpu", trainer.model.config)
    planned = trace(trainer.model.config, setting, sizes_of(trainer, rows))
    print(f"{name}: memory {(planned.peak - planned.start) / real:.4f}, FLOPs {planned.flops / flops:.5f}", real)
    assert planned.peak - planned.start == pytest.approx(real, rel=0.1)
    if "4bit" not in name:  # torch's counter does not know bitsandbytes' product
        assert planned.flops == pytest.approx(flops, rel=1e-3)
    assert planned.tokens == batch["packed"].num_tokens
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in trainer.model.parameters()}
    assert planned.frozen + planned.trainable == pytest.approx(sum(held.values()), rel=0.05)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert planned.gradients == sum(p.grad.nbytes for p in trainable)
    assert planned.trainable_parameters == sum(p.numel() for p in trainable)


def test_a_setting_is_a_plain_value():
    assert dataclasses.replace(Setting(), target="cpu") == Setting(target="cpu")
