"""The losses beside ORPO's, on log-probs, as pure functions without a model or a trainer.

Every log-prob is a tensor of shape (n,) in nats, one entry per pair: arguments named `..._mean` are means over an
answer's tokens, as in `orpo`, the others sums over them. `damaged` is the chosen answer under the damaged image
(`data.damaged`); `ref_...` comes from the reference model and gets no gradient. Results have shape (n,) and are at
least float32: bf16 and fp16 inputs are upcast, float64 stays float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .orpo import odds_ratio_loss


def simpo(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """-log sigmoid(beta * (chosen - rejected) - gamma) (SimPO, arXiv 2405.14734, eq. 6).

    `gamma` is LLaMA-Factory's `simpo_gamma`, a margin of rewards; the paper's table of settings gives gamma / beta.
    Equals LLaMA-Factory's `CustomDPOTrainer.simpo_loss`.
    """
    return -F.logsigmoid(beta * _difference(chosen_mean, rejected_mean) - gamma)


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """-log sigmoid(beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]) (DPO, arXiv 2305.18290, eq. 7).

    `label_smoothing`, the share of pairs whose labels are taken to be swapped, gives conservative DPO, as in TRL's
    `DPOTrainer.dpo_loss` for "sigmoid". `dpo_context` (SENTINEL's C-DPO, arXiv 2507.12455) is this loss too: its clean
    context stands in the prompt.
    """
    logits = beta * (_reward(chosen, ref_chosen) - _reward(rejected, ref_rejected))
    loss = -F.logsigmoid(logits)
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def mdpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    damaged: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    ref_damaged: torch.Tensor,
    beta: float,
    anchor: float = 0.0,
) -> torch.Tensor:
    """DPO's loss, the same between the true and the damaged image, and the chosen answer's reward held above `anchor`.

    mDPO (arXiv 2406.11839): the sum, unweighted, of DPO, its conditional preference and its anchored preference, the
    last being -log sigmoid(beta * (chosen - ref_chosen) - anchor); the paper and `mdpo_trainer.py` of luka-group/mDPO
    have an anchor of 0.
    """
    answers = dpo(chosen, rejected, ref_chosen, ref_rejected, beta)
    images = dpo(chosen, damaged, ref_chosen, ref_damaged, beta)
    return answers + images - F.logsigmoid(beta * _reward(chosen, ref_chosen) - anchor)


def pea(chosen_mean: torch.Tensor, rejected_mean: torch.Tensor, text_margin: float) -> torch.Tensor:
    """relu(text_margin - (chosen - rejected)): PEA-DPO's term of the answers (arXiv 2608.19598, margin 1.5)."""
    return F.relu(text_margin - _difference(chosen_mean, rejected_mean))


def image_odds_ratio(chosen_mean: torch.Tensor, damaged_mean: torch.Tensor) -> torch.Tensor:
    """ORPO's odds ratio term between the true and the damaged image, both with the chosen answer."""
    return odds_ratio_loss(chosen_mean, damaged_mean)


def image_hinge(chosen_mean: torch.Tensor, damaged_mean: torch.Tensor, image_margin: float) -> torch.Tensor:
    """relu(image_margin - (chosen - damaged)): mPEA-DPO's term of the images (arXiv 2608.19598, margin 4.5)."""
    return F.relu(image_margin - _difference(chosen_mean, damaged_mean))


def _at_least_fp32(logp: torch.Tensor) -> torch.Tensor:
    return logp if logp.dtype == torch.float64 else logp.float()


def _difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return _at_least_fp32(first) - _at_least_fp32(second)


def _reward(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The implicit reward of an answer, without its factor beta."""
    return _difference(logp, reference.detach())
