"""The plan's arithmetic around the trace, the shipped shapes, and the lines of check."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from llava_orpo import precheck
from llava_orpo.errors import UserError
from llava_orpo.plan import check, report, sizes
from llava_orpo.plan.gpus import GPUS, named
from llava_orpo.plan.trace import PairSize, Setting, Traced
from llava_orpo.step.packing import TokenPair, pack

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
    pairs = [TokenPair([1] * s.head + [3] * s.image + [10 + i] * s.question, [7] * s.chosen, [8] * s.rejected)
             for i, s in enumerate(group)]  # fmt: skip
    assert sizes.group_tokens(group) == pack([pairs], 3).num_tokens
    assert sizes.group_tokens([PAIR]) == PAIR.tokens == pack([pairs[:1]], 3).num_tokens


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
