"""Leaves out the vision layers whose output LLaVA never reads, or freezes them in a tower that is trained.

LLaVA takes hidden state -2 of CLIP, so the last layer is computed for nothing, and never gets a gradient. This module
needs only torch.
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
    unread = _unread_layers(model)
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


def freeze_unread_parameters(model) -> list[str]:
    """Freezes the trainable parameters of the vision tower that LLaVA never reads; returns their names.

    model: a LlavaNextForConditionalGeneration. These are the layers after `vision_feature_layer` and the norm of the
    pooled output. They never get a gradient, for which DDP would wait.
    """
    tower = model.model.vision_tower
    pooled = getattr(getattr(tower, "vision_model", tower), "post_layernorm", None)
    unread = {id(p) for module in [*_unread_layers(model), pooled] if module is not None for p in module.parameters()}
    names = [name for name, p in tower.named_parameters() if p.requires_grad and id(p) in unread]
    for parameter in tower.parameters():
        if id(parameter) in unread:
            parameter.requires_grad_(False)
    return names


def _unread_layers(model) -> list:
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    read = model.config.vision_feature_layer
    read = [read] if isinstance(read, int) else read
    # hidden_states holds the embeddings and each layer's output: one entry more than there are layers.
    last_read = max(index % (len(layers) + 1) for index in read)
    # FSDP1 wraps each layer. transformers records hidden states at the layer inside: one that is not called there would
    # be missing, and LLaVA would read another layer's output.
    return [getattr(layer, "module", layer) for layer in layers[last_read:]]


def _pass_on(hidden_states, *args, **kwargs):
    return hidden_states
