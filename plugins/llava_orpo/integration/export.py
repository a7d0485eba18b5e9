"""`llamafactory-cli export`: replacements with which it merges tensor by tensor, in published names. See `SWAPS`."""

from __future__ import annotations

import functools
from pathlib import Path
from unittest import mock

from llamafactory.extras import logging
from peft.tuners.tuners_utils import BaseTuner

from ..checkpoint.adapter import check_adapter
from ..checkpoint.files import check_output, download_weights, resolve_model_dir
from ..checkpoint.merge import NotStreamed, StreamedMerge
from ..checkpoint.published import save_published, write_published
from ..export.model_card import merged_card, push
from .run import current

logger = logging.get_logger("llamafactory." + __name__)
# Keys with which LLaMA-Factory changes the model that it loads, or loads it in another way.
LOADED_DIFFERENTLY = (
    "adapter_folder",
    "mixture_of_depths",
    "quantization_bit",
    "resize_vocab",
    "train_from_scratch",
    "use_kt",
    "use_unsloth",
)


def published_export(original):
    """Replaces llamafactory.train.tuner.load_model, which `llamafactory-cli export` calls.

    The model that export gets saves itself in published names. It is empty (on the meta device) where the merge can
    be done tensor by tensor while it is written; otherwise one line says why the whole model is loaded.
    """

    @functools.wraps(original)
    def load_model(tokenizer, model_args, finetuning_args, *args, **kwargs):
        if not writes_weights(model_args):
            return original(tokenizer, model_args, finetuning_args, *args, **kwargs)
        place = (
            model_args.model_name_or_path,
            model_args.model_revision,
            model_args.cache_dir,
            model_args.hf_hub_token,
        )
        base, adapters = resolve_model_dir(*place), model_args.adapter_name_or_path or []
        overwrite = current().arguments.overwrite_export_dir
        check_output(model_args.export_dir, overwrite)
        for path in adapters:
            check_adapter(path, base)
        name = model_args.export_hub_model_id or Path(model_args.export_dir).resolve().name
        settings = {
            "overwrite": overwrite,
            "texts": {"README.md": merged_card(name, model_args.model_name_or_path, base, adapters)},
        }
        try:
            merge = streamed(model_args, place, base, adapters)
        except NotStreamed as reason:
            logger.info_rank0(f"The whole model is loaded for the merge: {reason}.")
            progress = functools.partialmethod(BaseTuner.merge_and_unload, progressbar=True)  # else silent for minutes
            with mock.patch.object(BaseTuner, "merge_and_unload", progress):
                model = original(tokenizer, model_args, finetuning_args, *args, **kwargs)
            write = functools.partial(save_published, model, base_dir=base, show_progress=True)
        else:
            model, what = merge.skeleton, f"{'merging' if adapters else 'writing'} {Path(model_args.export_dir).name}"

            def write(out_dir, **keys):  # in the dtype that export has cast the empty model to
                fetch = functools.partial(merge.fetch, dtype=model.dtype)
                return write_published(out_dir, merge.base, merge.shapes, fetch, dtype=model.dtype, what=what, **keys)

        def save_pretrained(save_directory, max_shard_size="5GB", **_):
            write(save_directory, max_shard_gb=float(str(max_shard_size).removesuffix("GB")), **settings)

        def push_to_hub(repository, token=None, **_):  # the files that were just written, not a second copy of them
            logger.info_rank0(f"Uploaded: {push(model_args.export_dir, repository, token=token, keep_card=True)}")

        model.save_pretrained, model.push_to_hub = save_pretrained, push_to_hub
        return model

    return load_model


def writes_weights(model_args) -> bool:
    """Whether this is an export of full-precision weights, the only kind that is written here."""
    return model_args.export_dir is not None and model_args.export_quantization_bit is None


def streamed(model_args, place: tuple, base: Path, adapters: list[str]) -> StreamedMerge:
    """The merge, ready to be written tensor by tensor; the base's weights are downloaded if they are not here.

    Raises NotStreamed where the recipe asks for more than that, and what StreamedMerge raises.
    """
    if model_args.export_device != "cpu":
        raise NotStreamed(f"`export_device: {model_args.export_device}` merges on whatever device there is")
    for key in LOADED_DIFFERENTLY:
        if getattr(model_args, key, None):
            raise NotStreamed(f"`{key}` changes how it is loaded")
    return StreamedMerge(base if Path(place[0]).expanduser().is_dir() else download_weights(base, *place), adapters)


def untouched_tokenizer_files(original):
    """Replaces llamafactory.train.tuner.load_tokenizer.

    Export must not rewrite the base model's processor files, which are copied byte by byte, nor upload them again.
    """

    @functools.wraps(original)
    def load_tokenizer(model_args):
        module = original(model_args)
        if writes_weights(model_args):
            for part in module.values():
                if part is not None:
                    part.save_pretrained = part.push_to_hub = lambda *args, **kwargs: None
        return module

    return load_tokenizer
