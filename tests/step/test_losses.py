"""The losses beside ORPO's against float64, against LLaMA-Factory's and TRL's own code, and at published values."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_orpo.step import losses

sums = st.floats(-400.0, -0.1)
means = st.floats(-15.0, -0.01)


def softplus(value: float) -> float:
    """-log sigmoid(-value) in double precision."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]


def check(loss: torch.Tensor, inputs: list[torch.Tensor], expected: float, slopes: list[float]) -> None:
    """Loss and gradients against plain Python, to double precision."""
    assert loss.shape == (1,) and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    for gradient, slope in zip(grads, slopes, strict=True):
        assert (0.0 if gradient is None else gradient.item()) == pytest.approx(slope, rel=1e-9, abs=1e-12)


@given(means, means, st.floats(0.1, 10.0), st.floats(0.0, 5.0))
def test_simpo(w, r, beta, gamma):
    inputs = tensors(w, r)
    x = beta * (w - r) - gamma
    check(losses.simpo(*inputs, beta, gamma), inputs, softplus(-x), [-beta * sigmoid(-x), beta * sigmoid(-x)])


@given(sums, sums, sums, sums, st.floats(0.01, 1.0), st.sampled_from([0.0, 0.1, 0.4]))
def test_dpo(w, r, ref_w, ref_r, beta, smoothing):
    inputs = tensors(w, r, ref_w, ref_r)
    x = beta * ((w - ref_w) - (r - ref_r))
    slope = -beta * ((1 - smoothing) * sigmoid(-x) - smoothing * sigmoid(x))
    expected = (1 - smoothing) * softplus(-x) + smoothing * softplus(x)
    check(losses.dpo(*inputs, beta, smoothing), inputs, expected, [slope, -slope, 0.0, 0.0])


@given(sums, sums, sums, sums, sums, sums, st.floats(0.01, 1.0), st.sampled_from([0.0, 1.5]))
def test_mdpo(w, r, d, ref_w, ref_r, ref_d, beta, anchor):
    inputs = tensors(w, r, d, ref_w, ref_r, ref_d)
    answer, image = beta * ((w - ref_w) - (r - ref_r)), beta * ((w - ref_w) - (d - ref_d))
    held = beta * (w - ref_w) - anchor
    slopes = [beta * sigmoid(-answer), beta * sigmoid(-image)]
    expected = softplus(-answer) + softplus(-image) + softplus(-held)
    chosen = -slopes[0] - slopes[1] - beta * sigmoid(-held)
    check(losses.mdpo(*inputs, beta, anchor), inputs, expected, [chosen, *slopes, 0.0, 0.0, 0.0])


@given(means, means, st.floats(0.0, 6.0))
def test_hinges(w, other, margin):
    for loss in (losses.pea, losses.image_hinge):
        inputs = tensors(w, other)
        gap = margin - (w - other)
        slope = -1.0 if gap > 0 else 0.0
        check(loss(*inputs, margin), inputs, max(0.0, gap), [slope, -slope])


@given(st.floats(-15.0, -0.05), st.floats(-15.0, -0.05))
def test_the_image_term_is_orpos_odds_ratio(w, d):
    inputs = tensors(w, d)
    p, q = math.exp(w), math.exp(d)
    x = math.log(p / (1 - p)) - math.log(q / (1 - q))
    slopes = [-sigmoid(-x) / (1 - p), sigmoid(-x) / (1 - q)]
    check(losses.image_odds_ratio(*inputs), inputs, softplus(-x), slopes)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_equals_the_code_that_llamafactory_trains_with(smoothing):
    """LLaMA-Factory's `compute_preference_loss` for SimPO, and for DPO, where it calls TRL's `dpo_loss`."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    generator = torch.Generator().manual_seed(3)
    w, r, ref_w, ref_r = (-30 * torch.rand(4, 64, generator=generator, dtype=torch.float64)).unbind()
    trainer = object.__new__(CustomDPOTrainer)
    trainer.accelerator = SimpleNamespace(device="cpu")
    trainer.beta, trainer.simpo_gamma, trainer.bco_gemma, trainer.label_smoothing = 0.3, 1.1, 0.0, smoothing
    trainer.f_divergence_type, trainer.f_divergence_params, trainer.reference_free = "reverse_kl", None, False
    trainer.loss_type, trainer.finetuning_args = "simpo", SimpleNamespace(use_ref_model=False)
    theirs = trainer.compute_preference_loss(w / 10, r / 10, None, None)[0]
    torch.testing.assert_close(losses.simpo(w / 10, r / 10, 0.3, 1.1), theirs, rtol=1e-12, atol=1e-12)
    trainer.loss_type, trainer.finetuning_args.use_ref_model = "sigmoid", True
    theirs = trainer.compute_preference_loss(w, r, ref_w, ref_r)[0]
    torch.testing.assert_close(losses.dpo(w, r, ref_w, ref_r, 0.3, smoothing), theirs, rtol=1e-12, atol=1e-12)


def test_before_the_first_step_the_losses_of_a_reference_are_multiples_of_ln_2():
    """Where policy and reference agree, each -log sigmoid is ln 2: DPO has one, mDPO three (arXiv 2406.11839)."""
    logps = torch.tensor([-31.0, -44.0, -60.0]).unbind()
    w, r, d = (x[None] for x in logps)
    assert losses.dpo(w, r, w, r, 0.1).item() == pytest.approx(0.6931, abs=1e-4)
    assert losses.mdpo(w, r, d, w, r, d, 0.1).item() == pytest.approx(2.0794, abs=1e-4)


def test_published_margins_are_where_the_hinges_end():
    """mPEA-DPO's margins (arXiv 2608.19598): 1.5 between the answers, 4.5 between the images, weight 0.2."""
    w = torch.tensor([-0.5])
    assert losses.pea(w, torch.tensor([-2.0]), 1.5) == 0 and losses.image_hinge(w, torch.tensor([-5.0]), 4.5) == 0
    total = losses.pea(w, torch.tensor([-1.0]), 1.5) + 0.2 * losses.image_hinge(w, torch.tensor([-1.0]), 4.5)
    assert total.item() == pytest.approx(1.0 + 0.2 * 4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    w, r, d = (torch.tensor([value], dtype=dtype) for value in (-0.75, -1.3, -2.1))
    for loss in (
        lambda *x: losses.simpo(x[0], x[1], 2.0, 0.5),
        lambda *x: losses.dpo(x[0], x[1], x[2], x[0], 0.1),
        lambda *x: losses.mdpo(*x, x[2], x[0], x[1], 0.1),
        lambda *x: losses.pea(x[0], x[1], 1.5),
        lambda *x: losses.image_odds_ratio(x[0], x[2]),
        lambda *x: losses.image_hinge(x[0], x[2], 4.5),
    ):
        ours = loss(w, r, d)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), loss(w.double(), r.double(), d.double()), rtol=1e-6, atol=1e-6)
