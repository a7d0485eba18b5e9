"""LLaVA-NeXT's anyres tiles and image tokens, from an image's width and height alone.

An image is scaled into the grid resolution that keeps most of its pixels, padded, and cut into square tiles; one more
tile, the base, holds the whole image. The model drops the padding from the tiles' features again and ends each feature
row with a newline token (LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next/). The arithmetic, floats
and rounding included, is that of transformers 5.5.4: `select_best_resolution`, `image_size_to_num_patches`,
`unpad_image` and `LlavaNextModel.pack_image_features`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import UserError


@dataclass(frozen=True)
class AnyresGeometry:
    """How one model cuts images into tiles.

    image_size and patch_size are the sides of a tile and of a vision patch, in pixels; grid_pinpoints are the
    resolutions tiles may cover, (height, width) in pixels; select_strategy is the config's
    vision_feature_select_strategy, "default": the vision tower's class token is dropped. ("full" keeps it,
    and then transformers cannot lay a tile's features out as a square.)

    Every positive size has a defined result, 1-pixel sides and any side ratio included; for a very long image
    the padding rows or columns may be all there is, and only the base tile's tokens (and newlines) remain.
    The model and the processor (`LlavaNextProcessor._get_number_of_features`) agree on every size, given the
    same grid.
    """

    image_size: int
    patch_size: int
    grid_pinpoints: tuple[tuple[int, int], ...]
    select_strategy: str = "default"

    def __post_init__(self):
        if self.select_strategy != "default":
            raise ValueError(f'select_strategy must be "default", not {self.select_strategy!r}')
        if not self.grid_pinpoints:
            raise ValueError("image_grid_pinpoints is empty")
        for height, width in self.grid_pinpoints:
            if min(height, width) < 1 or height % self.image_size or width % self.image_size:
                raise ValueError(f"grid pinpoint {height}x{width} is not whole {self.image_size}-pixel tiles")

    @classmethod
    def from_config(cls, config) -> AnyresGeometry:
        """The geometry of a transformers LlavaNextConfig."""
        return cls(
            image_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            grid_pinpoints=tuple((height, width) for height, width in config.image_grid_pinpoints),
            select_strategy=config.vision_feature_select_strategy,
        )

    def best_resolution(self, width: int, height: int) -> tuple[int, int]:
        """The grid resolution, (height, width) in pixels, that an image of this size is scaled into.

        Raises:
            ValueError: a side is not positive.
        """
        if min(width, height) < 1:
            raise ValueError(f"an image of {width}x{height} pixels has no tiles")
        best, best_kept, best_wasted = self.grid_pinpoints[0], 0, math.inf
        for grid_height, grid_width in self.grid_pinpoints:
            scale = min(grid_width / width, grid_height / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = grid_height * grid_width - kept
            if kept > best_kept or (kept == best_kept and wasted < best_wasted):
                best, best_kept, best_wasted = (grid_height, grid_width), kept, wasted
        return best

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles the vision tower sees for an image of this size, the base tile included."""
        return 1 + self._grid_tiles(self.best_resolution(width, height))

    def num_image_tokens(self, width: int, height: int) -> int:
        """Features the model makes of an image of this size: the placeholders the prompt must hold."""
        grid_height, grid_width = self.best_resolution(width, height)
        side = self.image_size // self.patch_size
        rows, columns = grid_height // self.image_size * side, grid_width // self.image_size * side
        # Unpadding: the image fills one side of the grid; the other loses a margin at both ends.
        if width / height > columns / rows:
            filled = int(round(height * (columns / width), 7))
            rows -= (rows - filled) // 2 * 2
        else:
            filled = int(round(width * (rows / height), 7))
            columns -= (columns - filled) // 2 * 2
        return side * side + rows * (columns + 1)

    def limited(self, max_tiles: int) -> AnyresGeometry:
        """The same geometry with only the grid resolutions of at most max_tiles tiles.

        The base tile is not counted: it is always there, so an image then takes at most max_tiles + 1 tiles.
        The model's and the image processor's image_grid_pinpoints must be set to the result's grid_pinpoints.

        Raises:
            ValueError: no resolution is that small.
        """
        kept = tuple(point for point in self.grid_pinpoints if self._grid_tiles(point) <= max_tiles)
        if not kept:
            smallest = min(self._grid_tiles(point) for point in self.grid_pinpoints)
            raise UserError(f"{max_tiles} tiles leave no grid resolution; the smallest limit possible is {smallest}")
        return replace(self, grid_pinpoints=kept)

    def _grid_tiles(self, resolution: tuple[int, int]) -> int:
        return (resolution[0] // self.image_size) * (resolution[1] // self.image_size)


def processor_geometry(processor) -> AnyresGeometry:
    """The anyres geometry a LlavaNextProcessor implies.

    Raises ValueError when the processor is not LLaVA-NeXT's, naming what is missing.
    """
    image_processor = getattr(processor, "image_processor", None)
    pinpoints = getattr(image_processor, "image_grid_pinpoints", None)
    if not pinpoints or getattr(processor, "patch_size", None) is None:
        raise UserError(
            "The model's folder has no LLaVA-NeXT processor (image_grid_pinpoints, patch_size). Use a checkpoint in "
            "the llava-hf layout, e.g. llava-hf/llava-v1.6-mistral-7b-hf, with its processor files."
        )
    size = image_processor.crop_size or image_processor.size
    return AnyresGeometry(
        image_size=size["height"] if "height" in size else size["shortest_edge"],
        patch_size=processor.patch_size,
        grid_pinpoints=tuple(tuple(point) for point in pinpoints),
        select_strategy=processor.vision_feature_select_strategy or "default",
    )
