"""The benchmark scripts run, write what they promise, and their arithmetic is right. No timing is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import data_side
import eval_speed
import losses
import make_tables
import measure
import orpo_step
import peers
import pytest
import setting
import starts
import torch
import torch.nn.functional as F

from helpers.paths import ROOT
from llava_orpo.plan import report


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Runs a script with --smoke and returns its JSON; one folder for all, so that the page can be made of it."""
    out = tmp_path_factory.mktemp("results")

    def run(script: str, name: str, *options: str) -> dict:
        environment = {**os.environ, "LLAVA_ORPO_BENCH_DIR": str(ROOT / "outputs" / "test-cache" / "bench")}
        command = [sys.executable, str(ROOT / "benchmarks" / script), "--smoke", "--out", str(out), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "|" in done.stdout  # the table
        return json.loads((out / f"{name}.json").read_text())

    run.folder = out
    return run


def has(result: dict, *names: str) -> None:
    assert set(names) <= result.keys(), set(names) - result.keys()
    assert result["command"].startswith("python") and result["machine"]["cores"] >= 1


@pytest.mark.heavy
@pytest.mark.parametrize("pairs", [1, 4])
def test_step(smoke, pairs):
    result = smoke("orpo_step.py", f"step_smoke_{pairs}", "--pairs-per-image", str(pairs))
    has(result, "geometry", "pairs_per_image", "sides", "ratios", "gemm_flops_per_second")
    stock, ours = result["sides"]["stock"], result["sides"]["ours"]
    for side in (stock, ours):
        assert side["seconds_per_step"] > 0 and side["pairs_per_second"] > 0 and side["memory"]["peak"] > 0
        assert side["flops"]["total"] == sum(v for k, v in side["flops"].items() if k != "total")
        assert min(side["flops"].values()) > 0 and 0 < side["share_of_gemm_rate"]
    assert ours["loss"] == pytest.approx(stock["loss"], rel=1e-5)
    assert 0 < result["largest_relative_gradient_difference"] < 1e-4
    assert result["ratios"]["lm_tokens"] > 1.3
    assert result["ratios"]["flops_attention_and_head"] > 1.5
    assert 0.3 < sum(result["profile"].values()) <= 1


@pytest.mark.heavy
def test_step_with_checkpointing(smoke):
    result = smoke("orpo_step.py", "recompute_smoke_1", "--recompute")
    has(result, "geometry", "pairs_per_image", "sides", "ratios")
    sides = result["sides"]
    assert sides["stock"]["flops"] > sides["all"]["flops"] > sides["half"]["flops"] > sides["none"]["flops"]
    for side in orpo_step.RECOMPUTE[1:]:
        assert 0 < sides[side]["gradient_difference"] < 1e-4 and sides[side]["memory"]["peak"] > 0


@pytest.mark.heavy
def test_losses(smoke):
    result = smoke("losses.py", "losses_smoke")
    has(result, "geometry", "repeats", "sides", "damage_milliseconds")
    sides = result["sides"]
    assert list(sides) == list(losses.SIDES)
    for name, side in sides.items():
        assert side["seconds_per_pair"] > 0 and side["flops"] > 0 and side["lm_tokens"] > 0, name
        assert ("gradient_difference" in side) == (name.removeprefix("ours: ") in losses.STOCK and "ours" in name)
        assert side.get("gradient_difference", 0.0) < 1e-4, name
    for name in losses.STOCK:
        assert sides[f"ours: {name}"]["loss"] == pytest.approx(sides[f"stock: {name}"]["loss"], rel=1e-5)
    plain, image = sides["ours: orpo"], sides["ours: orpo + image term"]
    assert plain["lm_tokens"] < image["lm_tokens"] <= 2.1 * plain["lm_tokens"]
    assert image["lm_tokens"] < sides[losses.BASE]["lm_tokens"] * 1.05
    assert sides["ours: sft"]["lm_tokens"] < plain["lm_tokens"]
    assert sides["ours: dpo"]["flops"] > plain["flops"] == sides["ours: simpo"]["flops"]


@pytest.mark.heavy
def test_data_side(smoke):
    result = smoke("data_side.py", "data_side")
    has(result, "rows", "parquet_bytes", "sides", "ratios")
    for side in result["sides"].values():
        assert side["rows"] == result["rows"] == 8
        assert min(side[k] for k in ("rows_per_second", "collate_milliseconds_per_pair", "cache_bytes")) > 0


@pytest.mark.heavy
def test_storage(smoke):
    result = smoke("storage.py", "storage")
    has(result, "rows", "parquet_bytes", "sides")
    for name, side in result["sides"].items():
        assert side["in_reach"] == 1.0 and side["read"]["images_per_second"] > 0
        assert (side["cache_bytes"] < 0.2 * result["parquet_bytes"]) == name.startswith("parquet")


@pytest.mark.heavy
def test_merge(smoke):
    result = smoke("merge.py", "merge")
    has(result, "geometry", "weights_bytes", "sides", "ratios")
    assert result["same_files"] is True
    for side in result["sides"].values():
        assert side["seconds"] > 0 and side["peak_bytes"] > side["peak_own_bytes"] > side["own_before_bytes"] > 1e8


@pytest.mark.heavy
def test_starts(smoke):
    result = smoke("starts.py", "starts")
    has(result, "rows", "sides")
    for side in result["sides"].values():
        for start in (side["first"], side["second"]):
            assert not start["extrapolated"] and start["imports_seconds"] < start["first_step_seconds"]


@pytest.mark.heavy
def test_evaluation(smoke):
    result = smoke("eval_speed.py", "eval_smoke")
    has(result, "pairs", "batch", "sides", "ratios")
    stock, ours = result["sides"]["stock"], result["sides"]["ours"]
    assert ours["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-4)
    assert {"speed", "memory"} == result["ratios"].keys()


@pytest.mark.heavy
def test_peers(smoke):
    has_swift = (ROOT / ".venv-ms-swift" / "bin" / "swift").exists()
    result = smoke("peers.py", "peers_smoke", *([] if has_swift else ["--without-swift"]))
    has(result, "steps", "sides", "ratios")
    assert result["sides"].keys() == {"stock", "ours"} | ({"swift"} if has_swift else set())
    for side in result["sides"].values():
        assert side["seconds_per_step"] > 0 and side["peak_bytes"] > 1e8 and side["whole_run_seconds"] > 0


def test_flops_of_cpu_attention_are_counted():
    q = torch.randn(1, 4, 60, 16, requires_grad=True)
    k = torch.randn(1, 2, 60, 16, requires_grad=True)
    mask = torch.zeros(1, 1, 60, 60)

    def step(**options):
        return measure.count_flops(
            lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True, **options).sum().backward()
        )

    assert step(attn_mask=mask)["attention"] == 7 * 2 * 4 * 60 * 60 * 16  # 2 products forward, 5 backward
    assert step(is_causal=True)["attention"] == 7 * 2 * 4 * (60 * 61 // 2) * 16


def test_flops_by_part():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower, self.lm_head = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 32, bias=False)
            self.layer = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.lm_head(self.layer(self.vision_tower(x)))

    model = Model()
    with torch.no_grad():
        counts = measure.count_flops(lambda: model(torch.randn(5, 8)))
    assert counts == {"attention": 0, "lm_head": 2 * 5 * 8 * 32, "vision": 640, "rest": 640, "total": 3840}


def test_peak_memory_sees_what_was_freed():
    with measure.peak_memory() as memory:
        torch.ones(50_000_000).sum()  # 200 MB
    assert 150e6 < memory["over_load"] < 400e6


def test_in_turn_and_table():
    order: list[str] = []
    seconds = measure.in_turn({"a": lambda i: order.append(f"a{i}"), "b": lambda i: order.append(f"b{i}")}, 3)
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"] and len(seconds["a"]) == len(seconds["b"]) == 3
    assert measure.table(["x", "y"], [[1.23456, 12345], ["z", 250.4]]).splitlines() == [
        "| x    | y      |",
        "|------|--------|",
        "| 1.23 | 12,345 |",
        "| z    | 250    |",
    ]


def side(seconds, tokens, flops, memory):
    return {"seconds_per_step": seconds, "lm_tokens": tokens, "flops": flops, "memory": {"over_load": memory}}


def test_ratios():
    flops = [
        {"attention": a, "lm_head": h, "vision": 1, "rest": r, "total": t}
        for a, h, r, t in ((30, 60, 40, 131), (10, 5, 20, 36))
    ]
    result = {"sides": {"stock": side(9.0, 400, flops[0], 800), "ours": side(2.0, 100, flops[1], 200)}}
    assert orpo_step.ratios(result) == {
        "speed": 4.5,
        "lm_tokens": 4.0,
        "flops": 131 / 36,
        "flops_linear": 2.0,
        "flops_attention_and_head": 6.0,
        "memory": 4.0,
    }
    seconds = {"stock": 12.0, "all": 4.0, "half": 3.0, "none": 2.0}
    recomputed = {
        name: {"seconds_per_step": s, "flops": 10 * s, "gradient_difference": 0} for name, s in seconds.items()
    }
    recomputed["stock"]["memory"] = recomputed["all"]["memory"] = {"over_load": 6}
    recomputed["half"]["memory"] = recomputed["none"]["memory"] = {"over_load": 12}
    found = orpo_step.recompute_ratios({"sides": recomputed})
    assert found["all"] == {"speed": 3.0, "flops": 3.0, "memory": 1.0}
    assert found["none"] == {"speed": 6.0, "flops": 6.0, "memory": 0.5}
    shown = orpo_step.recompute_rows({"geometry": "mid", "pairs_per_image": 1, "sides": recomputed, "ratios": found})
    assert shown[2] == ["mid", 1, "none", "6.00x", "0.50x", "6.00", "0e+00"]
    mid = {"geometry": "mid", "pairs_per_image": 1, "sides": recomputed, "ratios": found}
    lines = make_tables.recompute_table([mid, {**mid, "pairs_per_image": 4}]).splitlines()
    assert (
        "5.4x: met" in lines[4] and "16x: missed by 62.5%" in lines[7] and lines[3].endswith("|                      |")
    )
    rates = {
        "stock": {"pairs_per_second": 2.0, "memory": {"over_load": 6}},
        "ours": {"pairs_per_second": 5.0, "memory": {"over_load": 2}},
    }
    assert eval_speed.ratios(rates) == {"speed": 2.5, "memory": 3.0}
    keys = ("rows_per_second", "get_dataset_seconds", "collate_milliseconds_per_pair", "cache_bytes")
    data = {
        "stock": dict(zip(keys, (4.0, 9.0, 8.0, 30), strict=True)),
        "ours": dict(zip(keys, (80.0, 3.0, 2.0, 10), strict=True)),
    }
    assert data_side.ratios(data) == {"tokenizing": 20.0, "get_dataset": 3.0, "collate": 4.0, "disk": 3.0}
    runs = {
        name: {"seconds_per_step": s, "peak_bytes": b}
        for name, s, b in (("swift", 6.0, 30), ("stock", 8.0, 20), ("ours", 2.0, 10))
    }
    assert peers.ratios(runs) == {"swift_speed": 3.0, "swift_memory": 3.0, "stock_speed": 4.0, "stock_memory": 2.0}


def test_a_stopped_start_is_extrapolated_and_says_so():
    silence = {"longest_silence_seconds": 1.0, "after_the_words": "x"}
    events = {"imported": {"seconds": 5.0}, "silence": silence}
    stopped = {"before_tokenizing": 100.0, "tokenizing": 50.0, "rows": 1_000}
    found = starts.result_of(4_000, {**events, "stopped": stopped})
    assert found["first_step_seconds"] == 100 + 4 * 50 and found["extrapolated"] and found["rows_tokenized"] == 1_000
    memory = {"peak_bytes": 2e9, "peak_own_bytes": 1e9}
    reached = {**events, "first step": {"seconds": 30.0, "cpu_seconds": 20.0, **memory}}
    whole = starts.result_of(4_000, reached)
    assert whole["first_step_seconds"] == 30 and not whole["extrapolated"] and whole["cpu_seconds"] == 20
    table = starts.show(
        {"rows": 4_000, "sides": {"ours": {"first": whole, "second": whole}, "stock": {"first": found}}}
    )
    assert "300 (extrapolated from 1,000 rows)" in table and "4,000 pairs" in table and "None" not in table
    late = {"seconds": 1.0, "cpu_seconds": 1e6, **memory}  # no machine computes so much in a second
    with pytest.raises(ValueError, match="the clock started late"):
        starts.result_of(4_000, {**events, "first step": late})


def test_gradient_difference():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0])
    assert setting.largest_difference({"a": a, "b": b * 1.5}, {"a": a, "b": b}) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="different parameters"):
        setting.largest_difference({"a": a}, {"a": a, "b": b})


def test_pages_are_what_the_results_give():
    assert (ROOT / "docs" / "benchmarks.md").read_text() == make_tables.page(measure.RESULTS)
    assert make_tables.LOSSES.read_text() == make_tables.with_costs(make_tables.LOSSES.read_text(), measure.RESULTS)
    (planned,) = make_tables.load(measure.RESULTS, "plan_7b.json")
    assert (ROOT / "docs" / "scaling.md").read_text() == report.scaling_page(planned)


def test_missed_targets_are_said():
    result = {
        "geometry": "mid",
        "pairs_per_image": 1,
        "ratios": {"speed": 3.0, "memory": 2.5, "flops": 3.2},
        "sides": {"ours": {"share_of_gemm_rate": 0.7}},
    }
    lines = make_tables.targets([result]).splitlines()
    assert "missed by 25.0%; the FLOP ratio is 3.20" in lines[2]
    assert [line.split("|")[-2].strip() for line in lines[3:]] == ["met", "met"]
