"""Puts image features where the collator says the image's tokens are, without asking the device.

LlavaNextModel looks for the image tokens itself: it indexes the embeddings with a mask of their size to compare two
counts, which waits for the device and makes 24 bytes an element of the image, 2.3 GB for eight images of the 7B. The
packed batch knows the positions, and shapes are known on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..upstream import ListsOnHost

INPUTS = ("input_ids", "pixel_values", "image_sizes")  # LlavaNextModel.forward's first arguments, in its order


@contextmanager
def features_at_positions(model, positions: torch.Tensor) -> Iterator[None]:
    """Inside, a forward of `model` copies its image features to `positions`; the result is bit-identical.

    model: a transformers LlavaNextForConditionalGeneration. positions (P,) int64 on its device: the places of the image
    tokens in its one row, in the order of the images. For the length of the call the LlavaNextModel inside has a hook
    before its forward, and one method of its own; no class is touched. The forward raises ValueError for another number
    of features than positions.
    """
    inner = model.model
    before = inner.__dict__.get("pack_image_features")
    pack_image_features = inner.pack_image_features

    def pack_without_waiting(*args, **kwargs):
        with ListsOnHost():
            return pack_image_features(*args, **kwargs)

    def with_features(_module, args, kwargs):
        kwargs = {**dict(zip(INPUTS, args, strict=False)), **kwargs}
        input_ids, pixel_values, image_sizes = (kwargs.pop(name) for name in INPUTS)
        embeddings = inner.get_input_embeddings()(input_ids)
        options = {name: value for name, value in kwargs.items() if name.startswith("vision_feature_")}
        features = inner.get_image_features(pixel_values, image_sizes, return_dict=True, **options).pooler_output
        features = torch.cat(features).to(embeddings.device, embeddings.dtype)
        if len(features) != len(positions):
            raise ValueError(f"Image features and image tokens do not match: {len(features)} and {len(positions)}")
        return (), {**kwargs, "inputs_embeds": embeddings.index_copy(1, positions, features[None])}

    hook = inner.register_forward_pre_hook(with_features, with_kwargs=True)
    inner.pack_image_features = pack_without_waiting
    try:
        yield
    finally:
        hook.remove()
        if before is None:
            del inner.pack_image_features
        else:
            inner.pack_image_features = before
