"""What a training refuses or announces before it starts: see `workflow.check` and `workflow.read_rows`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from llamafactory.extras import logging
from llamafactory.extras.misc import calculate_tps

from .. import loss_keys
from ..checkpoint.published import check_folder
from ..data import columns
from ..data.conversation import CONVERSATIONS
from ..errors import UserError
from ..precheck import recompute_problems, too_many_layers
from ..step.attention import unwrap
from ..step.vision_tower import freeze_unread_parameters

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
            "the whole dataset once. Leave it out; with `image_storage: parquet` not even one Arrow copy of the images "
            "is written."
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


def announce_flash_attention(model_args) -> None:
    """Says what LLaMA-Factory's `flash_attn: fa2` or `fa3` does under the shared-prefix step."""
    name = getattr(model_args.flash_attn, "value", model_args.flash_attn)
    if name in ("fa2", "fa3"):
        logger.info_rank0(
            f"flash_attn: {name} serves the vision tower alone: the shared-prefix step attends through SDPA, whose own "
            "flash kernel runs the shared part, or as attention_backend says."
        )


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


def refuse_unsupported_loading(training_args) -> None:
    """Raises UserError for ways to deal out batches that the shared-prefix batches do not go through."""
    if training_args.accelerator_config.dispatch_batches:
        raise UserError(
            "accelerator_config: dispatch_batches: true can't send packed batches to other processes. Leave it out: "
            "every process then reads its own batches."
        )
    if training_args.train_sampling_strategy == "group_by_length":
        raise UserError(
            "train_sampling_strategy: group_by_length is not supported with plugins: llava_orpo, whose packed batches "
            "have no padding to save. Leave it out, or use group_pairs_by_image: true."
        )


def settle_recompute(config, arguments, model_args, training_args) -> None:
    """Lets `recompute: none` be LLaMA-Factory's `disable_gradient_checkpointing`.

    Raises UserError for a `recompute` that contradicts LLaMA-Factory's keys, or of more layers than the model has.
    """
    keys = {**vars(model_args), "gradient_checkpointing": training_args.gradient_checkpointing}
    if problems := recompute_problems({**keys, "recompute": arguments.recompute}):
        raise UserError(*problems)
    layers = config.get_text_config().num_hidden_layers
    if arguments.recompute.isdecimal() and int(arguments.recompute) > layers:
        raise UserError(too_many_layers(int(arguments.recompute), layers))
    if arguments.recompute in ("none", "0"):
        model_args.disable_gradient_checkpointing = True


def refuse_other_sharding(training_args) -> None:
    """Raises UserError for a DeepSpeed checkpoint that so many processes can't load."""
    folder = training_args.resume_from_checkpoint
    if not training_args.deepspeed or not isinstance(folder, str):
        return
    saved = {file.name for file in Path(folder).glob("global_step*/*zero_pp_rank_*_optim_states.pt")}
    if saved and len(saved) != training_args.world_size:
        raise UserError(
            f"resume_from_checkpoint: {folder} was saved by DeepSpeed on {len(saved)} processes, and its state is cut "
            f"into as many parts; this run has {training_args.world_size}. Start {len(saved)} processes, or continue "
            f"from the adapter alone: `adapter_name_or_path: {folder}` without resume_from_checkpoint."
        )


def freeze_unread(model) -> None:
    """Freezes and names the trainable parameters of a vision tower that LLaVA never reads."""
    names = freeze_unread_parameters(unwrap(model))
    if names:
        logger.warning_rank0(
            f"{len(names)} parameters of the vision tower are frozen, because LLaVA never reads what they compute: "
            f"{', '.join(names)}."
        )


def refuse_unusable_rows(rows: dict, run, training_args) -> None:
    """Raises UserError for a set without a row, and for text-only pairs of the stock step on several processes.

    rows: what `get_dataset` returned; run: the running recipe (`integration.run.Run`).
    """
    if any(part is not None and not len(part) for part in rows.values()):
        raise UserError(f"Every row was skipped; the reasons are in {training_args.output_dir}/skipped_rows.jsonl.")
    if run.arguments.allow_text_only and training_args.world_size > 1 and not run.shared_prefix:
        for part in rows.values():
            if "image" in (getattr(part, "column_names", None) or []) and columns.array(part, "image").null_count:
                raise UserError(
                    "LLaMA-Factory's own step can't train text-only pairs on several processes: a rank whose batch "
                    "has no image would leave the others waiting for the projector's gradients. Leave "
                    "`allow_text_only` out, or set `shared_prefix: true`."
                )


