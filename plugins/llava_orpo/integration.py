"""The only module that touches LLaMA-Factory's names. Written for and checked against llamafactory 0.9.5.

Official extension points used: register_template, register_mm_plugin, register_dataset_converter. What 0.9.5 has
no extension point for is swapped by name while a recipe with `plugins: llava_orpo` runs, and put back by
`deactivate`: see `_swaps`, which names every place and why.
"""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import llamafactory.data.converter as lf_converter
import llamafactory.data.mm_plugin as lf_mm_plugin
import llamafactory.data.template as lf_template
from llamafactory.extras import logging
from llamafactory.extras.env import VERSION
from transformers import HfArgumentParser

from . import arguments as plugin_arguments
from .arguments import PluginArguments

TESTED_LLAMAFACTORY = "0.9.5"
MM_PLUGIN = "llava_orpo"
VISION_MODULES = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # full names: bare ones are ignored
logger = logging.get_logger("llamafactory." + __name__)


@dataclass
class _Run:
    """State of the recipe that is running."""

    arguments: PluginArguments
    recipe: dict[str, Any]
    originals: list[tuple[Any, str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    considered: int = 0
    shared_prefix: bool = True


_run: _Run | None = None


def take_arguments(parser: HfArgumentParser, args, allow_extra_keys: bool):
    """Takes the plugin's keys out of a recipe (a dict, or a command line), activates the plugin, returns the rest.

    Raises ValueError for unknown keys (the nearest valid key is named), for values that are not allowed, and for
    a LLaMA-Factory version other than the tested one.
    """
    if isinstance(args, dict):
        ours, rest = plugin_arguments.split_keys(args)
        parsed = PluginArguments(**ours)
        if not allow_extra_keys:
            known = {name for dtype in parser.dataclass_types for name in dtype.__dataclass_fields__}
            plugin_arguments.refuse_unknown_keys(list(rest), known)
        recipe = dict(rest)
    else:
        parsed, rest = HfArgumentParser(PluginArguments).parse_args_into_dataclasses(
            args=args, return_remaining_strings=True
        )
        recipe = dict(zip((a.lstrip("-") for a in rest[0::2]), rest[1::2]))
    check_version(parsed)
    if recipe.get("project"):  # transformers' own `project` key reaches Trackio only
        os.environ.setdefault("WANDB_PROJECT", str(recipe["project"]))
    activate(parsed, recipe)
    listen_locally()
    return rest


def listen_locally() -> None:
    """`api` serves 127.0.0.1 unless API_HOST says otherwise (0.9.5 alone: every network interface).

    `webchat` reads GRADIO_SERVER_NAME before its recipe, so there is only a warning when nobody set it.
    """
    os.environ.setdefault("API_HOST", "127.0.0.1")
    if "llamafactory.webui.interface" in sys.modules and "GRADIO_SERVER_NAME" not in os.environ:
        logger.warning_rank0(
            "webchat is about to listen on every network interface, without a password. "
            "Start it with GRADIO_SERVER_NAME=127.0.0.1 to keep it to this machine."
        )


def check_version(parsed: PluginArguments) -> None:
    """Raises ValueError when LLaMA-Factory is not the version this module was written for."""
    if VERSION != TESTED_LLAMAFACTORY:
        message = (
            f"llava_orpo was written for llamafactory {TESTED_LLAMAFACTORY}, but {VERSION} is installed. "
            f"Install llamafactory=={TESTED_LLAMAFACTORY} (see requirements.txt)"
        )
        if not parsed.allow_untested_llamafactory:
            raise ValueError(message + ", or set `allow_untested_llamafactory: true` to try anyway.")
        logger.warning_rank0(message + "; going on because of `allow_untested_llamafactory`.")


def activate(parsed: PluginArguments, recipe: dict[str, Any]) -> None:
    """Registers templates, converter and mm plugin (once per process) and swaps the names in `_swaps`."""
    global _run
    deactivate()
    _register()
    _run = _Run(parsed, recipe, shared_prefix=parsed.shared_prefix)
    for module_name, attribute, make in _swaps():
        module = importlib.import_module(module_name)
        original = getattr(module, attribute)
        _run.originals.append((module, attribute, original))
        setattr(module, attribute, make(original))


def deactivate() -> None:
    """Puts every swapped name back; a recipe without the plugin then runs plain LLaMA-Factory."""
    global _run
    if _run is not None:
        for module, attribute, original in reversed(_run.originals):
            setattr(module, attribute, original)
        _run = None


def current() -> _Run:
    """The running recipe's state. Raises RuntimeError outside of a recipe with the plugin."""
    if _run is None:
        raise RuntimeError("llava_orpo is not active: the recipe needs `plugins: llava_orpo`.")
    return _run


def _register() -> None:
    from .mm_plugin import LlavaOrpoPlugin
    from .rlaif_v import RlaifVConverter
    from .template import exact_templates

    if MM_PLUGIN in lf_mm_plugin.PLUGINS:
        return
    lf_mm_plugin.register_mm_plugin(MM_PLUGIN, LlavaOrpoPlugin)
    lf_converter.register_dataset_converter("rlaif_v", RlaifVConverter)
    for name, template_class in exact_templates().items():
        lf_template.register_template(
            name=name,
            mm_plugin=lf_mm_plugin.get_mm_plugin(name=MM_PLUGIN, image_token="<image>"),
            template_class=template_class,
        )


def _swaps():
    """(module, name, replacement maker): every place where 0.9.5 has no extension point, and why."""
    return [
        # the entry's own `llava_orpo` block and registry name are not kept by DatasetAttr
        ("llamafactory.data.loader", "get_dataset_list", _keep_entries),
        # filter and held-out split come before max_samples; images must not be decoded or written again
        ("llamafactory.data.loader", "_load_single_dataset", _sample_after_filter),
        ("llamafactory.data.loader", "align_dataset", _align),
        # the prompt once per pair; skipped pairs counted and listed
        ("llamafactory.data.loader", "PairwiseDatasetProcessor", _pair_processor),
        ("llamafactory.data.loader", "_get_preprocessed_dataset", _drop_skipped),
        # the step
        ("llamafactory.train.dpo.workflow", "get_dataset", _check_before_data),
        ("llamafactory.train.dpo.workflow", "PairwiseDataCollatorWithPadding", _collator),
        ("llamafactory.train.dpo.trainer", "CustomDPOTrainer", _trainer),
        ("llamafactory.train.tuner", "LogCallback", _log_callback),
        # vision tower and projector stay in 16 bit; tiles; nothing silently random; published names on export
        ("llamafactory.model.patcher", "configure_quantization", _spare_vision),
        ("llamafactory.model.loader", "load_config", _limit_config),
        ("llamafactory.model.loader", "patch_processor", _limit_processor),
        ("llamafactory.train.tuner", "load_model", _published_export),
        ("llamafactory.train.tuner", "load_tokenizer", _untouched_tokenizer_files),
        # answers of chat, webchat and api as the model wrote them
        ("llamafactory.chat.hf_engine", "load_tokenizer", _unedited_answers),
    ]


# data -------------------------------------------------------------------------------------------------------


def _keep_entries(original):
    def get_dataset_list(dataset_names, dataset_dir):
        from .rlaif_v import read_request

        attributes = original(dataset_names, dataset_dir)
        if isinstance(dataset_dir, dict):
            info = dataset_dir
        elif isinstance(dataset_dir, str) and os.path.isfile(os.path.join(dataset_dir, "dataset_info.json")):
            with open(os.path.join(dataset_dir, "dataset_info.json"), encoding="utf-8") as f:
                info = json.load(f)
        else:
            info = {}
        for name, attribute in zip(dataset_names or [], attributes):
            if attribute.formatting == "rlaif_v":
                attribute.llava_orpo = read_request(name, info.get(name, {}), current().arguments)
        return attributes

    return get_dataset_list


def _sample_after_filter(original):
    def _load_single_dataset(dataset_attr, model_args, data_args, training_args):
        request = getattr(dataset_attr, "llava_orpo", None)
        if request is None:
            return original(dataset_attr, model_args, data_args, training_args)
        if data_args.streaming:
            raise ValueError(
                f"{request.name}: `streaming: true` is not supported with formatting rlaif_v: the held-out split and "
                "the image index need the whole dataset once. Leave `streaming` out; nothing but one Arrow copy is "
                "written."
            )
        dataset_attr, data_args = copy.copy(dataset_attr), copy.copy(data_args)
        request.max_samples, data_args.max_samples = data_args.max_samples, None
        request.num_samples, dataset_attr.num_samples = dataset_attr.num_samples, None
        return original(dataset_attr, model_args, data_args, training_args)

    return _load_single_dataset


def _align(original):
    def align_dataset(dataset, dataset_attr, data_args, training_args):
        request = getattr(dataset_attr, "llava_orpo", None)
        if request is None:
            return original(dataset, dataset_attr, data_args, training_args)
        from .rlaif_v import align

        aligned = align(dataset, dataset_attr, data_args, request, data_args.preprocessing_num_workers)
        current().skipped += [dict(entry, stage="reading") for entry in request.skipped]
        current().considered += request.considered
        logger.info_rank0(
            f"{request.name}: {len(aligned)} pairs of {len(dataset)} rows"
            + (f" ({request.part} part, heldout_fraction {current().arguments.heldout_fraction})" if request.part else "")
            + (f"; {len(request.skipped)} rows skipped" if request.skipped else "")
            + "."
        )
        return aligned

    return align_dataset


def _pair_processor(original):
    def make(template, tokenizer, processor, data_args):
        from .pairs import PairProcessor

        if getattr(template, "conversation", None) is None:
            return original(template=template, tokenizer=tokenizer, processor=processor, data_args=data_args)
        return PairProcessor(
            template=template,
            tokenizer=tokenizer,
            processor=processor,
            data_args=data_args,
            shared_prefix=current().shared_prefix,
        )

    return make


def _drop_skipped(original):
    def _get_preprocessed_dataset(dataset, data_args, training_args, *args, **kwargs):
        tokenized = original(dataset, data_args, training_args, *args, **kwargs)
        if tokenized is None or data_args.streaming or "skip" not in (tokenized.column_names or []):
            return tokenized
        reasons = tokenized["skip"]
        ids, names = tokenized["pair_id"], tokenized["dataset"]
        run = current()
        run.skipped += [
            {"stage": "tokenizing", "dataset": name, "pair_id": pair_id, "reason": reason}
            for name, pair_id, reason in zip(names, ids, reasons)
            if reason
        ]
        if any(reasons):
            tokenized = tokenized.select([i for i, reason in enumerate(reasons) if not reason])
        return tokenized.remove_columns("skip")

    return _get_preprocessed_dataset


def report_skipped(folder: str, write: bool) -> None:
    """Lists skipped rows in `<folder>/skipped_rows.jsonl`; ValueError when their share is above the recipe's limit."""
    from .reporting import SKIPPED_FILE, write_skipped

    run = current()
    if not run.skipped:
        return
    path = os.path.join(folder, SKIPPED_FILE)
    if write:
        if os.path.exists(path):
            os.remove(path)
        write_skipped(folder, run.skipped)
    share = len(run.skipped) / max(run.considered, len(run.skipped))
    logger.warning_rank0(f"{len(run.skipped)} pairs skipped ({share:.2%}); each is listed in {path}.")
    limit = run.arguments.max_skipped_fraction
    if share > limit:
        too_long = sum("cutoff_len" in entry["reason"] for entry in run.skipped)
        advice = (
            f"{too_long} of them do not fit cutoff_len: raise it (LLaVA-1.6 needs up to 2,900 tokens for an image; "
            "4096 is safe) or set anyres_max_tiles"
            if too_long
            else "look at the listed reasons"
        )
        raise ValueError(
            f"{len(run.skipped)} of {run.considered} pairs ({share:.1%}) would be skipped, more than "
            f"max_skipped_fraction: {limit}. {advice[0].upper() + advice[1:]}, or raise max_skipped_fraction. "
            f"The list: {path}"
        )


# training ---------------------------------------------------------------------------------------------------


def _check_before_data(original):
    def get_dataset(template, model_args, data_args, training_args, *args, **kwargs):
        from llamafactory.model.loader import load_config

        run = current()
        if getattr(template, "conversation", None) is None:
            from .conversation import CONVERSATIONS

            raise ValueError(
                f"template: {data_args.template} is not one of the exact LLaVA-1.6 templates "
                f"({', '.join(CONVERSATIONS)}) that plugins: llava_orpo trains with."
            )
        config = load_config(model_args)
        if config.model_type != "llava_next":
            raise ValueError(
                f"plugins: llava_orpo serves LLaVA-1.6 (model type llava_next); {model_args.model_name_or_path} is "
                f"{config.model_type!r}. Remove `plugins:` to train it with plain LLaMA-Factory."
            )
        positions = config.get_text_config().max_position_embeddings
        if data_args.cutoff_len > positions:
            raise ValueError(f"cutoff_len: {data_args.cutoff_len} is more than the model's {positions} positions.")
        if data_args.tokenized_path:
            raise ValueError(
                "tokenized_path is not used with plugins: llava_orpo: tokenizing is fast and cached by `datasets`, "
                "and skipped rows are listed at every start. Leave it out."
            )
        _check_model_folder(model_args)
        fallback = _fallback_reason(config, model_args, run)
        if run.shared_prefix and fallback:
            logger.warning_rank0(f"shared_prefix: falling back to LLaMA-Factory's own step: {fallback}.")
            run.shared_prefix = False
        run.skipped, run.considered = [], 0
        module = original(template, model_args, data_args, training_args, *args, **kwargs)
        report_skipped(training_args.output_dir, write=training_args.should_save)
        if run.arguments.allow_text_only and training_args.world_size > 1:
            for rows in module.values():
                if hasattr(rows, "column_names") and "image" in rows.column_names and None in rows["image"]:
                    raise ValueError(
                        "Text-only pairs can't be trained on several processes: a rank whose batch has no image "
                        "would leave the others waiting for the projector's gradients. Leave `allow_text_only` out."
                    )
        return module

    return get_dataset


def _fallback_reason(config, model_args, run: _Run) -> str:
    """Why the shared-prefix step can't serve this run, or an empty string."""
    text = config.get_text_config()
    if getattr(text, "sliding_window", None) is not None:
        return f"the language model uses a sliding window of {text.sliding_window} tokens"
    if model_args.use_unsloth or model_args.enable_liger_kernel or model_args.shift_attn:
        return "unsloth, liger kernels and shift_attn replace the model's attention or head"
    if run.recipe.get("ld_alpha") is not None:
        return "ld_alpha needs per-token log-probs of the padded batch"
    return ""


def _check_model_folder(model_args) -> None:
    from . import checkpoint

    if os.path.isdir(model_args.model_name_or_path) and not model_args.train_from_scratch:
        checkpoint.check_folder(model_args.model_name_or_path)


def _collator(original):
    def make(template, model, tokenizer, processor, **kwargs):
        from .collator import SharedPrefixCollator

        run = current()
        if not run.shared_prefix:
            return original(template=template, model=model, tokenizer=tokenizer, processor=processor, **kwargs)
        return SharedPrefixCollator(
            processor=processor,
            image_token_id=model.config.image_token_id,
            group_by_image=run.arguments.group_pairs_by_image,
            max_pairs_per_image=run.arguments.max_pairs_per_image,
        )

    return make


def _trainer(original):
    from .trainer import SharedPrefixTrainer

    def make(*args, **kwargs):
        run = current()
        if not run.shared_prefix:
            return original(*args, **kwargs)
        return SharedPrefixTrainer(*args, plugin_arguments=run.arguments, **kwargs)

    return make


def _log_callback(original):
    from .reporting import FullLogCallback

    return FullLogCallback


# model ------------------------------------------------------------------------------------------------------


def _spare_vision(original):
    @functools.wraps(original)
    def configure_quantization(config, tokenizer, model_args, is_trainable, init_kwargs):
        original(config, tokenizer, model_args, is_trainable, init_kwargs)
        quantization = init_kwargs.get("quantization_config")
        if hasattr(quantization, "llm_int8_skip_modules") and not current().arguments.quantize_vision:
            quantization.llm_int8_skip_modules = list(VISION_MODULES)

    return configure_quantization


def _limited_pinpoints(pinpoints, tile: int) -> list[list[int]]:
    from .anyres import AnyresGeometry

    limit = current().arguments.anyres_max_tiles
    geometry = AnyresGeometry(tile, 1, tuple(tuple(point) for point in pinpoints))
    return [list(point) for point in geometry.limited(limit).grid_pinpoints]


def _limit_config(original):
    @functools.wraps(original)
    def load_config(model_args):
        config = original(model_args)
        if current().arguments.anyres_max_tiles is not None and config.model_type == "llava_next":
            config.image_grid_pinpoints = _limited_pinpoints(
                config.image_grid_pinpoints, config.vision_config.image_size
            )
        return config

    return load_config


def _limit_processor(original):
    @functools.wraps(original)
    def patch_processor(processor, tokenizer, model_args):
        original(processor, tokenizer, model_args)
        if current().arguments.anyres_max_tiles is not None:
            from .mm_plugin import processor_geometry

            tile = processor_geometry(processor).image_size
            image_processor = processor.image_processor
            image_processor.image_grid_pinpoints = _limited_pinpoints(image_processor.image_grid_pinpoints, tile)

    return patch_processor


def _published_export(original):
    """`llamafactory-cli export` loads through tuner.load_model: the model it gets saves itself in published names."""

    @functools.wraps(original)
    def load_model(tokenizer, model_args, finetuning_args, *args, **kwargs):
        if model_args.export_dir is None or model_args.export_quantization_bit is not None:
            return original(tokenizer, model_args, finetuning_args, *args, **kwargs)
        from . import adapter, checkpoint, checkpoint_files

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


def _untouched_tokenizer_files(original):
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


def _unedited_answers(original):
    """The chat engine decodes with clean_up_tokenization_spaces=True, which turns " ?" into "?" and " 's" into "'s"."""

    @functools.wraps(original)
    def load_tokenizer(model_args):
        module = original(model_args)
        module["tokenizer"].clean_up_tokenization = lambda text: text
        return module

    return load_tokenizer
