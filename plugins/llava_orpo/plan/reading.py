"""Tokenizes a recipe's pairs as its training would, to read their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import autoload
from .sizes import Data, sizes_of

# Keys of a GPU, of several processes or of later steps: without them a CPU reads a recipe's data as training does.
NOT_FOR_READING = ("bf16", "fp16", "pure_bf16", "quantization_bit", "deepspeed", "fsdp", "fsdp_config", "eval_strategy")
NOT_FOR_READING += ("eval_dataset", "eval_steps", "do_eval", "load_best_model_at_end", "resume_from_checkpoint")


def read(recipe: Mapping[str, Any], config, sample: int = 0) -> Data:
    """Sizes of the recipe's training pairs, tokenized as training does; needs model folder and data on this machine."""
    data = sizes_of(tokenized(recipe, sample)[0], recipe, config)
    return replace(data, source=f"{data.source} (the first {sample:,})") if sample else data


def tokenized(recipe: Mapping[str, Any], sample: int = 0) -> tuple[Any, dict[str, Any]]:
    """(training rows, {"tokenizer", "processor"}) of a recipe, without loading the model."""
    autoload.install()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    from ..integration import run
    from ..training import workflow

    keys = {key: value for key, value in recipe.items() if key not in NOT_FOR_READING}
    keys.update(do_train=True, report_to="none", use_cpu=True, overwrite_output_dir=True)
    if sample:
        keys["max_samples"] = sample
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(keys)
    workflow.check(run.current(), model_args, data_args, training_args, finetuning_args)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    rows = workflow.read_rows(run.current(), template, module, model_args, data_args, training_args)
    return rows["train_dataset"], module
