"""Leaves out the vision layers whose output LLaVA never reads.

LLaVA takes hidden state -2 of CLIP, so the last layer is computed for nothing. This module needs only torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def skip_unread_vision_layers(model) -> Iterator[int]:
    """Inside the context, layers after `vision_feature_layer` hand their input on; yields how many those are.

    model: a transformers LlavaNextForConditionalGeneration (unwrap PEFT and DDP first). The features LLaVA
    reads are bit-identical; only the tower's `last_hidden_state` and pooled output differ, which nothing in LLaVA
    reads. It works on the layer instances and touches no upstream class; each layer gets its own `forward` back
    even after an error. Raises ValueError when a parameter of the vision tower is trainable.
    """
    tower = model.model.vision_tower
    trainable = next((name for name, p in tower.named_parameters() if p.requires_grad), None)
    if trainable is not None:
        raise ValueError(f"the vision tower is being trained ({trainable}): its layers cannot be left out")
    layers = getattr(tower, "vision_model", tower).encoder.layers
    read = model.config.vision_feature_layer
    read = [read] if isinstance(read, int) else read
    # hidden_states holds the embeddings and each layer's output: one entry more than there are layers.
    last_read = max(index % (len(layers) + 1) for index in read)
    unread = list(layers[last_read:])
    before = [layer.__dict__.get("forward") for layer in unread]  # accelerate's device hooks set one
    try:
        for layer in unread:
            layer.forward = _pass_on
        yield len(unread)
    finally:
        for layer, forward in zip(unread, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _pass_on(hidden_states, *args, **kwargs):
    return hidden_states
