"""The plan's arithmetic around the trace, the shipped shapes, and the lines of check."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers.paths import ROOT
from llava_orpo import precheck
from llava_orpo.errors import UserError
from llava_orpo.plan import check, recomputed, report, sizes
from llava_orpo.plan.gpus import GPUS, named
from llava_orpo.plan.trace import PairSize, Setting, Traced
from llava_orpo.step.packing import TokenPair, pack

ENGINES = ROOT / "recipes" / "engines"
PAIR = PairSize(10, 5, 640, 480, 3, 4, 6, 5)
PUBLISHED = {"model_name_or_path": sizes.PUBLISHED}


def test_gpus_by_name():
    assert [gpu.name for gpu in named("rtx4090,h100")] == ["RTX 4090", "H100 SXM"]
    with pytest.raises(UserError, match="did you mean rtx4090"):
        named("rtx4080")
    assert all(gpu.memory > 2e10 and gpu.rate > 5e13 and gpu.source for gpu in GPUS.values())


def test_the_published_shapes_are_shipped():
    config, source = sizes.load_config(PUBLISHED)
    text = config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (4096, 32, 32064)
    assert config.image_token_id == 32000 and config.vision_feature_layer == -2
    assert "package ships" in source or "config.json" in source
    assert sizes.largest(PAIR, config).image == 2928
    assert sizes.assumed(config).sizes[0].image == 2340


def test_a_group_counts_what_pack_packs():
    group = [PAIR, replace(PAIR, question=7, chosen=2)]
    pairs = [
        TokenPair([1] * s.head + [3] * s.image + [10 + i] * s.question, [7] * s.chosen, [8] * s.rejected)
        for i, s in enumerate(group)
    ]
    assert sizes.group_tokens(group) == pack([pairs], 3).num_tokens
    assert sizes.group_tokens([PAIR]) == PAIR.tokens == pack([pairs[:1]], 3).num_tokens


def test_a_damaged_image_and_a_missing_answer_are_counted_as_packed():
    """Under orpo with an image term, and under sft with and without one."""
    text = replace(PAIR, image=0, tiles=0)
    for recipe, damaged, rejected in (
        ({"image_preference": 0.5}, True, True),
        ({"preference_loss": "mdpo"}, True, True),
        ({"preference_loss": "sft"}, False, False),
        ({"preference_loss": "sft", "image_preference": 1.0}, True, False),
    ):
        data = sizes.as_run(
            sizes.Data([PAIR, replace(PAIR, question=7, chosen=2), text], ["a", "a", ""], 3, ""), recipe
        )
        assert sizes.as_run(data, recipe) == data and [size.damaged for size in data.sizes] == [damaged, damaged, False]
        pairs = [
            TokenPair(
                [1] * s.head + [3] * s.image + [10 + i] * s.question,
                [7] * s.chosen,
                [8] * s.rejected if rejected else None,
            )
            for i, s in enumerate(data.sizes)
        ]
        made = pack([pairs[:2]], 3, [(0, [0, 1])] if damaged else ())
        assert sizes.group_tokens(data.sizes[:2]) == made.num_tokens
        alone = [pack([[pair]], 3, [(0, [0])] if s.damaged else ()) for pair, s in zip(pairs, data.sizes, strict=True)]
        for size, packed in zip(data.sizes, alone, strict=True):
            assert sizes.group_tokens([size]) == size.tokens == packed.num_tokens


def test_pairs_per_image_and_groups():
    data = sizes.Data([PAIR] * 5, ["a", "b", "a", "a", ""], 5, "here")
    assert data.pairs_per_image() == {1: 1, 3: 1}
    assert sorted(len(g) for batch in data.groups(2, 2) for g in batch) == [1, 1, 1, 2]
    assert [len(g) for batch in data.groups(2, None) for g in batch] == [1] * 5


def test_what_engines_divide():
    traced = Traced(1, 1, 800, 100, 100, 200, 1250, 1300, 2000, 10, 0, 25)
    found = report.engines(traced, 4, quantized=False)
    assert found["one GPU"] == 2000 + report.RESERVE
    assert found["DDP"] - found["one GPU"] == 100
    assert found["one GPU"] - found["ZeRO-2"] == pytest.approx(0.75 * 300)
    assert found["ZeRO-2"] - found["ZeRO-3 / FSDP"] == pytest.approx(0.75 * 900 - 20)
    assert report.engines(traced, 4, quantized=True)["ZeRO-3 / FSDP"] is None


def traced(frozen=800, peak=2000, flops=0, **more) -> Traced:
    return Traced(1, 1, frozen, 100, 100, 200, 1250, 1300, peak, 10, flops, 25)


@pytest.mark.parametrize(
    "limit, count",
    [(3000, 0), (2999, 1), (2401, 6), (2400, 6), (2399, 7), (2100, 9), (2050, 14), (2000, 19), (1869, None)],
)
def test_the_fewest_recomputed_layers_that_fit(monkeypatch, limit, count):
    """Peaks that fall by 100 a layer, and from nine layers on by 10."""
    asked = []

    def trace(config, setting, groups):
        assert setting.checkpointing
        asked.append(setting.recompute)
        return traced(peak=max(3000 - 100 * setting.recompute, 2190 - 10 * setting.recompute))

    monkeypatch.setattr(recomputed, "trace", trace)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=32))
    found = recomputed.Recomputed(config, Setting(checkpointing=False), [], lambda t: t.peak)
    assert found.fewest(limit) == count
    assert len(asked) == len(set(asked)) <= (3 if limit >= 2100 else 4 if count is None else 9)


@pytest.fixture
def traces(monkeypatch):
    """Traces whose peak is 60 GB and 160 FLOPs without recomputation, and 1.5 GB less and 5 more for each layer."""
    seen = []

    def trace(config, setting, groups):
        seen.append(setting)
        count = 0 if not setting.checkpointing else 32 if setting.recompute is None else setting.recompute
        frozen = 4e9 if setting.quantized else 20e9
        return traced(frozen, peak=frozen + 56e9 - 1.5e9 * count, flops=160 + 5 * count)

    monkeypatch.setattr(report, "trace", trace)
    monkeypatch.setattr(recomputed, "trace", trace)
    return seen


def planned(keys, cards="rtx4090,a100-40,a100-80", ranks=1):
    config, source = sizes.load_config(PUBLISHED)
    recipe = {**PUBLISHED, "quantization_bit": 4, "bf16": True, "num_train_epochs": 1.0, **keys}
    data = sizes.assumed(config)
    return report.plan(recipe, config, (source, data.source), data, named(cards), ranks=ranks)


def test_every_card_gets_its_own_number_of_recomputed_layers(traces):
    found = planned({})
    cards = found["gpus"]
    # 24.06 and 42.95 GB hold 61.5 GB less 1.5 for each layer with 26 and 13 of them recomputed
    assert {name: card["recompute"] for name, card in cards.items()} == {
        "RTX 4090": 24,
        "A100 40 GB": 13,
        "A100 80 GB": 0,
    }
    assert [card["tflop_per_pair"] * 1e12 for card in cards.values()] == [280, 225, 160]
    assert all(card["peak_bytes"] <= card["memory"] and card["one GPU"] for card in cards.values())
    assert cards["A100 40 GB"]["hours"] / cards["A100 80 GB"]["hours"] == pytest.approx(225 / 160)
    assert "24 of 32" in report.show(found) and "0 of 32" in report.show(found)
    fixed = planned({"recompute": 20})["gpus"]
    assert {card["recompute"] for card in fixed.values()} == {20}
    assert [card["one GPU"] for card in fixed.values()] == [False, True, True]
    none = planned({"recompute": "none"})["gpus"]
    assert {(card["recompute"], card["one GPU"]) for card in none.values()} == {(0, False), (0, True)}


@pytest.mark.parametrize(
    ("keys", "engine"),
    [
        ({}, "DDP"),
        ({"deepspeed": str(ENGINES / "zero2.json")}, "ZeRO-2"),
        ({"deepspeed": str(ENGINES / "zero3.json")}, "ZeRO-3 / FSDP"),
        ({"fsdp": "full_shard auto_wrap"}, "ZeRO-3 / FSDP"),
        ({"deepspeed": "missing.json"}, "DDP"),
    ],
)
def test_layers_and_remedies_are_those_of_the_recipes_own_engine(traces, keys, engine):
    found = planned({"quantization_bit": None, **keys}, "a100-40", ranks=8)
    (card,) = found["gpus"].values()
    assert found["engine"] == engine and card["peak_bytes"] <= card["memory"]
    # 77.5 GB less 1.5 for each layer in 42.95; ZeRO-3 holds an eighth of 20 GB of weights
    assert card["recompute"] == (12 if engine == "ZeRO-3 / FSDP" else 24)
    assert f"GB then, {engine}" in report.show(found)
    assert planned(keys, "a100-40")["engine"] == "one GPU"


def test_only_remedies_that_help_are_offered(traces):
    none = planned({"recompute": "none"}, "rtx4090")
    assert none["remedies"]["RTX 4090"]["keys"] == {"recompute": "auto"}
    traces.clear()
    full = planned({"finetuning_type": "full", "quantization_bit": None, "pref_loss": "orpo"}, "l4")
    assert not any(setting.quantized for setting in traces), "4-bit weights cannot be trained in full"
    assert "quantization_bit" not in str(full["remedies"])
    lora = planned({"quantization_bit": None}, "l4")
    assert lora["remedies"]["L4"]["keys"] == {"per_device_train_batch_size": 1, "quantization_bit": 4}


def test_the_longest_batch_of_a_shuffled_epoch():
    long = replace(PAIR, chosen=100)
    data = sizes.Data([PAIR, long, PAIR, long, PAIR], ["a", "a", "b", "c", "c"], 5, "here")
    assert sorted(data.longest(2, None)) == [[1], [3]]
    assert data.longest(1, 4) in ([[1]], [[3]])
    assert data.longest(3, 2)[0] in ([0, 1], [3, 4]) and sum(map(len, data.longest(3, 2))) == 3
    assert sum(map(len, data.longest(9, 2))) == 5


def test_what_is_not_planned_is_refused_by_name():
    with pytest.raises(UserError, match="finetuning_type: freeze"):
        Setting.of({"finetuning_type": "freeze"}, "cuda")
    with pytest.raises(UserError, match="quantization_bit: 8"):
        Setting.of({"quantization_bit": 8}, "cuda")


def test_wandb_login(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check.wandb_login({"report_to": "wandb"}).state == check.WARNING
    assert check.wandb_login({"report_to": "none"}).state == check.OK
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check.wandb_login({"report_to": "wandb"}).state == check.OK


def test_check_goes_on_after_an_error_and_says_what_to_do():
    found = list(check.lines({**PUBLISHED, "template": "llava_v16_mistral", "lora_rnak": 4}))
    assert found[0].state == check.ERROR and "lora_rank" in found[0].found
    assert {line.what for line in found} >= {"versions", "W&B login"}
    assert all(line.remedy for line in found if line.state != check.OK)


def test_a_full_disk_is_found_before_training(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    (problem,) = precheck.problems({"model_name_or_path": "a/b", "do_train": True, "output_dir": str(tmp_path / "new")})
    assert "output_dir" in problem and "free" in problem
