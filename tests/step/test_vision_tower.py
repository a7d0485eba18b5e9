"""Leaving out vision layers nobody reads changes nothing LLaVA reads."""

from __future__ import annotations

import pytest
import torch

from helpers.llava import make_example, make_image, packed_images, tiny_llava
from helpers.recipes import build_trainer, photo_rows, step, write_rows
from llava_orpo.step.attention import unwrap
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


LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,linear_1",
    "freeze_multi_modal_projector": False,
}
FOUR_BIT = {"quantization_bit": 4, "quantization_method": "bnb"}
REENTRANT = {"disable_gradient_checkpointing": False, "use_reentrant_gc": True}
NOT_REENTRANT = {"disable_gradient_checkpointing": False, "use_reentrant_gc": False}
CASES = {
    "16 bit, reentrant": REENTRANT,
    "16 bit, not reentrant": NOT_REENTRANT,
    "16 bit, not checkpointed": {},
    "4 bit, reentrant": {**FOUR_BIT, **REENTRANT},
    "4 bit, not reentrant": {**FOUR_BIT, **NOT_REENTRANT},
    "LLaMA-Factory's step": {**REENTRANT, "shared_prefix": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_frozen_tower_saves_no_tensor_in_training(tmp_path, case):
    write_rows(tmp_path, photo_rows(1, 1))
    trainer = build_trainer(tmp_path, {**LORA, "bf16": True, **CASES[case]})
    tower = unwrap(trainer.model).model.vision_tower
    saved: dict[str, list[torch.Tensor]] = {"tower": [], "elsewhere": []}
    where, outputs = ["elsewhere"], []

    def pack(tensor):
        saved[where[0]].append(tensor)
        return tensor

    tower.register_forward_pre_hook(lambda *args: where.__setitem__(0, "tower"))
    tower.register_forward_hook(lambda module, args, output: outputs.append(output.hidden_states[-2]))
    tower.register_forward_hook(lambda *args: where.__setitem__(0, "elsewhere"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients = step(trainer, [trainer.train_dataset[0]])[2]
    assert outputs and not any(output.requires_grad for output in outputs)
    assert len(saved["tower"]) == 0 < len(saved["elsewhere"])
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in gradients} == {"q_proj", "linear_1"}
