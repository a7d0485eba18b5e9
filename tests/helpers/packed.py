"""Packed batches of the tiny model in `llava`, and what a loss makes of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from helpers.llava import IMAGE_TOKEN
from llava_orpo.step.orpo import orpo_loss
from llava_orpo.step.packing import pack


def packed_of(examples):
    return pack([example.pairs for example in examples], IMAGE_TOKEN)


def orpo_of(logps, examples):
    """ORPO's loss plus a margin term of another shape (SimPO's), so that no gradient cancels by chance."""
    lengths = [len(p.chosen_ids) for e in examples for p in e.pairs] + [
        len(p.rejected_ids) for e in examples for p in e.pairs
    ]
    chosen, rejected = (logps / torch.tensor(lengths)).chunk(2)
    return orpo_loss(chosen, rejected, 0.1).loss.mean() + -F.logsigmoid(2.0 * (chosen - rejected) - 0.5).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
