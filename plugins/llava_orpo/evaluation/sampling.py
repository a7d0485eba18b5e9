"""Sampling in which every row of a batch has its own random stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


class SeededSampling(LogitsProcessor):
    """Turns greedy `generate` into exact sampling with one generator per row.

    transformers' own sampling draws for the whole batch from one stream, so an answer depends on its neighbours. Here
    every row adds Gumbel noise of its own to its log-probs; their argmax is a sample of softmax(logits / temperature)
    within the top_p nucleus (the Gumbel-max trick: Gumbel 1954; Maddison et al., arXiv 1411.0030). Use it with
    do_sample=False. One object serves one `generate` call.

    Args:
        seeds: one per row, in the order of the batch.
        temperature: above 0.
        top_p: in (0, 1]; 1 keeps every token.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = TemperatureLogitsWarper(float(temperature))
        self.nucleus = TopPLogitsWarper(float(top_p)) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocab) logits to (rows, vocab) perturbed log-probs, fp32."""
        scores = self.temperature(input_ids, scores.float())
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=g) for g in self.generators])
        return scores - noise.log().to(scores.device)
