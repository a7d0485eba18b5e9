"""ORPO and SimPO losses against float64 and against LLaMA-Factory's formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llava_orpo.step.orpo import log1m_exp, log_odds, odds_ratio_loss, orpo_loss, sft_loss

EPS32 = torch.finfo(torch.float32).eps
ordinary = st.floats(-20.0, -0.05)


def llamafactory_orpo(chosen, rejected, beta):
    """CustomDPOTrainer.odds_ratio_loss of LLaMA-Factory 0.9.5, written out."""
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -chosen + beta * -F.logsigmoid(odds)


def exact_log1m_exp(value):
    """log(1 - e^x) in double precision; expm1 keeps every digit near 0."""
    return math.log(-math.expm1(value)) if value > -1.0 else math.log1p(-math.exp(value))


@pytest.mark.parametrize(
    "value", [-1e-6, -1e-5, -1e-3, -0.1, -0.69, -math.log(2.0), -0.70, -1.0, -5.0, -17.0, -90.0, -1e4]
)
def test_log1m_exp_matches_float64(value):
    x = torch.tensor(value, requires_grad=True)
    out = log1m_exp(x)
    out.backward()
    stored = x.item()  # what float32 made of it
    assert out.item() == pytest.approx(exact_log1m_exp(stored), rel=1e-6, abs=1e-44)
    slope = -math.exp(stored) / -math.expm1(stored)
    assert x.grad.item() == pytest.approx(slope, rel=2e-6, abs=1e-44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_certainty_is_clamped_at_eps_with_a_finite_gradient(dtype):
    x = torch.tensor([0.0, -1e-30, -0.0], dtype=dtype, requires_grad=True)
    out = log1m_exp(x)
    out.sum().backward()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(compute).eps
    assert out.dtype == compute
    torch.testing.assert_close(out, torch.full_like(out, math.log(eps)), rtol=1e-6, atol=0)
    if dtype != torch.float16:  # 1/eps of float32 is beyond float16's range
        torch.testing.assert_close(x.grad.double(), torch.full((3,), -1 / eps).double(), rtol=1e-2, atol=0)


@given(st.floats(-200.0, -1e-6))
def test_log1m_exp_never_leaves_float64(value):
    x = torch.tensor(value)
    assert log1m_exp(x).item() == pytest.approx(exact_log1m_exp(x.item()), rel=2e-6, abs=1e-44)


@given(st.lists(st.tuples(ordinary, ordinary), min_size=1, max_size=5), st.floats(0.01, 2.0))
def test_equals_llamafactory_in_the_ordinary_range(pairs, beta):
    chosen, rejected = torch.tensor(pairs, dtype=torch.float64).T.requires_grad_()
    ours, theirs = orpo_loss(chosen, rejected, beta).loss, llamafactory_orpo(chosen, rejected, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), (chosen, rejected), retain_graph=True),
        torch.autograd.grad(theirs.sum(), (chosen, rejected)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_fp32_stays_right_where_llamafactory_loses_digits():
    chosen, rejected = torch.tensor([-2e-6]), torch.tensor([-1.5])
    exact = llamafactory_orpo(chosen.double(), rejected.double(), 0.1)
    naive = llamafactory_orpo(chosen, rejected, 0.1)
    ours = orpo_loss(chosen, rejected, 0.1).loss
    assert abs(ours.double() - exact) < 1e-11
    assert abs(naive.double() - exact) > abs(ours.double() - exact)
    assert not torch.isfinite(llamafactory_orpo(torch.tensor([-1.0]), torch.tensor([-1e-9]), 0.1)).all()


edge = st.sampled_from([0.0, -1e-30, -1e-12, -1e-8, -EPS32, -1e-5, -0.5, -1.0, -50.0, -1e3, -1e4])


@given(edge, edge)
def test_loss_and_gradients_are_finite_everywhere(c, r):
    chosen = torch.tensor([c], requires_grad=True)
    rejected = torch.tensor([r], requires_grad=True)
    terms = orpo_loss(chosen, rejected, 0.1)
    terms.loss.sum().backward()
    for value in (*terms, chosen.grad, rejected.grad):
        assert torch.isfinite(value).all()
    assert chosen.grad <= -1.0 + 1e-6 and rejected.grad >= 0.0  # chosen is pulled up, rejected never is


def test_extreme_pairs_match_float64():
    c = torch.tensor([-1e-4, -1e4, -3.0, -1e-3], requires_grad=True)
    r = torch.tensor([-1e4, -1e-4, -1e-5, -1e-3], requires_grad=True)
    c64, r64 = c.detach().double().requires_grad_(), r.detach().double().requires_grad_()
    ours, exact = orpo_loss(c, r, 0.1).loss, llamafactory_orpo(c64, r64, 0.1)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-6)
    ours.sum().backward(), exact.sum().backward()
    torch.testing.assert_close(c.grad.double(), c64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r.grad.double(), r64.grad, rtol=1e-5, atol=1e-6)


def test_certain_logits_give_bounded_gradients():
    """What -1/eps at logp = 0 means for a model: the gradient at the logits stays at most beta."""
    logits = torch.tensor([40.0, 0.0, 0.0], requires_grad=True)
    rejected = logits.log_softmax(-1)[:1]
    odds_ratio_loss(torch.tensor([-1.0]), rejected).sum().backward()
    assert rejected.item() == 0.0 and torch.isfinite(logits.grad).all() and logits.grad.abs().max() <= 1.0


def test_terms_fit_together():
    chosen, rejected = torch.tensor([-0.5, -2.0]), torch.tensor([-1.5, -1.0])
    terms = orpo_loss(chosen, rejected, 0.25)
    torch.testing.assert_close(terms.loss, terms.sft + 0.25 * terms.odds_ratio)
    assert torch.equal(terms.sft, sft_loss(chosen)) and torch.equal(terms.sft, -chosen)
    assert torch.equal(terms.odds_ratio, odds_ratio_loss(chosen, rejected))
    assert torch.equal(terms.log_odds, log_odds(chosen, rejected))
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (-0.5, -1.5)]
    assert terms.log_odds[0].item() == pytest.approx(math.log(odds[0] / odds[1]), rel=1e-6)
    assert (terms.log_odds > 0).tolist() == [True, False]


def test_bf16_is_computed_in_fp32():
    chosen, rejected = (
        torch.tensor([-0.75], dtype=torch.bfloat16),
        torch.tensor([-1.25], dtype=torch.bfloat16),
    )
    assert all(term.dtype == torch.float32 for term in orpo_loss(chosen, rejected, 0.1))
    expected = llamafactory_orpo(chosen.double(), rejected.double(), 0.1)
    torch.testing.assert_close(orpo_loss(chosen, rejected, 0.1).loss.double(), expected, rtol=1e-6, atol=1e-6)
