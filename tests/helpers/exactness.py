"""Two trainers on the same weights and rows: losses, logged terms and gradients compared."""

from __future__ import annotations

import pytest
import torch

from helpers.recipes import build_trainer, step, write_rows

# LLaMA-Factory's logits/* average over every position of the padded batch; those logits are not computed here.
COMPARED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
    "odds_ratio_loss",
)


@torch.no_grad()
def same_weights(model_a, model_b):
    """Both were made from one seed; adapters get a B that is not zero, else every gradient of A would be."""
    generator = torch.Generator().manual_seed(7)
    other = dict(model_b.named_parameters())
    for name, parameter in model_a.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        other[name].data.copy_(parameter.data)
    for name, parameter in model_a.named_parameters():  # as bytes: packed 4-bit values can look like NaN
        assert torch.equal(parameter.data.view(torch.uint8), other[name].data.view(torch.uint8)), name


def same_gradients(expected, found, tolerance):
    """Of the same parameters, each as near as its own norm asks, or a thousandth of the largest one's."""
    assert expected.keys() == found.keys() and expected
    scale = max(gradient.norm().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm().item()
        assert error <= tolerance * max(gradient.norm().item(), 1e-3 * scale), name


def compare(recipe_keys, rows, tmp_path, batches, tolerance=1e-5, plugin_keys=None, double=False):
    write_rows(tmp_path, rows)
    theirs = build_trainer(tmp_path, {**recipe_keys, "shared_prefix": False})
    ours = build_trainer(tmp_path, {**recipe_keys, **(plugin_keys or {})})
    same_weights(theirs.model, ours.model)
    assert type(theirs).__name__ == "CustomDPOTrainer" and type(ours).__name__ == "SharedPrefixTrainer"
    if double:
        ours.model.double(), theirs.model.double()
    for picked in batches:
        loss_a, terms_a, grads_a = step(theirs, [theirs.train_dataset[i] for i in picked])
        loss_b, terms_b, grads_b = step(ours, [ours.train_dataset[i] for i in picked])
        assert loss_b == pytest.approx(loss_a, rel=tolerance)
        for key in COMPARED:
            if key in terms_a:
                assert terms_b[key] == pytest.approx(terms_a[key], rel=tolerance, abs=tolerance), key
        same_gradients(grads_a, grads_b, tolerance)
    return ours, theirs
