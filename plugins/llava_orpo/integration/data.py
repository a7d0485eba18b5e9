"""Data: the replacements for functions of llamafactory 0.9.5's data loader. See `swaps.SWAPS`."""

from __future__ import annotations

import copy
import json
import os

import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from llamafactory.data import loader
from llamafactory.extras import logging
from pyarrow import ArrowInvalid

from ..data import columns, json_rows, message_rows, parquet_rows, rlaif_v
from ..data.other_formats import leave_out_strange_paths
from ..data.pairs import PairProcessor
from ..data.skipped import stop_at_bad_row
from ..data.template import ExactTemplate
from ..errors import UserError
from .run import current

logger = logging.get_logger("llamafactory." + __name__)


def keep_entries(original):
    """Replaces llamafactory.data.loader.get_dataset_list."""

    def get_dataset_list(dataset_names, dataset_dir):
        attributes = original(dataset_names, dataset_dir)
        if isinstance(dataset_dir, dict):
            info = dataset_dir
        elif isinstance(dataset_dir, str) and os.path.isfile(os.path.join(dataset_dir, "dataset_info.json")):
            with open(os.path.join(dataset_dir, "dataset_info.json"), encoding="utf-8") as f:
                info = json.load(f)
        else:
            info = {}
        for name, attribute in zip(dataset_names or [], attributes, strict=True):
            if attribute.formatting == "rlaif_v" or attribute.formatting in message_rows.READERS:
                attribute.llava_orpo = rlaif_v.read_request(name, info.get(name, {}), current().arguments)
                attribute.llava_orpo.formatting = attribute.formatting
        return attributes

    return get_dataset_list


def sample_after_filter(original):
    """Replaces llamafactory.data.loader._load_single_dataset."""

    def _load_single_dataset(dataset_attr, model_args, data_args, training_args):
        request = getattr(dataset_attr, "llava_orpo", None)
        if request is None:
            return original(dataset_attr, model_args, data_args, training_args)
        dataset_attr, data_args = copy.copy(dataset_attr), copy.copy(data_args)
        request.max_samples, data_args.max_samples = data_args.max_samples, None
        request.num_samples, dataset_attr.num_samples = dataset_attr.num_samples, None
        files = json_rows.files_of(dataset_attr, data_args.dataset_dir)
        if files and not data_args.streaming:  # row by row: one odd row must not stop the whole file
            image_column = rlaif_v.image_column(dataset_attr, request)
            plain = message_rows.PLAIN_TEXTS.get(request.formatting, json_rows.TEXTS)
            dataset = json_rows.load(files, image_column, model_args.cache_dir, plain)
            return loader.align_dataset(dataset, dataset_attr, data_args, training_args)
        try:
            parquet = request.arguments.image_storage == "parquet" and not data_args.streaming
            if parquet and request.formatting != "rlaif_v":
                logger.warning_rank0(
                    f"image_storage: parquet serves `formatting: rlaif_v` alone; the images of {request.name} are read "
                    "from the Arrow copy that `datasets` makes."
                )
            elif parquet:
                dataset, request.held = parquet_rows.load(request.name, dataset_attr, model_args, data_args)
                return loader.align_dataset(dataset, dataset_attr, data_args, training_args)
            return original(dataset_attr, model_args, data_args, training_args)
        except (DatasetGenerationError, ArrowInvalid) as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise UserError(
                f"{request.name}: its files cannot be read ({cause}); download or write them again."
            ) from error

    return _load_single_dataset


def align(original):
    """Replaces llamafactory.data.loader.align_dataset."""

    def align_dataset(dataset, dataset_attr, data_args, training_args):
        request = getattr(dataset_attr, "llava_orpo", None)
        if request is None:
            if data_args.streaming:
                return original(dataset, dataset_attr, data_args, training_args)
            current().considered += len(dataset)
            dataset, skipped = leave_out_strange_paths(dataset, dataset_attr, data_args, str(dataset_attr))
            note(skipped, "reading")
            if not len(dataset):
                raise UserError(f"{dataset_attr}: every row is unusable. The first reason: {skipped[0]['reason']}")
            return original(dataset, dataset_attr, data_args, training_args)
        try:
            aligned = rlaif_v.align(dataset, dataset_attr, data_args, request, data_args.preprocessing_num_workers)
        finally:  # it raises UserError when no row is left; the list is wanted then too
            note(request.skipped, "reading")
        current().considered += request.considered
        logger.info_rank0(
            f"{request.name}: {len(aligned)} pairs of {len(dataset)} rows"
            + (
                f" ({request.part} part, heldout_fraction {current().arguments.heldout_fraction})"
                if request.part
                else ""
            )
            + (f"; {len(request.skipped)} rows skipped" if request.skipped else "")
            + "."
        )
        return aligned

    return align_dataset


def tokenize(original):
    """Replaces llamafactory.data.loader._get_preprocessed_dataset for pairs in an exact template.

    `PairProcessor` tokenizes; the rows that it marks are dropped and noted.
    """

    def _get_preprocessed_dataset(
        dataset, data_args, training_args, stage, template, tokenizer, processor=None, is_eval=False
    ):
        if dataset is None or stage != "rm" or not isinstance(template, ExactTemplate):
            return original(dataset, data_args, training_args, stage, template, tokenizer, processor, is_eval)
        run = current()
        pairs = PairProcessor(template, tokenizer, processor, data_args, shared_prefix=run.shared_prefix)
        tokenized = dataset.map(
            pairs.preprocess_dataset,
            batched=True,
            batch_size=data_args.preprocessing_batch_size,
            remove_columns=dataset.column_names,
            num_proc=data_args.preprocessing_num_workers,
            load_from_cache_file=not data_args.overwrite_cache or training_args.local_process_index != 0,
            desc="Running tokenizer on dataset",
        )
        tokenized, skipped = drop_skipped(tokenized)
        note(skipped, "tokenizing")
        if training_args.should_log and len(tokenized):
            print("eval example:" if is_eval else "training example:")
            pairs.print_data_example(tokenized[0])
        return tokenized

    return _get_preprocessed_dataset


def drop_skipped(tokenized):
    """(the good pairs, entries of skipped_rows.jsonl for the others) of a dataset that `PairProcessor` made."""
    reasons = columns.array(tokenized, "skip")
    bad = pc.not_equal(reasons, "").to_numpy()
    if not bad.any():
        return tokenized.remove_columns("skip"), []
    left_out = tokenized.select(np.flatnonzero(bad))
    named = {key: columns.values(left_out, key) for key in ("dataset", "row", "pair_id")}
    named["reason"] = columns.values(left_out, "skip")
    skipped = [dict(zip(named, entry, strict=True)) for entry in zip(*named.values(), strict=True)]
    return tokenized.select(np.flatnonzero(~bad)).remove_columns("skip"), skipped


def note(skipped, stage: str) -> None:
    """Adds rows to the run's list. Raises UserError for the first of them under `bad_rows: error`."""
    run = current()
    run.skipped += [{"stage": stage, **entry} for entry in skipped]
    stop_at_bad_row(skipped, run.arguments.bad_rows)
