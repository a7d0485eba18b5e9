"""training/image_check.py: a training whose images do not reach the model, or reach other pairs, does not begin."""

from __future__ import annotations

import io
import json
import re
from types import MethodType, SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers.paths import ROOT
from helpers.recipes import SMALL, build_trainer, photo_rows, random_model, write_rows
from helpers.same_training import adapter, torn
from llava_orpo.errors import UserError
from llava_orpo.step import collator as collator_module
from llava_orpo.tiny import random_model as random_llava
from llava_orpo.training import image_check
from llava_orpo.training.image_check import ImageCheck

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "max_steps": 1,
    "save_strategy": "no",
    "logging_steps": 1,
}
UNSEEN = r"^The image does not reach the model: grey images move .* by 0\.0e\+00 nats per token .*`image_check: false`"
SWAPPED = r"^Pair \S+ does not see its own image: .*`image_check: false`"
DEMO = ROOT / "outputs" / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-check")
    write_rows(folder, photo_rows(6, 1))
    return folder


@pytest.fixture(scope="module")
def trainer(folder):
    """Of two pairs in a batch, sound; no test lets it make a step."""
    return build_trainer(folder, {**LORA, "per_device_train_batch_size": 2})


def zero_pixels(monkeypatch, trainer):
    processor = trainer.data_collator.processor
    original = processor.image_processor

    def zeroed(*args, **keys):
        out = original(*args, **keys)
        return {**out, "pixel_values": torch.zeros_like(out["pixel_values"])}

    monkeypatch.setattr(processor, "image_processor", zeroed)


def skip_tower(monkeypatch, trainer):
    tower = trainer.model.base_model.model.model.vision_tower
    original = tower.forward

    def constant(self, pixel_values, *args, **keys):
        out = original(torch.zeros_like(pixel_values), *args, **keys)
        out.hidden_states = tuple(torch.ones_like(states) for states in out.hidden_states)
        return out

    monkeypatch.setattr(tower, "forward", MethodType(constant, tower))


def drop_image_tokens(monkeypatch, trainer):
    """The tokens and the pictures: what a text-only batch looks like."""
    monkeypatch.setattr(
        collator_module, "full_prompt_ids", lambda row, token: [i for i in row["prompt_ids"] if i != token]
    )
    make = trainer.data_collator._batch
    monkeypatch.setattr(trainer.data_collator, "_batch", lambda groups: {**make(groups), "image_inputs": {}})


def swap_images(monkeypatch, trainer):
    processor = trainer.data_collator.processor
    original = processor.image_processor
    swapped = lambda pictures, **keys: original(list(pictures)[::-1], **keys)  # noqa: E731
    monkeypatch.setattr(processor, "image_processor", swapped)


@pytest.mark.parametrize(
    "break_it, message",
    [(zero_pixels, UNSEEN), (skip_tower, UNSEEN), (drop_image_tokens, UNSEEN), (swap_images, SWAPPED)],
    ids=["zeroed", "no tower", "no tokens", "swapped"],
)
def test_a_broken_image_path_stops_the_training_before_its_first_step(trainer, monkeypatch, break_it, message):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    break_it(monkeypatch, trainer)
    with pytest.raises(UserError, match=message) as caught:
        trainer.train()
    assert "\n" not in str(caught.value) and trainer.state.global_step == 0
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)


def test_image_tokens_without_their_features_are_caught_by_the_step_itself(trainer, monkeypatch):
    monkeypatch.setattr(
        collator_module, "full_prompt_ids", lambda row, token: [i for i in row["prompt_ids"] if i != token]
    )
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        trainer.train()


def test_the_other_step_is_watched_too(folder):
    trainer = build_trainer(folder, {**LORA, "shared_prefix": False})
    assert any(isinstance(callback, ImageCheck) for callback in trainer.callback_handler.callbacks)
    assert ImageCheck(trainer)._complaint() == ""
    for break_it, message in ((zero_pixels, UNSEEN), (swap_images, SWAPPED)):
        with pytest.MonkeyPatch.context() as patch:
            break_it(patch, trainer)
            assert re.search(message, ImageCheck(trainer)._complaint())


