"""Log-probs of given tokens from logits, with little memory. This module needs only torch."""

from __future__ import annotations

import torch


def token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[target] per row in nats, (K,), float32 (float64 for float64 logits).

    logits (K, V) of any float dtype, targets (K,) int64. Rows are upcast in chunks and the backward computes
    softmax again, so beside the logits and their gradient nothing of size K x V is made or kept.
    """
    return _TokenLogps.apply(logits, targets)


class _TokenLogps(torch.autograd.Function):
    CHUNK = 64

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        lse = torch.cat([torch.logsumexp(_fp32(rows), dim=-1) for rows in logits.split(_TokenLogps.CHUNK)])
        ctx.save_for_backward(logits, targets, lse)
        return _fp32(logits.gather(-1, targets[:, None])[:, 0]) - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        size = _TokenLogps.CHUNK
        for rows, target, norm, g, into in zip(
            *(x.split(size) for x in (logits, targets, lse, grad, out)), strict=True
        ):
            softmax = torch.exp(_fp32(rows) - norm[:, None])
            softmax.scatter_add_(-1, target[:, None], torch.full_like(norm, -1.0)[:, None])
            into.copy_(softmax.mul_(-g[:, None]))
        return out, None


def _fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
