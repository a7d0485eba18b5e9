"""What a training refuses or announces before it starts: see `workflow.check` and `workflow.read_rows`."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.compute as pc
from llamafactory.extras import logging
from llamafactory.extras.misc import calculate_tps

from ..checkpoint.published import check_folder
from ..data import columns
from ..data.conversation import CONVERSATIONS
from ..errors import UserError

logger = logging.get_logger("llamafactory." + __name__)


def refuse_unsupported(config, model_args, data_args) -> None:
    """Raises UserError for a template, model, length or key that this plugin cannot train with.

    config: the model's, as LLaMA-Factory loads it. A local model folder is checked for missing tensors too.
    """
    if data_args.template not in CONVERSATIONS:
        raise UserError(
            f"template: {data_args.template} is not one of the exact LLaVA-1.6 templates "
            f"({', '.join(CONVERSATIONS)}) that plugins: llava_orpo trains with."
        )
    if config.model_type != "llava_next":
        raise UserError(
            f"plugins: llava_orpo serves LLaVA-1.6 (model type llava_next); {model_args.model_name_or_path} is "
            f"{config.model_type!r}. Remove `plugins:` to train it with plain LLaMA-Factory."
        )
    text = config.get_text_config()
    if data_args.cutoff_len > text.max_position_embeddings:
        raise UserError(
            f"cutoff_len: {data_args.cutoff_len} is more than the model's {text.max_position_embeddings} positions."
        )
    if data_args.tokenized_path:
        raise UserError(
            "tokenized_path is not used with plugins: llava_orpo: tokenizing is fast and cached by `datasets`, "
            "and skipped rows are listed at every start. Leave it out."
        )
    if data_args.streaming:
        raise UserError(
            "streaming: true is not supported with plugins: llava_orpo: the held-out split and the image index need "
            "the whole dataset once. Leave it out; nothing but one Arrow copy is written."
        )
    if os.path.isdir(model_args.model_name_or_path) and not model_args.train_from_scratch:
        check_folder(model_args.model_name_or_path)


def fallback_reason(config, model_args, finetuning_args) -> str:
    """Why the shared-prefix step cannot serve a run, or an empty string."""
    text = config.get_text_config()
    if getattr(text, "sliding_window", None) is not None:
        return f"the language model uses a sliding window of {text.sliding_window} tokens"
    if model_args.use_unsloth or model_args.enable_liger_kernel or model_args.shift_attn:
        return "unsloth, liger kernels and shift_attn replace the model's attention or head"
    if finetuning_args.ld_alpha is not None:
        return "ld_alpha needs per-token log-probs of the padded batch"
    return ""


def announce_stock_evaluation(training_args) -> None:
    """Warns that the stock trainer evaluates differently. Raises UserError if the run waits for a metric of ours."""
    if "preference_accuracy" in str(training_args.metric_for_best_model):
        raise UserError(
            "metric_for_best_model: preference_accuracy comes from the plugin's evaluation, which needs the "
            "shared-prefix step. Use metric_for_best_model: rewards/accuracies with shared_prefix: false."
        )
    if training_args.do_eval or training_args.eval_strategy != "no":
        logger.warning_rank0(
            "Without the shared-prefix step evaluations are LLaMA-Factory's own: no preference_eval.json. Score the "
            "result with evals/preference.py, which gives the same numbers as the plugin's evaluation."
        )


def refuse_unusable_rows(rows: dict, arguments, training_args) -> None:
    """Raises UserError for a set without a row, and for text-only pairs on several processes.

    rows: what `get_dataset` returned; arguments: the plugin's.
    """
    if any(part is not None and not len(part) for part in rows.values()):
        raise UserError(f"Every row was skipped; the reasons are in {training_args.output_dir}/skipped_rows.jsonl.")
    if arguments.allow_text_only and training_args.world_size > 1:
        for part in rows.values():
            if "image" in (getattr(part, "column_names", None) or []) and columns.array(part, "image").null_count:
                raise UserError(
                    "Text-only pairs can't be trained on several processes: a rank whose batch has no image "
                    "would leave the others waiting for the projector's gradients. Leave `allow_text_only` out."
                )


def tokens_per_second(rows, metrics: dict[str, float]) -> float:
    """LLaMA-Factory's effective_tokens_per_sec: the tokens of prompt + chosen and prompt + rejected per second."""
    if "chosen_input_ids" in rows.column_names:
        return calculate_tps(rows, metrics, stage="rm")
    lengths = {
        name: pc.list_value_length(columns.array(rows, name)).to_numpy()
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    placeholders = columns.array(rows, "num_image_tokens").to_numpy()
    prompts = lengths["prompt_ids"] + np.maximum(placeholders - 1, 0)
    pairs = zip(prompts + lengths["chosen_ids"], prompts + lengths["rejected_ids"], strict=True)
    return calculate_tps(
        ({"chosen_input_ids": range(chosen), "rejected_input_ids": range(rejected)} for chosen, rejected in pairs),
        metrics,
        stage="rm",
    )
