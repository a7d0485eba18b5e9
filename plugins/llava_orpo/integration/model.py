"""Model and processor: the replacements for quantization, tiles, dtypes and chat. See `swaps.SWAPS`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch

from ..data.anyres import AnyresGeometry, processor_geometry
from .run import UNSET, current

HALF = (torch.float16, torch.bfloat16)
VISION_MODULES = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # full names: bare ones are ignored


def spare_vision(original):
    """Replaces llamafactory.model.patcher.configure_quantization."""

    @functools.wraps(original)
    def configure_quantization(config, tokenizer, model_args, is_trainable, init_kwargs):
        original(config, tokenizer, model_args, is_trainable, init_kwargs)
        quantization = init_kwargs.get("quantization_config")
        if hasattr(quantization, "llm_int8_skip_modules") and not current().arguments.quantize_vision:
            quantization.llm_int8_skip_modules = list(VISION_MODULES)

    return configure_quantization


def _limited_pinpoints(pinpoints, tile: int) -> list[list[int]]:
    limit = current().arguments.anyres_max_tiles
    geometry = AnyresGeometry(tile, 1, tuple(tuple(point) for point in pinpoints))
    return [list(point) for point in geometry.limited(limit).grid_pinpoints]


def limit_config(original):
    """Replaces llamafactory.model.loader.load_config."""

    @functools.wraps(original)
    def load_config(model_args):
        if current().precision is UNSET:  # later LLaMA-Factory fills in a guess
            current().precision = model_args.compute_dtype
        config = original(model_args)
        if current().arguments.anyres_max_tiles is not None and config.model_type == "llava_next":
            config.image_grid_pinpoints = _limited_pinpoints(
                config.image_grid_pinpoints, config.vision_config.image_size
            )
        return config

    return load_config


def limit_processor(original):
    """Replaces llamafactory.model.loader.patch_processor."""

    @functools.wraps(original)
    def patch_processor(processor, tokenizer, model_args):
        original(processor, tokenizer, model_args)
        if current().arguments.anyres_max_tiles is not None:
            tile = processor_geometry(processor).image_size
            image_processor = processor.image_processor
            image_processor.image_grid_pinpoints = _limited_pinpoints(image_processor.image_grid_pinpoints, tile)

    return patch_processor


def one_dtype(original):
    """Replaces llamafactory.model.loader.init_adapter.

    LLaMA-Factory loads every weight in the dtype that the checkpoint's config names, whatever the recipe says. A model
    whose embeddings are float16 and whose layers compute in bfloat16 would hold its hidden states in float32.
    """

    @functools.wraps(original)
    def init_adapter(config, model, model_args, finetuning_args, is_trainable):
        dtype, only = current().precision, HALF
        if dtype in (None, UNSET) and not is_trainable and model_args.infer_dtype != "auto":
            dtype, only = getattr(torch, model_args.infer_dtype), (*HALF, torch.float32)
        model = original(config, model, model_args, finetuning_args, is_trainable)
        if isinstance(dtype, torch.dtype):
            frozen = [not is_trainable or not parameter.requires_grad for parameter in model.parameters()]
            cast(itertools.compress(model.named_parameters(), frozen), dtype, only)
            if not is_trainable:
                name_dtype(model.config, dtype)
        return model

    return init_adapter


def cast(weights: Iterable[tuple[str, torch.nn.Parameter]], dtype: torch.dtype, only: tuple[torch.dtype, ...]) -> None:
    """Casts those of the named weights that have a dtype of `only`.

    Left as they are: packed weights of a quantized model, what ZeRO-3 has partitioned, and adapters, which are float32
    beside any base.
    """
    for name, parameter in weights:
        plain = type(parameter) is torch.nn.Parameter and not hasattr(parameter, "ds_id") and "lora_" not in name
        if plain and parameter.dtype in only:
            parameter.data = parameter.data.to(dtype)


def name_dtype(config, dtype: torch.dtype) -> None:
    """Sets the dtype that a config names, for its parts too: the published one names two."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype


def unedited_answers(original):
    """Replaces llamafactory.chat.hf_engine.load_tokenizer.

    The engine decodes with clean_up_tokenization_spaces=True, which turns " ?" into "?" and " 's" into "'s".
    """

    @functools.wraps(original)
    def load_tokenizer(model_args):
        module = original(model_args)
        module["tokenizer"].clean_up_tokenization = lambda text: text
        return module

    return load_tokenizer
