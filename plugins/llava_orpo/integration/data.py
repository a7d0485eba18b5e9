"""Data: what a recipe with the plugin puts in the place of llamafactory 0.9.5's own (`_swaps` names the places)."""

from __future__ import annotations

import copy
import json
import os

from llamafactory.extras import logging

from .run import current

logger = logging.get_logger("llamafactory." + __name__)


def keep_entries(original):
    def get_dataset_list(dataset_names, dataset_dir):
        from ..data.rlaif_v import read_request

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


def sample_after_filter(original):
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


def align(original):
    def align_dataset(dataset, dataset_attr, data_args, training_args):
        request = getattr(dataset_attr, "llava_orpo", None)
        if request is None:
            return original(dataset, dataset_attr, data_args, training_args)
        from ..data.rlaif_v import align

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


def pair_processor(original):
    def make(template, tokenizer, processor, data_args):
        from ..data.pairs import PairProcessor

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


def drop_skipped(original):
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
    from ..data.skipped import SKIPPED_FILE, write_skipped

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
