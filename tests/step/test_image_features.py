"""Image features at the collator's positions, against LlavaNextModel's own search for the image tokens."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from helpers.llava import IMAGE_TOKEN, make_example, make_image, packed_images, tiny_llava
from helpers.packed import gradients, packed_of
from llava_orpo.gpu.host_waits import Waits
from llava_orpo.step import attention
from llava_orpo.step.packing import TokenPair, pack


@pytest.fixture
def case():
    """(model, packed batch, image inputs) with three images, one of them too small for tiles of its own."""
    model = tiny_llava()
    attention.enable(model)
    images = [make_image(*size, seed) for seed, size in enumerate([(90, 30), (20, 22), (25, 80)])]
    examples = [make_example(model, image, [5, 3], [(4, 6), (2, 2)], seed) for seed, image in enumerate(images)]
    examples.insert(1, make_example(model, None, [4], [(3, 2)], 9))
    inputs = packed_images(model, examples)
    return model, packed_of(examples), {**inputs, "image_sizes": inputs["image_sizes"].tolist()}


def test_positions_are_those_of_the_image_tokens(case):
    packed = case[1]
    assert torch.equal(packed.image_positions, (packed.input_ids[0] == IMAGE_TOKEN).nonzero()[:, 0])
    assert packed.num_image_tokens == len(packed.image_positions) > 0
    assert packed.to("meta").image_positions.device.type == "meta"
    text = pack([[TokenPair([10, 11], [12], [13])]], IMAGE_TOKEN)
    assert text.image_positions.dtype == torch.int64 and text.num_image_tokens == 0


def test_logits_and_gradients_are_bit_identical_to_upstream(case, monkeypatch):
    model, packed, inputs = case

    def run():
        logits = attention.packed_forward(model, packed, **inputs)
        return logits.detach(), gradients(model, logits.square().mean())

    ours, our_gradients = run()
    monkeypatch.setattr(attention, "features_at_positions", lambda *args: nullcontext())
    theirs, their_gradients = run()
    assert torch.equal(ours, theirs) and our_gradients.keys() == their_gradients.keys()
    assert all(torch.equal(our_gradients[name], gradient) for name, gradient in their_gradients.items())


def test_the_host_is_not_asked_and_no_index_is_made(case, monkeypatch):
    model, packed, inputs = case
    with Waits().counting() as waits:
        attention.packed_forward(model, packed, **inputs).sum().backward()
    assert waits.found == {}
    monkeypatch.setattr(attention, "features_at_positions", lambda *args: nullcontext())
    with Waits().counting() as waits:
        attention.packed_forward(model, packed, **inputs)
    upstream = "transformers/models/llava_next/modeling_llava_next.py"
    asked = {place: count for place, count in waits.places().items() if place.startswith(upstream)}
    assert asked.pop(f"{upstream} get_placeholder_mask") >= 1, "transformers does not look for them any more"
    assert asked == {f"{upstream} pack_image_features": 1}


def test_another_number_of_features_is_refused(case):
    model, packed, inputs = case
    with pytest.raises(ValueError, match="do not match: [0-9]+ and [0-9]+"):
        attention.packed_forward(model, packed, **{**inputs, "image_sizes": [[80, 25]] * 3})


def test_methods_come_back_after_an_error(case):
    model, packed, inputs = case
    inner = model.model
    assert not {"forward", "pack_image_features"} & set(vars(inner))
    own = inner.forward
    inner.forward = hooked = lambda *args, **kwargs: own(*args, **kwargs)  # as accelerate's device hooks do
    attention.packed_forward(model, packed, **inputs)
    assert inner.forward is hooked
    del inner.forward
    with pytest.raises(ValueError):
        attention.packed_forward(model, packed, **{**inputs, "image_sizes": [[80, 25]] * 3})
    assert not {"forward", "pack_image_features"} & set(vars(inner))


def test_every_forward_stays_a_method_of_its_class(case):
    # compressed-tensors wraps `module.forward.__func__` of each module when the first forward of a quantized one begins
    model, packed, inputs = case
    seen = []
    hook = model.lm_head.register_forward_pre_hook(
        lambda *_: seen.append([module.forward.__func__ is type(module).forward for module in model.modules()])
    )
    attention.packed_forward(model, packed, **inputs)
    hook.remove()
    assert len(seen) == 1 and all(seen[0])
    assert not model.model._forward_pre_hooks and "pack_image_features" not in vars(model.model)
