"""Trainings with a damaged image and with a cached reference: parts, groups, workers, resumed runs, refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from helpers.ranks import train, train_on_processes
from helpers.recipes import build_trainer, photo_rows, recipe, write_rows
from helpers.same_training import adapter, assert_same
from helpers.serving import png
from llava_orpo.data import images
from llava_orpo.errors import UserError
from llava_orpo.step.order import Drawn, PaddedRows
from llava_orpo.step.parts import filled_up
from llava_orpo.training import reference as reference_module
from llava_orpo.training import trainer as trainer_module
from llava_orpo.training import undamaged

KEYS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,linear_1",
    "freeze_multi_modal_projector": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "adam_epsilon": 1e-3,  # else Adam makes a step of the whole learning rate out of a gradient that is rounding
    "group_pairs_by_image": True,
    "per_device_train_batch_size": 6,
    "pref_loss": None,
}
LOSSES = {
    "orpo + image": {"preference_loss": "orpo", "image_preference": 0.7},
    "mdpo": {"preference_loss": "mdpo", "damaged_image": "crop"},
    "sft + hinge": {"preference_loss": "sft", "image_preference": 0.5, "image_preference_loss": "hinge"},
}


@pytest.fixture(scope="module", params=LOSSES)
def trainer(tmp_path_factory, request):
    """A trainer whose micro-batch is three images with two pairs each, the last of them of one colour."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = photo_rows(3, 2)
    for row in rows[4:]:
        row["image"] = {"bytes": png(images.grey_like(120, 90)), "path": None}
    write_rows(folder, rows)
    keys = {**LOSSES[request.param]}
    if keys.get("damaged_image") is None:
        keys["damaged_image"] = "masked"
    trainer = build_trainer(folder, {**KEYS, **keys, "output_dir": str(folder / "out")})
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:  # zero at the start: policy and reference would be the same
                torch.nn.init.normal_(parameter, std=0.05)
    return trainer


def batch(trainer, limit: int | None = None, **changes):
    collator = copy.copy(trainer.data_collator)
    collator.max_tokens = limit
    for name, value in changes.items():
        setattr(collator, name, value)
    return collator(PaddedRows(trainer.train_dataset).__getitems__([Drawn(i, 1) for i in range(6)]))


