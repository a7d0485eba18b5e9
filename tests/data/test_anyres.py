"""anyres.py against transformers' own model, processor and image processor."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)

from helpers.drawn import examples
from llava_orpo.data.anyres import AnyresGeometry, processor_geometry

GRID_336 = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # llava-v1.6
GRID_56 = tuple((h // 6, w // 6) for h, w in GRID_336)
GEOMETRIES = {
    "336": AnyresGeometry(336, 14, GRID_336),
    "336, 2 tiles": AnyresGeometry(336, 14, GRID_336).limited(2),
    "56": AnyresGeometry(56, 14, GRID_56),
    "56, 3 tiles": AnyresGeometry(56, 14, GRID_56).limited(3),
    "odd rows": AnyresGeometry(42, 14, ((42, 42), (126, 42), (42, 210), (126, 126))),
    "tile side not a multiple of the patch": AnyresGeometry(30, 14, ((30, 60), (60, 60))),
}
# Sides up to 30,000 pixels, small ones as likely as large ones.
SIDE = st.integers(1, 40) | st.integers(1, 2000) | st.integers(1, 30000)


def make_config(geometry):
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=geometry.image_size,
        patch_size=geometry.patch_size,
    )
    text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=15,
        image_grid_pinpoints=[list(p) for p in geometry.grid_pinpoints],
    )


@pytest.fixture(scope="module")
def models():
    return {name: LlavaNextModel(make_config(geometry)).eval() for name, geometry in GEOMETRIES.items()}


def model_tiles_and_tokens(model, width, height):
    """What the model makes of an image of this size, from vision features of width 1."""
    size = torch.tensor([[height, width]])
    tile = model.config.vision_config.image_size
    tiles = image_size_to_num_patches(size[0], model.config.image_grid_pinpoints, tile)
    features = torch.zeros(tiles, (tile // model.config.vision_config.patch_size) ** 2, 1)
    _, lengths = model.pack_image_features([features], size, "default", torch.zeros(1))
    return tiles, int(lengths[0])


def processor_tokens(geometry, width, height):
    image_processor = LlavaNextImageProcessor(image_grid_pinpoints=[list(p) for p in geometry.grid_pinpoints])
    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)  # only the arithmetic, no tokenizer
    processor.image_processor, processor.patch_size = image_processor, geometry.patch_size
    processor.num_additional_image_tokens = 1
    counted = processor._get_number_of_features(height, width, geometry.image_size, geometry.image_size)
    return counted - 1  # as its __call__ does for the "default" strategy


@pytest.mark.parametrize("name", GEOMETRIES)
@examples(150)
@given(width=SIDE, height=SIDE)
@example(1, 1)
@example(1, 30000)
@example(30000, 1)
@example(336, 336)
@example(333, 1000)
@example(55, 88)  # on the 336 grid 55 * (24 / 88) is 14.999999999999998: the rounding decides
@example(47, 188)  # likewise on the 56 grid
def test_counts_equal_the_model(models, name, width, height):
    geometry = GEOMETRIES[name]
    counted = geometry.num_tiles(width, height), geometry.num_image_tokens(width, height)
    assert counted == model_tiles_and_tokens(models[name], width, height)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_counts_equal_the_model_on_many_random_sizes(models, name):
    draw = random.Random(0)
    for _ in range(2000):
        width, height = (int(10 ** draw.uniform(0, 4.5)) for _ in range(2))
        counted = GEOMETRIES[name].num_tiles(width, height), GEOMETRIES[name].num_image_tokens(width, height)
        assert counted == model_tiles_and_tokens(models[name], width, height), (width, height)


@pytest.mark.parametrize("name", GEOMETRIES)
@examples(150)
@given(width=SIDE, height=SIDE)
def test_the_processor_counts_the_same(name, width, height):
    geometry = GEOMETRIES[name]
    assert geometry.num_image_tokens(width, height) == processor_tokens(geometry, width, height)


def test_every_small_size(models):
    """All sizes up to 60 x 60 on the small grid."""
    model = models["56"]
    for width in range(1, 61):
        for height in range(1, 61):
            counted = (
                GEOMETRIES["56"].num_tiles(width, height),
                GEOMETRIES["56"].num_image_tokens(width, height),
            )
            assert counted == model_tiles_and_tokens(model, width, height), (width, height)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 3), (3, 100), (64, 48), (640, 480), (56, 168)])
@pytest.mark.parametrize("name", ["56", "56, 3 tiles"])
def test_whole_model_and_image_processor(models, name, size):
    """Pixels through the real image processor, vision tower and projector: tiles and features as counted."""
    geometry, model = GEOMETRIES[name], models[name]
    side = geometry.image_size
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=[list(p) for p in geometry.grid_pinpoints],
    )
    inputs = image_processor(Image.new("RGB", size), return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == geometry.num_tiles(*size)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert features[0].shape[0] == geometry.num_image_tokens(*size)


def test_published_checkpoint():
    config = LlavaNextConfig(image_grid_pinpoints=[list(p) for p in GRID_336])
    geometry = AnyresGeometry.from_config(config)
    assert geometry == GEOMETRIES["336"]
    assert geometry.best_resolution(640, 480) == (672, 672) and geometry.num_tiles(640, 480) == 5
    # 24x24 base tile, 36 of 48 feature rows kept, one newline each.
    assert geometry.num_image_tokens(640, 480) == 576 + 36 * 49
    assert geometry.num_image_tokens(672, 672) == 576 + 48 * 49


def test_a_very_long_image_keeps_no_grid_row():
    # 24 rows of features, none of them the image's: only the base tile is left.
    assert GEOMETRIES["336"].num_image_tokens(30000, 1) == 576


def test_an_image_of_which_nothing_is_kept_wastes_the_least():
    points = ((112, 112), (56, 112), (112, 56))
    for width, height in ((30000, 1), (1, 30000)):
        assert AnyresGeometry(56, 14, points).best_resolution(width, height) == (56, 112)
        assert select_best_resolution((height, width), points) == (56, 112)


@pytest.mark.parametrize("size", [{"shortest_edge": 28}, {"height": 28, "width": 28}])
@pytest.mark.parametrize("crop", [None, {"height": 28, "width": 28}])
def test_the_geometry_of_a_processor(size, crop):
    def processor(**changes):
        image_processor = SimpleNamespace(size=size, crop_size=crop, image_grid_pinpoints=[[28, 56], [56, 28]])
        fields = {"image_processor": image_processor, "patch_size": 7, "vision_feature_select_strategy": "default"}
        return SimpleNamespace(**fields | changes)

    expected = AnyresGeometry(28, 7, ((28, 56), (56, 28)))
    assert processor_geometry(processor()) == expected
    assert processor_geometry(processor(vision_feature_select_strategy=None)) == expected
    with pytest.raises(ValueError, match="default"):
        processor_geometry(processor(vision_feature_select_strategy="full"))
    other = SimpleNamespace(size=size, crop_size=crop)
    bare = SimpleNamespace(image_processor=other)
    for lacking in (None, bare, processor(image_processor=other), processor(patch_size=None)):
        with pytest.raises(ValueError, match="no LLaVA-NeXT processor"):
            processor_geometry(lacking)


def test_limited():
    geometry = GEOMETRIES["336"]
    assert geometry.limited(4) == geometry
    assert geometry.limited(3).grid_pinpoints == ((336, 672), (672, 336), (1008, 336), (336, 1008))
    assert geometry.limited(2).grid_pinpoints == ((336, 672), (672, 336))
    assert geometry.limited(2).num_tiles(2000, 2000) == 3
    with pytest.raises(ValueError, match="smallest limit possible is 2"):
        geometry.limited(1)


def test_refusals():
    for size in ((0, 5), (5, -1)):
        with pytest.raises(ValueError, match="no tiles"):
            GEOMETRIES["336"].num_image_tokens(*size)
    for point in ((336, 500), (500, 336), (0, 336), (336, 0), (-336, 336)):
        with pytest.raises(ValueError, match="not whole 336-pixel"):
            AnyresGeometry(336, 14, (point,))
    with pytest.raises(ValueError, match="empty"):
        AnyresGeometry(336, 14, ())
    with pytest.raises(ValueError, match="default"):
        AnyresGeometry(336, 14, GRID_336, "full")


def test_transformers_cannot_pack_the_full_strategy(models):
    """Why "full" is refused: a class token in every tile does not fit the square."""
    features = torch.zeros(3, 24 * 24 + 1, 1)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        models["336"].pack_image_features([features], torch.tensor([[336, 672]]), "full", torch.zeros(1))
