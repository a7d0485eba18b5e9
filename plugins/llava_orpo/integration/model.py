"""Model and processor: quantization, tiles, export, chat. See `_swaps`."""

from __future__ import annotations

import functools

from .run import current

VISION_MODULES = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # full names: bare ones are ignored


def spare_vision(original):
    @functools.wraps(original)
    def configure_quantization(config, tokenizer, model_args, is_trainable, init_kwargs):
        original(config, tokenizer, model_args, is_trainable, init_kwargs)
        quantization = init_kwargs.get("quantization_config")
        if hasattr(quantization, "llm_int8_skip_modules") and not current().arguments.quantize_vision:
            quantization.llm_int8_skip_modules = list(VISION_MODULES)

    return configure_quantization


def _limited_pinpoints(pinpoints, tile: int) -> list[list[int]]:
    from ..data.anyres import AnyresGeometry

    limit = current().arguments.anyres_max_tiles
    geometry = AnyresGeometry(tile, 1, tuple(tuple(point) for point in pinpoints))
    return [list(point) for point in geometry.limited(limit).grid_pinpoints]


def limit_config(original):
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
    @functools.wraps(original)
    def patch_processor(processor, tokenizer, model_args):
        original(processor, tokenizer, model_args)
        if current().arguments.anyres_max_tiles is not None:
            from ..data.anyres import processor_geometry

            tile = processor_geometry(processor).image_size
            image_processor = processor.image_processor
            image_processor.image_grid_pinpoints = _limited_pinpoints(image_processor.image_grid_pinpoints, tile)

    return patch_processor


def published_export(original):
    """`llamafactory-cli export` loads through tuner.load_model: the model it gets saves itself in published names."""

    @functools.wraps(original)
    def load_model(tokenizer, model_args, finetuning_args, *args, **kwargs):
        if model_args.export_dir is None or model_args.export_quantization_bit is not None:
            return original(tokenizer, model_args, finetuning_args, *args, **kwargs)
        from ..checkpoint import adapter
        from ..checkpoint import files as checkpoint_files
        from ..checkpoint import published as checkpoint

        base = checkpoint_files.resolve_model_dir(
            model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.hf_hub_token
        )
        overwrite = current().arguments.overwrite_export_dir
        checkpoint_files.check_output(model_args.export_dir, overwrite)
        for path in model_args.adapter_name_or_path or []:
            adapter.check_adapter(path, base)
        model = original(tokenizer, model_args, finetuning_args, *args, **kwargs)

        def save_pretrained(save_directory, max_shard_size="5GB", **_):
            gigabytes = float(str(max_shard_size).removesuffix("GB"))
            checkpoint.save_published(model, save_directory, base, max_shard_gb=gigabytes, overwrite=overwrite)

        model.save_pretrained = save_pretrained
        return model

    return load_model


def untouched_tokenizer_files(original):
    """Export must not rewrite the base model's processor files: `save_published` copies them byte by byte."""

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
    """The chat engine decodes with clean_up_tokenization_spaces=True, which turns " ?" into "?" and " 's" into "'s"."""

    @functools.wraps(original)
    def load_tokenizer(model_args):
        module = original(model_args)
        module["tokenizer"].clean_up_tokenization = lambda text: text
        return module

    return load_tokenizer