def trained(trainer, made):
    """(loss, logged terms, gradients) of one training step on `made`, as the training loop calls it."""
    trainer.model.zero_grad()
    trainer._sums.clear()
    trainer.current_gradient_accumulation_steps = 1
    trainer._pairs_in_step = made["weights"].sum()
    trainer._anomalies.begin_step()
    loss = trainer.training_step(trainer.model, made)
    logged: dict[str, float] = {}
    trainer._read_window(loss, None)
    trainer._sums["train"] = {}
    sums = trainer._read
    count = sums.pop("")
    logged = {key: value / count for key, value in sums.items()}
    trainer._read = {}
    return loss, logged, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal(one, other, tolerance=1e-6):
    assert other[0].item() == pytest.approx(one[0].item(), rel=tolerance)
    assert other[1] == pytest.approx(one[1], rel=tolerance, abs=2e-6)
    assert one[2].keys() == other[2].keys() and one[2]
    total = torch.stack([gradient.norm() for gradient in one[2].values()]).norm()
    for name, gradient in one[2].items():
        assert (other[2][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-6 * total, name


def test_parts_and_single_pairs_give_the_gradients_of_the_grouped_whole(trainer):
    whole = batch(trainer)
    packed = whole["packed"]
    assert packed.n_damaged == 4 and len(packed.layout.groups) == 5, "one for each of the two photographs"
    assert [index for index, _ in whole["undamaged"]] == [4, 5]
    expected = trained(trainer, whole)
    assert expected[1]["grounding/share"] == pytest.approx(4 / 6)
    longest = max(sum(group) for group in packed.layout.groups)
    for limit in (2 * longest + 1, 1):  # between the images, and between their pairs
        cut = batch(trainer, limit)
        assert len(cut["parts"]) >= 3 and sum(part["packed"].n_damaged for part in cut["parts"]) == 4
        assert_equal(expected, trained(trainer, cut))
        assert_equal(expected, trained(trainer, filled_up(cut, len(cut["parts"]) + 2)))
    single = batch(trainer, group_by_image=False)
    assert len(single["packed"].layout.groups) == 6 + 4
    assert_equal(expected, trained(trainer, single))


def test_the_image_term_is_in_the_loss_and_counts_the_pairs_that_have_it(trainer):
    """Against the terms that the trainer's own forward gives for each pair, with the image term left out and put in."""
    made = batch(trainer)
    with torch.no_grad():
        terms, output = trainer.pair_losses(trainer.model, made)
    has = terms["has_damaged"]
    assert has.tolist() == [1, 1, 1, 1, 0, 0]
    margin = output["chosen_mean"] - output["damaged_mean"]
    assert margin[:4].abs().min() > 0 and margin[4:].tolist() == [0, 0]
    logged = trained(trainer, made)[1]
    assert logged["grounding/margin"] == pytest.approx((margin.sum() / 6).item(), rel=1e-4, abs=1e-6)
    logs = {"loss": 0.0}
    trainer._read = {key: value * 6 for key, value in logged.items()} | {"": 6.0}
    trainer.log(logs)
    assert logs["grounding/margin"] == pytest.approx(margin[:4].mean().item(), rel=1e-4, abs=1e-6)
    assert logs["grounding/accuracy"] == pytest.approx((margin[:4] > 0).float().mean().item())
    assert logs["image_loss"] == pytest.approx(terms["image_loss"][:4].mean().item(), rel=1e-4)


def test_what_has_no_image_term_is_said_once_and_counted(trainer, monkeypatch):
    said = []
    monkeypatch.setattr(undamaged.logger, "warning", said.append)
    monkeypatch.setattr(undamaged.logger, "warning_rank0", said.append)
    monkeypatch.setattr(trainer, "undamaged", undamaged.Undamaged())
    for _ in range(2):
        trained(trainer, batch(trainer))
    assert len(said) == 1 and "has no image term, as all such pairs: the damaged image equals the true one" in said[0]
    assert trainer.undamaged.summarize(1) == {"the damaged image equals the true one": 2}
    assert said[1:] == ["Without an image term: 2 pairs, because the damaged image equals the true one."]


def test_an_evaluation_scores_as_ever(trainer, tmp_path, monkeypatch):
    ran, forward = [], trainer.concatenated_forward

    def seen(model, part, is_ref_model=False):
        ran.append((part["packed"].n_damaged, part["packed"].n_rejected == part["packed"].n_pairs))
        return forward(model, part, is_ref_model)

    monkeypatch.setattr(trainer, "concatenated_forward", seen)
    scored, unusable = trainer._score(trainer.train_dataset, "true")
    assert len(scored) == 6 and not unusable and set(ran) == {(0, True)}


# whole trainings -------------------------------------------------------------------------------------------------


def logged(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_rows(folder, photo_rows(4, 2))
    return folder


def run(folder, name, **keys):
    train(recipe(folder, {**KEYS, "per_device_train_batch_size": 4, **keys, "output_dir": str(folder / name)}))
    return folder / name


def assert_same_adapters(one, other, tolerance=1e-5):
    left, right = adapter(one), adapter(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=tolerance, atol=tolerance * tensor.abs().max().item())


def test_a_cached_reference_is_the_adapter_turned_off(photos, monkeypatch):
    """The same trainings; what was computed is used again, and what is missing is computed."""
    more = {"preference_loss": "mdpo", "damaged_image": "grey", "max_steps": 3}
    off = run(photos, "off", **more, reference="adapter_off")
    forwards = []
    whole = trainer_module.SharedPrefixTrainer.reference_forward

    def counted(self, model, made):
        if "reference" not in made:
            forwards.append(made["packed"].n_pairs)
        return whole(self, model, made)

    monkeypatch.setattr(trainer_module.SharedPrefixTrainer, "reference_forward", counted)
    cached = run(photos, "cached", **more, reference="cached")
    assert sum(forwards) == 8 * 2, "each pair once under each image, and never while training"
    assert_same_adapters(off, cached)
    for one, other in zip(logged(off)[:3], logged(cached)[:3], strict=True):
        for key in ("loss", "image_loss", "rewards/margins", "grounding/margin"):
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key

    file = cached / reference_module.FILE.format(0)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 8
    file.write_text("".join(lines[:6]) + lines[6][:9])  # five records, and one that was cut off
    forwards.clear()
    run(photos, "cached", **more, reference="cached", overwrite_output_dir=True)
    assert sum(forwards) == 3 and sorted(file.read_text().splitlines()) == sorted(map(str.strip, lines))
    assert_same_adapters(off, cached)
    forwards.clear()
    run(photos, "cached", **more, reference="cached", overwrite_output_dir=True, cutoff_len=1000)
    assert sum(forwards) == 8 * 2, "other keys than those it was computed under"


def test_workers_and_a_resumed_run_damage_alike(photos):
    more = {"preference_loss": "orpo", "image_preference": 1.0, "damaged_image": "noise", "num_train_epochs": 2}
    plain = run(photos, "plain", **more, save_strategy="steps", save_steps=3)
    workers = run(photos, "workers", **more, dataloader_num_workers=2)
    assert_same(plain, workers, tolerance=0)
    margins = [entry["grounding/margin"] for entry in logged(plain) if "grounding/margin" in entry]
    assert len(margins) == 4
    resumed = run(photos, "resumed", **more, resume_from_checkpoint=str(plain / "checkpoint-3"))
    assert_same(plain, resumed, tolerance=0)
    assert [e["grounding/margin"] for e in logged(resumed) if "grounding/margin" in e] == margins


@pytest.mark.parametrize(
    "keys, sentence",
    [
        ({"preference_loss": "simpo", "pref_loss": "orpo"}, "contradicts pref_loss: orpo"),
        ({"preference_loss": "mdpo", "reference": "cached"}, "does not go with damaged_image: masked"),
        (
            {"image_preference": 0.5, "pref_loss": "sigmoid", "ld_alpha": 0.5},
            "needs the shared-prefix step.*: ld_alpha",
        ),
        ({"preference_loss": "sft", "max_tokens_per_step": 40}, r"max_tokens_per_step: 40 is less than the \d+ tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(photos, keys, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        build_trainer(photos, {**KEYS, **keys})
    assert len(refused.value.args) == 1 and "\n" not in str(refused.value)


def test_an_image_term_without_images_is_refused(tmp_path):
    rows = photo_rows(2, 1)
    for row in rows:
        row["image"] = None
    write_rows(tmp_path, rows)
    with pytest.raises(UserError, match="preference_loss: mdpo compares images, and no row of the training set has"):
        build_trainer(tmp_path, {**KEYS, "preference_loss": "mdpo", "allow_text_only": True})
    write_rows(tmp_path, photo_rows(1, 2))
    with pytest.raises(UserError, match="damaged_image: other needs two images or more"):
        build_trainer(tmp_path, {**KEYS, "image_preference": 0.5, "pref_loss": "orpo", "damaged_image": "other"})


def test_flags_choose_a_loss_as_recipes_do(photos):
    from llamafactory.hparams import get_train_args

    from llava_orpo.integration.run import current

    keys = {**recipe(photos, KEYS), "preference_loss": "sft", "image_preference": 0.5}
    words = [f"--{key}={value}" for key, value in keys.items() if value is not None and key != "pref_loss"]
    *_, finetuning, _ = get_train_args(words)
    assert finetuning.pref_loss == "simpo" and current().arguments.preference_loss == "sft"
    assert not finetuning.use_ref_model
    with pytest.raises(UserError, match="contradicts pref_loss: orpo"):
        get_train_args([*words, "--pref_loss", "orpo"])


@pytest.mark.heavy
def test_two_processes_train_as_one(tmp_path):
    """With a damaged image for each image of an uneven set, and with the reference shared out between them."""
    write_rows(tmp_path, photo_rows(5, 1))
    keys = {**KEYS, "group_pairs_by_image": False, "num_train_epochs": 1, "ddp_timeout": 300}
    cases = {
        "orpo": {"pref_loss": "orpo", "image_preference": 1.0},
        "mdpo": {"preference_loss": "mdpo", "damaged_image": "grey", "reference": "cached"},
        "sft": {"preference_loss": "sft", "max_tokens_per_step": 120},
    }
    sizes = {"one": 4, "two": 2}
    recipes = {
        (name, count): recipe(
            tmp_path,
            {**keys, **more, "per_device_train_batch_size": size, "output_dir": str(tmp_path / name / count)},
        )
        for name, more in cases.items()
        for count, size in sizes.items()
    }
    train_on_processes(tmp_path, [made for (_, count), made in recipes.items() if count == "one"], 1)
    train_on_processes(tmp_path, [made for (_, count), made in recipes.items() if count == "two"], 2)
    for name in cases:
        one, two = (tmp_path / name / count for count in sizes)
        assert_same_adapters(one, two, 1e-4)
        for a, b in zip(logged(one), logged(two), strict=True):
            for key in ("loss", "logps/chosen", "grounding/margin", "grounding/share", "image_loss"):
                assert b.get(key) == pytest.approx(a.get(key), rel=1e-4, abs=1e-4), (name, key)
    shares = [
        len((tmp_path / "mdpo" / "two" / reference_module.FILE.format(rank)).read_text().splitlines()) - 1
        for rank in (0, 1)
    ]
    assert sorted(shares) in ([2, 3], [3, 3]), "each process has computed its share"
