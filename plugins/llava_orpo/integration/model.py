"""Model and processor: the replacements for quantization, tiles, export and chat. See `swaps.SWAPS`."""

from __future__ import annotations

import functools
from unittest import mock

from peft.tuners.tuners_utils import BaseTuner

from ..checkpoint.adapter import check_adapter
from ..checkpoint.files import check_output, resolve_model_dir
from ..checkpoint.published import save_published
from ..data.anyres import AnyresGeometry, processor_geometry
from .run import current

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


def published_export(original):
    """Replaces llamafactory.train.tuner.load_model, which `llamafactory-cli export` calls.

    The model that export gets saves itself in published names.
    """

    @functools.wraps(original)
    def load_model(tokenizer, model_args, finetuning_args, *args, **kwargs):
        if model_args.export_dir is None or model_args.export_quantization_bit is not None:
            return original(tokenizer, model_args, finetuning_args, *args, **kwargs)
        base = resolve_model_dir(
            model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.hf_hub_token
        )
        overwrite = current().arguments.overwrite_export_dir
        check_output(model_args.export_dir, overwrite)
        for path in model_args.adapter_name_or_path or []:
            check_adapter(path, base)
        merge = functools.partialmethod(BaseTuner.merge_and_unload, progressbar=True)  # else silent for minutes
        with mock.patch.object(BaseTuner, "merge_and_unload", merge):
            model = original(tokenizer, model_args, finetuning_args, *args, **kwargs)

        def save_pretrained(save_directory, max_shard_size="5GB", **_):
            gigabytes = float(str(max_shard_size).removesuffix("GB"))
            save_published(model, save_directory, base, max_shard_gb=gigabytes, overwrite=overwrite, show_progress=True)

        model.save_pretrained = save_pretrained
        return model

    return load_model


def untouched_tokenizer_files(original):
    """Replaces llamafactory.train.tuner.load_tokenizer.

    Export must not rewrite the base model's processor files, which `save_published` copies byte by byte.
    """

    @functools.wraps(original)
    def load_tokenizer(model_args):
        module = original(model_args)
        if model_args.export_dir is not None and model_args.export_quantization_bit is None:
            for part in module.values():
                if part is not None:
                    part.save_pretrained = lambda *args, **kwargs: None
        return module

    return load_tokenizer


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
