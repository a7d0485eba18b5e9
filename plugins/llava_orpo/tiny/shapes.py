"""Shapes of LLaVA-NeXT models, from tiny to the real 7B. This module needs torch and transformers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

PATCH = 14


@dataclass(frozen=True)
class Geometry:
    """Widths and depths; tile is in pixels.

    text = (hidden, intermediate, layers, heads, key-value heads), vision = (hidden, intermediate, layers, heads).
    """

    text: tuple[int, int, int, int, int]
    vision: tuple[int, int, int, int]
    tile: int = 336

    @property
    def pinpoints(self) -> list[list[int]]:
        """The published five grids, (height, width) in pixels."""
        return [[self.tile * h, self.tile * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


GEOMETRIES = {
    "tiny": Geometry((128, 384, 2, 4, 2), (64, 128, 3, 2)),
    "mid": Geometry((512, 1408, 8, 8, 4), (256, 1024, 6, 4)),
    "slice7b": Geometry((4096, 14336, 2, 32, 8), (1024, 4096, 3, 16)),
    "7b": Geometry((4096, 14336, 32, 32, 8), (1024, 4096, 24, 16)),
}


def config(geometry: Geometry) -> LlavaNextConfig:
    """A llava_next config of this geometry with everything else as published."""
    hidden, inner, layers, heads, kv_heads = geometry.text
    v_hidden, v_inner, v_layers, v_heads = geometry.vision
    return LlavaNextConfig(
        text_config=MistralConfig(
            vocab_size=32064,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=32768,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            sliding_window=None,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=32001,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=v_hidden,
            intermediate_size=v_inner,
            num_hidden_layers=v_layers,
            num_attention_heads=v_heads,
            image_size=geometry.tile,
            patch_size=PATCH,
            projection_dim=768,
        ),
        image_grid_pinpoints=geometry.pinpoints,
        image_token_index=32000,
        image_token_id=32000,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


@torch.no_grad()
def draw(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fills a weight by its name, in place: matrices normal with deviation 0.02, norms 1, biases 0; returns it."""
    if name.endswith("bias"):
        return tensor.zero_()
    if "norm" in name or "layrnorm" in name:  # CLIP spells one of its norms so
        return tensor.fill_(1.0)
    return tensor.normal_(0.0, 0.02, generator=generator)
