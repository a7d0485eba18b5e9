"""ORPO's loss on mean log-probs per token, as pure functions without a model or a trainer.

Every argument `chosen` / `rejected` is a tensor of shape (n,): the mean log-prob in nats over one response's
tokens, `log P(y|x) = (1/m) sum_t log P(y_t | x, y_<t)` (ORPO, arXiv 2403.07691, eq. 3). Results have the same
shape and are at least float32: bf16 and fp16 inputs are upcast, float64 stays float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


class OrpoLoss(NamedTuple):
    """Terms of `orpo_loss`, each of shape (n,), one entry per pair."""

    loss: torch.Tensor
    sft: torch.Tensor
    odds_ratio: torch.Tensor
    log_odds: torch.Tensor


def log1m_exp(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(logp)) for logp <= 0, same shape, at least float32.

    Uses log(-expm1(x)) above -ln 2 and log1p(-exp(x)) below (Maechler 2012, "Accurately computing
    log(1 - exp(-|a|))").

    At logp = 0 the exact value is -inf, so values above -eps (eps of the compute dtype, 1.2e-7 in float32)
    are moved to -eps, where a log-prob is below its own rounding error anyway. The gradient there is the one
    at -eps, -1/eps, and not zero: d logp / d logits is about |logp| so close to certainty, hence what reaches
    the model stays at most 1, and a rejected response of probability 1 is still pushed down.
    """
    x = logp if logp.dtype == torch.float64 else logp.float()
    x = x + (x.clamp(max=-torch.finfo(x.dtype).eps) - x).detach()
    near_zero = x > -math.log(2.0)
    # Each branch sees only arguments it can take: a masked-out inf would still turn the gradient into NaN.
    upper = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    lower = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, upper, lower)


def log_odds(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The log odds ratio, log [odds(chosen) / odds(rejected)] with odds = P / (1 - P) (eq. 4 and 5)."""
    chosen, rejected = _at_least_fp32(chosen), _at_least_fp32(rejected)
    return (chosen - rejected) - (log1m_exp(chosen) - log1m_exp(rejected))


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(log odds ratio) (eq. 7)."""
    return -F.logsigmoid(log_odds(chosen, rejected))


def sft_loss(chosen: torch.Tensor) -> torch.Tensor:
    """The negative mean log-prob of the chosen response: the SFT term of eq. 6."""
    return -_at_least_fp32(chosen)


def orpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> OrpoLoss:
    """L_SFT + beta * L_OR per pair (eq. 6; `beta` is the paper's lambda and LLaMA-Factory's `pref_beta`).

    Equals LLaMA-Factory's `CustomDPOTrainer.odds_ratio_loss` wherever that one is finite.
    """
    odds = log_odds(chosen, rejected)
    sft, odds_ratio = sft_loss(chosen), -F.logsigmoid(odds)
    return OrpoLoss(loss=sft + beta * odds_ratio, sft=sft, odds_ratio=odds_ratio, log_odds=odds)


def _at_least_fp32(logp: torch.Tensor) -> torch.Tensor:
    return logp if logp.dtype == torch.float64 else logp.float()
