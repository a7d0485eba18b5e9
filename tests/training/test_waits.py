"""The host waits for the device once per optimizer step and once per log, whatever the number of micro-batches."""

from __future__ import annotations

import pytest
from llamafactory.hparams import get_train_args

from helpers.recipes import build_trainer, photo_rows, recipe, write_rows
from llava_orpo.gpu.host_waits import Waits
from llava_orpo.integration.run import current
from llava_orpo.training import trainer as trainer_module
from llava_orpo.training import workflow

STEPS, LOGS = 4, 2
KEYS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,linear_1",
    "freeze_multi_modal_projector": False,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "logging_steps": STEPS // LOGS,
    "disable_gradient_checkpointing": False,
    "save_strategy": "no",
    "image_check": False,  # it waits before the first step, once per training
}
CASES = {
    "bf16": {"bf16": True},
    "4 bit, grouped, with a reference model": {
        "quantization_bit": 4,
        "group_pairs_by_image": True,
        "per_device_train_batch_size": 2,
        "pref_loss": "sigmoid",
        "optim": "adamw_torch",
    },
    "damaged image and cached reference": {
        "pref_loss": None,
        "preference_loss": "mdpo",
        "damaged_image": "grey",
        "reference": "cached",
    },
}
OURS = {
    "training/trainer.py _get_grad_norm": STEPS,  # whether a loss or the gradient is not finite, of all processes
    "training/trainer.py _read_window": LOGS,  # loss, gradient norm and all terms at once
}
# At most so many: each is once per training or epoch, or a tensor that lives on the host.
OTHERS = {
    "transformers/trainer.py _inner_training_loop": 1,  # the sum of losses is made
    "transformers/trainer.py _finalize_training": 1,  # and read
    "torch/utils/data/dataloader.py __init__": 3,  # the seed of an iterator, of an epoch's and of the reference's two
    "preference/scoring.py <dictcomp>": 4,  # the reference of each pair under two images, before the first step
    "step/order.py pairs": 2,  # the order of an epoch, with image groups twice
    "torch/optim/optimizer.py _get_value": STEPS * 6,  # AdamW's number of steps for each of the six LoRA matrices
}


def counted(folder, keys) -> dict[str, int]:
    """{place: waits} of a training; the collator is left out, which runs in the workers of the dataloader."""
    trainer = build_trainer(folder, {**KEYS, **keys})
    waits, collate = Waits(), trainer.data_collator

    def collator(rows):
        with waits.paused():
            return collate(rows)

    collator.max_tokens = collate.max_tokens
    trainer.data_collator = collator
    with waits.counting():
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert len([entry for entry in trainer.state.log_history if "logps/chosen" in entry]) == LOGS
    return waits.places()


def test_copies_to_the_device_do_not_wait_where_memory_is_pinned(tmp_path):
    write_rows(tmp_path, photo_rows(1, 1))
    *arguments, _ = get_train_args(recipe(tmp_path, KEYS))
    arguments[2].dataloader_pin_memory = True  # transformers pins none for a CPU
    trainer = workflow.build(current(), *arguments)
    assert trainer.get_train_dataloader()._non_blocking


@pytest.mark.parametrize("case", CASES)
def test_one_wait_per_step_and_one_per_log(tmp_path, case):
    write_rows(tmp_path, photo_rows(8, 2 if "grouped" in case else 1))
    found = counted(tmp_path, CASES[case])
    assert {place: count for place, count in found.items() if place not in OTHERS} == OURS
    assert all(count <= OTHERS[place] for place, count in found.items() if place in OTHERS), found


def test_a_planted_wait_is_found(tmp_path, monkeypatch):
    write_rows(tmp_path, photo_rows(8, 1))
    scored = trainer_module.packed_logps

    def reads_lengths(*args, **kwargs):
        out = scored(*args, **kwargs)
        out.lengths.tolist()
        return out

    monkeypatch.setattr(trainer_module, "packed_logps", reads_lengths)
    found = counted(tmp_path, {})
    planted = found.pop("training/test_waits.py reads_lengths")
    assert planted == STEPS * KEYS["gradient_accumulation_steps"]
    assert {place: count for place, count in found.items() if place not in OTHERS} == OURS