def refuse_loss(arguments, finetuning_args, stock_because: str) -> None:
    """Raises UserError for keys of the loss that the run cannot serve.

    arguments: the recipe's `PluginArguments`; stock_because: why LLaMA-Factory's own step runs, or "". What a recipe
    contradicts by itself was refused when it was read (`loss_keys.problems`).
    """
    keys = vars(arguments)
    if stock_because and (needing := loss_keys.only_here(keys)):
        raise UserError(f"{needing} needs the shared-prefix step, which this run does not take: {stock_because}.")
    if arguments.reference and finetuning_args.finetuning_type not in loss_keys.ADAPTERS:
        raise UserError(
            f"reference: {arguments.reference} needs `finetuning_type: lora`: the reference is the model without its "
            "adapter."
        )


def refuse_imageless(rows, arguments) -> None:
    """Raises UserError where the recipe has an image term and no training row an image, or no other row's.

    rows: the tokenized training set, or None.
    """
    if rows is None or not loss_keys.runs_damaged(vars(arguments)):
        return
    key = loss_keys.only_here(vars(arguments))
    images = columns.array(rows, "image")
    if images.null_count == len(images):
        raise UserError(f"{key} compares images, and no row of the training set has one.")
    hashes = set(columns.values(rows, "image_hash")) - {""}
    if arguments.damaged_image == "other" and len(hashes) == 1:
        raise UserError("damaged_image: other needs two images or more; the training set has one.")


def refuse_token_limit(arguments, finetuning_args, shared_prefix: bool) -> None:
    """Raises UserError for a `max_tokens_per_step` that the run could not keep to.

    arguments: the recipe's `PluginArguments`; shared_prefix: whether the shared-prefix step will run.
    """
    limit = arguments.max_tokens_per_step
    if limit is None:
        return
    if not shared_prefix:
        raise UserError(
            f"max_tokens_per_step: {limit} is for the shared-prefix step, which this run does not take. Leave it out "
            "and lower per_device_train_batch_size."
        )
    if finetuning_args.pref_bco_weight >= 1e-6:
        raise UserError(
            f"max_tokens_per_step: {limit} does not go with pref_bco_weight: its baseline is a mean over the whole "
            "micro-batch. Leave one of them out, or lower per_device_train_batch_size instead."
        )


def refuse_longer_pairs(rows: dict, arguments) -> None:
    """Raises UserError for a `max_tokens_per_step` below the longest pair, which can't be cut.

    rows: what `get_dataset` returned, tokenized for the shared-prefix step.
    """
    limit = arguments.max_tokens_per_step
    if limit is None:
        return
    longest = max(
        int(run_lengths(one, arguments, name == "train_dataset").max())
        for name, part in rows.items()
        for one in (part.values() if isinstance(part, dict) else [part])
        if one is not None
    )
    if longest > limit:
        raise UserError(
            f"max_tokens_per_step: {limit} is less than the {longest} tokens of the longest pair, and a pair can't be "
            f"cut. Set it to {longest} or more, or make pairs shorter with anyres_max_tiles or a lower cutoff_len."
        )


def pair_lengths(rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of each pair's prompt, chosen and rejected response, (n,) each."""
    prompts, chosen, rejected = (
        pc.list_value_length(columns.array(rows, name)).to_numpy()
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    placeholders = columns.array(rows, "num_image_tokens").to_numpy()
    return prompts + np.maximum(placeholders - 1, 0), chosen, rejected


def run_lengths(rows, arguments, trained: bool) -> np.ndarray:
    """Tokens of each pair's row in the shared-prefix step, (n,): with the damaged image's group while training."""
    prompts, chosen, rejected = pair_lengths(rows)
    keys = vars(arguments)
    total = prompts + chosen + (rejected if loss_keys.runs_rejected(keys) or not trained else 0)
    if not trained or not loss_keys.runs_damaged(keys):
        return total
    return total + (prompts + chosen) * (columns.array(rows, "num_image_tokens").to_numpy() > 0)


def tokens_per_second(rows, metrics: dict[str, float]) -> float:
    """LLaMA-Factory's effective_tokens_per_sec: the tokens of prompt + chosen and prompt + rejected per second."""
    if "chosen_input_ids" in rows.column_names:
        return calculate_tps(rows, metrics, stage="rm")
    prompts, chosen, rejected = pair_lengths(rows)
    pairs = zip(prompts + chosen, prompts + rejected, strict=True)
    return calculate_tps(
        ({"chosen_input_ids": range(chosen), "rejected_input_ids": range(rejected)} for chosen, rejected in pairs),
        metrics,
        stage="rm",
    )