def test_without_the_key_nothing_is_checked(folder):
    trainer = build_trainer(folder, {**LORA, "image_check": False})
    assert not any(isinstance(callback, ImageCheck) for callback in trainer.callback_handler.callbacks)


def test_the_check_changes_nothing_of_the_training(folder, monkeypatch):
    """With dropout, so that a random number more or less would show; and the check really runs."""
    ran = []
    look = ImageCheck._look
    monkeypatch.setattr(ImageCheck, "_look", lambda self, rows: ran.append(1) or look(self, rows))
    results = []
    for checked in (True, False):
        out = str(folder / f"same-{checked}")
        trainer = build_trainer(folder, {**LORA, "max_steps": 2, "image_check": checked, "output_dir": out})
        for module in trainer.model.modules():  # LLaMA-Factory's trainer has set every dropout to 0
            if isinstance(module, torch.nn.Dropout) or hasattr(module, "lora_dropout"):
                for name in getattr(module, "lora_dropout", {}):
                    module.lora_dropout[name] = torch.nn.Dropout(0.5)
        trainer.train()
        trainer.save_model()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((adapter(folder / f"same-{checked}"), logged))
    assert len(ran) == 1
    (left, losses), (right, others) = results
    assert losses == others and left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_modes_random_states_and_gradients_stay(trainer):
    trainer.model.train()
    trainer.model.base_model.model.model.vision_tower.eval()
    modes = [module.training for module in trainer.model.modules()]
    state = torch.random.get_rng_state()
    ImageCheck(trainer).on_train_begin(trainer.args, SimpleNamespace(global_step=0), trainer.control)
    assert [module.training for module in trainer.model.modules()] == modes and True in modes and False in modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_batch_looked_at_is_the_one_that_is_trained_first(trainer):
    first = next(iter(trainer.get_train_dataloader()))["rows"]
    looked = ImageCheck(trainer)._first_rows()
    assert [row["pair_id"] for row in looked] == [row["pair_id"] for row in first]
    assert [row["pair_id"] for row in first] != trainer.train_dataset[:2]["pair_id"]  # the order is shuffled


def one_colour(row: dict) -> dict:
    out = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 30)).save(out, "PNG")
    return {**row, "image": {"bytes": out.getvalue(), "path": None}}


def test_pairs_that_show_nothing_are_passed_over(tmp_path, monkeypatch):
    """The first batch holds text and one colour, the second text and an image that cannot be decoded."""
    rows = photo_rows(6, 1)
    rows[0]["image"] = rows[3]["image"] = None
    rows[1], rows[2] = one_colour(rows[1]), torn(rows[2])
    write_rows(tmp_path, rows)
    keys = {**LORA, "allow_text_only": True, "disable_shuffling": True, "per_device_train_batch_size": 2}
    check = ImageCheck(build_trainer(tmp_path, keys))
    assert [row["question"] for row in check._first_rows()] == [row["question"] for row in rows[4:6]]
    assert check._complaint() == ""
    with pytest.MonkeyPatch.context() as patch:
        zero_pixels(patch, check.trainer)
        assert re.search(UNSEEN, check._complaint())
    # with nothing but such pairs there is nothing to look at, and no forward
    monkeypatch.setattr(check, "_look", lambda rows: pytest.fail("there was nothing to look at"))
    check.trainer.train_dataset = check.trainer.train_dataset.select(range(4))
    assert check._complaint() == ""


def test_a_resumed_training_is_not_checked_again(trainer, monkeypatch):
    monkeypatch.setattr(ImageCheck, "_complaint", lambda self: "looked")
    check = ImageCheck(trainer)
    check.on_train_begin(trainer.args, SimpleNamespace(global_step=1), trainer.control)
    with pytest.raises(UserError, match="looked"):
        check.on_train_begin(trainer.args, SimpleNamespace(global_step=0), trainer.control)


