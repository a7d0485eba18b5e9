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


@contextmanager
def features_at_positions(model, positions: torch.Tensor) -> Iterator[None]:
    """Inside, a forward of `model` copies its image features to `positions`; the result is bit-identical.

    model: a transformers LlavaNextForConditionalGeneration. positions (P,) int64 on its device: the places of the image
    tokens in its one row, in the order of the images. It sets two methods of the LlavaNextModel inside for the length
    of the call, and touches no class. The forward raises ValueError for another number of features than positions.
    """
    inner = model.model
    before = {name: inner.__dict__.get(name) for name in ("forward", "pack_image_features")}
    forward, pack_image_features = inner.forward, inner.pack_image_features

    def pack_without_waiting(*args, **kwargs):
        with ListsOnHost():
            return pack_image_features(*args, **kwargs)

    def with_features(input_ids, pixel_values, image_sizes, **kwargs):
        embeddings = inner.get_input_embeddings()(input_ids)
        options = {name: value for name, value in kwargs.items() if name.startswith("vision_feature_")}
        features = inner.get_image_features(pixel_values, image_sizes, return_dict=True, **options).pooler_output
        features = torch.cat(features).to(embeddings.device, embeddings.dtype)
        if len(features) != len(positions):
            raise ValueError(f"Image features and image tokens do not match: {len(features)} and {len(positions)}")
        kwargs["inputs_embeds"] = embeddings.index_copy(1, positions, features[None])
        return forward(**kwargs)

    inner.forward, inner.pack_image_features = with_features, pack_without_waiting
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                inner.__dict__.pop(name, None)
            else:
                setattr(inner, name, method)
