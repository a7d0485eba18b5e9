"""Images as LLaMA-Factory's multimodal plugin: image tokens and pixel_values as LLaVA-1.6 makes them.

Differences from the stock LlavaNextPlugin: images reach the processor at their original size (they are not shrunk to
768*768 pixels), as RGB without EXIF rotation; the number of image tokens comes from width and height alone; a reference
(see `image_store`) is read where the pixels are needed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

from llamafactory.data.mm_plugin import BasePlugin

from .anyres import processor_geometry
from .image_store import image_size, load_image

PLACEHOLDER = "<image>"  # LLaMA-Factory's IMAGE_PLACEHOLDER, what chat and api put before a question


def without_placeholder(text: str) -> str:
    """The text without its first image placeholder and the line break after it; a second one is the user's own words.

    The template writes the image where the checkpoint wants it.
    """
    before, _, after = text.partition(PLACEHOLDER)
    return before + after.removeprefix("\n")


@dataclass
class LlavaOrpoPlugin(BasePlugin):
    """LLaMA-Factory multimodal plugin (register_mm_plugin) for the exact LLaVA-1.6 templates."""

    def process_messages(self, messages, images, videos, audios, processor):
        """Takes the image placeholder out of the first user turn and notes the number of its image tokens.

        Raises ValueError for more than one image or an image in a later turn.
        """
        self._validate_input(processor, images, videos, audios)
        messages = deepcopy(messages)
        if len(images) > 1:
            raise ValueError("LLaVA-1.6 was trained with one image per conversation; got " + str(len(images)) + ".")
        if images:
            holders = [i for i, message in enumerate(messages) if PLACEHOLDER in message["content"]]
            if holders and holders[0] != 0:
                raise ValueError("The image must be in the first user turn.")
            if holders:
                messages[0]["content"] = without_placeholder(messages[0]["content"])
            count = processor_geometry(processor).num_image_tokens(*image_size(images[0]))
            messages[0]["image_tokens"] = [count if self.expand_mm_tokens else 1]  # vLLM repeats the placeholder itself
        return messages

    def _regularize_images(self, images, **kwargs):
        return {"images": [load_image(image) for image in images]}

    def _get_mm_inputs(self, images, videos, audios, processor, imglens=None):
        """pixel_values (num_images, max tiles, 3, tile, tile) and image_sizes (num_images, 2) as (height, width)."""
        if not images:
            return {}
        pictures = self._regularize_images(images)["images"]
        return dict(processor.image_processor(pictures, return_tensors="pt"))