def test_batches_in_parts_and_pairs_of_one_image_are_looked_at(tmp_path, monkeypatch):
    write_rows(tmp_path, photo_rows(3, 2))
    keys = {**LORA, "group_pairs_by_image": True, "per_device_train_batch_size": 6, "max_tokens_per_step": 300}
    check = ImageCheck(build_trainer(tmp_path, keys))
    assert "parts" in check.trainer.data_collator(check._first_rows())
    assert check._complaint() == ""
    swap_images(monkeypatch, check.trainer)
    check.trainer.data_collator.max_tokens = None
    assert re.search(SWAPPED, check._complaint())


# what is moved, on sound models and swapped ones ------------------------------------------------------------

DTYPES = {
    "fp32": {},
    "NF4": {"quantization_bit": 4},
    "bf16": {"bf16": True},
    "NF4, bf16": {"quantization_bit": 4, "bf16": True},
    "two sequences": {"shared_prefix": False},
}


def measured(trainer) -> tuple[float, float, str]:
    """(moved, farthest from a plain forward, complaint) of a trainer's first batch."""
    seen = []
    apart = image_check._apart
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_check, "_apart", lambda a, b: seen.append(apart(a, b)) or seen[-1])
        complaint = ImageCheck(trainer)._complaint()
    plain = min(image_check.PLAIN_PAIRS, len(seen) // 2)
    return max(seen[:-plain]), max(seen[-plain:]), complaint


def measure(folder, keys) -> tuple[float, float, float]:
    """(moved, apart, apart with the batch's images swapped); the first is sound, the second is stopped."""
    trainer = build_trainer(folder, keys)
    moved, apart, complaint = measured(trainer)
    assert complaint == ""
    with pytest.MonkeyPatch.context() as patch:
        swap_images(patch, trainer)
        _, swapped, complaint = measured(trainer)
    assert "does not see its own image" in complaint
    with pytest.MonkeyPatch.context() as patch:
        zero_pixels(patch, trainer)
        nothing, _, complaint = measured(trainer)
    assert nothing == 0.0 and "does not reach the model" in complaint
    return moved, apart, swapped


@pytest.mark.parametrize("seed, precision", [(10, "fp32"), (11, "NF4, bf16")])
def test_sound_random_models_pass_and_broken_ones_do_not(folder, tmp_path, seed, precision):
    model = random_llava.write(SMALL, tmp_path / "model", seed=seed)
    moved, apart, swapped = measure(folder, {**LORA, **DTYPES[precision], "model_name_or_path": str(model)})
    assert moved > 1e-2 and apart < (1e-6 if precision == "fp32" else 4e-3) and swapped > 2e-2


@pytest.mark.heavy
def test_what_is_moved(folder, tmp_path):
    """The numbers in the module's docstring; the demo's model is there after scripts/quickstart.sh."""
    info = json.loads((folder / "dataset_info.json").read_text())
    info["demo"] = {"file_name": str(DEMO / "data" / "demo_train.parquet"), "formatting": "rlaif_v", "ranking": True}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    models = {
        f"random {seed}": {"model_name_or_path": str(random_llava.write(SMALL, tmp_path / str(seed), seed))}
        for seed in range(4)
    }
    models["random, 336 pixels"] = {"model_name_or_path": str(random_model("tiny"))}
    if DEMO.exists():
        demo = {"dataset": "demo", "max_samples": 64, "per_device_train_batch_size": 16, "cutoff_len": 512}
        models["demo"] = {**demo, "model_name_or_path": str(DEMO / "model")}
        aligned = {"adapter_name_or_path": str(DEMO / "orpo_qlora"), "create_new_adapter": False}
        models["demo after ORPO"] = {**models["demo"], **aligned}
    found = {
        (name, precision): measure(folder, {**LORA, **model, **keys})
        for name, model in models.items()
        for precision, keys in DTYPES.items()
    }
    for (name, precision), (moved, apart, swapped) in found.items():
        print(f"{name:20} {precision:14} moved {moved:.1e}  apart {apart:.1e}  swapped {swapped:.1e}")
    for (_, precision), (moved, apart, swapped) in found.items():
        assert moved > 9e-2 and swapped > 5e-2 and swapped / moved > 0.3
        assert apart < (5e-3 if "bf16" in precision else 1e-6)
