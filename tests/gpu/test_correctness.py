"""Stage 1 of the GPU run: on the card where there is one (marker gpu), and on a CPU what can be known without."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from helpers.paths import ROOT
from llava_orpo.gpu import correctness
from llava_orpo.gpu.correctness import CASES, Bench, Case, Result
from llava_orpo.gpu.record import LeftOut
from llava_orpo.step import attention
from llava_orpo.step.packing import SharedPrefixLayout

# What is None in sys.modules is found by no import and no find_spec, as if it were not installed.
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({names}))\n"


@pytest.fixture(scope="module")
def card():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: `bash scripts/gpu.sh --dry-run` runs the same on a CPU")
    with correctness.full_precision():
        yield Bench(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_on_the_card_equals_a_plain_forward(card, case):
    entry = correctness.check(card, case)
    assert entry.state == "ok", entry.note


@pytest.fixture(scope="module")
def bench():
    return Bench(torch.device("cpu"))


@pytest.mark.parametrize("case", [Case("fp32", "sdpa", True, "all"), Case("bf16", "sdpa", False, "none")], ids=str)
def test_the_step_on_a_cpu_equals_a_plain_forward(bench, case):
    entry = correctness.check(bench, case)
    assert entry.state == "ok", entry.note
    trained = [name for name, p in bench.model.named_parameters() if p.requires_grad]
    assert set(bench.plain("fp32", case.grouped).gradients) == set(trained)  # every gradient was compared
    assert not any("vision_tower" in name for name in trained) and len(trained) > 20


def sees_the_other_answer(layout, queries, dtype):
    """Masks that are causal and nothing else."""
    start, masks = 0, []
    for (root, tail), query in zip(layout.groups, queries, strict=True):
        hidden = torch.arange(start, start + root + tail) > query[:, None]
        masks.append(torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[None, None])
        start += root + tail
    return tuple(masks)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_mask_fails(bench, dtype):
    with mock.patch.object(SharedPrefixLayout, "_masks", sees_the_other_answer):
        entry = correctness.check(bench, Case(dtype, "sdpa", True, "none"))
    assert entry.state == "failed" and "worst tensor" in entry.note


def test_a_refused_flex_is_a_failure_and_no_figures_of_sdpa(bench, monkeypatch):
    def doubled(query, key, value, **options):
        return 2 * flex_attention(query, key, value, **options)

    monkeypatch.setattr(attention, "_eager_flex", lambda: doubled)
    case = Case("fp32", "flex", False, "none")
    entry = correctness.check(bench, case)
    assert entry.state == "failed" and entry.figures == {}
    assert "SDPA served: its output differs from SDPA's by" in entry.note
    with pytest.raises(LeftOut, match="SDPA served"):
        correctness.kernels(bench, case)
    monkeypatch.undo()
    assert correctness.check(bench, case).state == "ok"
    assert correctness.check(bench, Case("fp32", "sdpa", False, "none")).state == "ok"


def test_distance():
    truth = Result(2.0, {"a": torch.tensor([3.0, 4.0]), "small": torch.tensor([1e-9])})
    found = Result(2.2, {"a": torch.tensor([3.0, 4.5]), "small": torch.tensor([2e-9])})
    assert correctness.distance(found, truth) == pytest.approx((0.1, 0.1, 0.1))  # 1e-9 is rounding beside 5
    with pytest.raises(ValueError, match="different parameters: \\['a'\\]"):
        correctness.distance(Result(2.0, {"small": torch.tensor([1e-9])}), truth)


def test_the_kernels_of_a_step_are_named(bench):
    found = correctness.kernels(bench, Case("fp32", "sdpa", True, "none"))
    assert found["aten::_scaled_dot_product_flash_attention_for_cpu"][0] > 2
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in found
    assert not any("autograd" in name for name in found)


def test_the_step_runs_where_llamafactory_is_not_installed(tmp_path):
    absent = {"llamafactory", "bitsandbytes", "datasets", "pyarrow", "trl", "mistral_common", "sentencepiece", "scipy"}
    absent |= {"omegaconf", "pydantic", "jsonschema", "matplotlib"}
    code = WITHOUT.format(names=absent) + (
        "import torch, llava_orpo.step.collator, llava_orpo.plan.sizes\n"
        "from llava_orpo.gpu import correctness, speed, waits\n"
        "entry = correctness.check(correctness.Bench(torch.device('cpu')), correctness.CASES[0])\n"
        "assert entry.state == 'ok', entry\n"
        f"assert not [name for name in {absent} if sys.modules[name] is not None]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_random_model_imports_without_llamafactory():
    code = WITHOUT.format(names={"llamafactory", "bitsandbytes", "datasets"}) + "import llava_orpo.tiny.random_model"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
