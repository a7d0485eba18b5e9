"""Leaving out vision layers nobody reads changes nothing LLaVA reads."""

from __future__ import annotations

import pytest
import torch

from helpers.llava import make_example, make_image, packed_images, tiny_llava
from llava_orpo.step.vision_tower import skip_unread_vision_layers


@pytest.fixture
def frozen():
    model = tiny_llava()
    model.model.vision_tower.requires_grad_(False)
    return model


def _features(model):
    images = packed_images(model, [make_example(model, make_image(90, 30, 0), [2], [(1, 1)], 0)])
    return torch.cat(model.get_image_features(**images).pooler_output)


@pytest.mark.parametrize("read, skipped", [(-2, 1), (-1, 0), (-3, 2), (1, 2), ([-3, -2], 1), ([1, 3], 0)])
def test_same_features_without_the_unread_layers(frozen, read, skipped):
    frozen.config.vision_feature_layer = read
    if isinstance(read, list):
        width = frozen.config.vision_config.hidden_size * len(read)
        frozen.model.multi_modal_projector.linear_1 = torch.nn.Linear(width, 64)
    layers = frozen.model.vision_tower.vision_model.encoder.layers
    ran = []
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *args, number=number: ran.append(number))
    before = _features(frozen)
    assert set(ran) == {0, 1, 2}
    ran.clear()
    with skip_unread_vision_layers(frozen) as count:
        inside = _features(frozen)
    assert count == skipped and set(ran) == set(range(3 - skipped))
    assert torch.equal(before, inside) and torch.equal(before, _features(frozen))


def test_gradients_of_the_projector_are_the_same(frozen):
    projector = frozen.model.multi_modal_projector
    _features(frozen).square().sum().backward()
    expected = [p.grad.clone() for p in projector.parameters()]
    frozen.zero_grad()
    with skip_unread_vision_layers(frozen):
        _features(frozen).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(projector.parameters(), expected, strict=True))


def test_forwards_come_back_after_an_error(frozen):
    last = frozen.model.vision_tower.vision_model.encoder.layers[-1]
    own = last.forward
    with pytest.raises(RuntimeError, match="inside"):
        with skip_unread_vision_layers(frozen):
            assert "forward" in vars(last)
            raise RuntimeError("inside")
    assert "forward" not in vars(last) and last.forward == own
    last.forward = hooked = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's hooks do
    with skip_unread_vision_layers(frozen):
        assert last.forward is not hooked
    assert last.forward is hooked


def test_a_trainable_tower_is_refused(frozen):
    next(frozen.model.vision_tower.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="vision tower is being trained"):
        with skip_unread_vision_layers(frozen):
            pass
