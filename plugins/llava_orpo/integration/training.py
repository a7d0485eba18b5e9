"""Training: checks before the data is read, collator, trainer, log. See `_swaps`."""

from __future__ import annotations

import os

from llamafactory.extras import logging

from .data import report_skipped
from .run import Run, current

logger = logging.get_logger("llamafactory." + __name__)


def check_before_data(original):
    def get_dataset(template, model_args, data_args, training_args, *args, **kwargs):
        from llamafactory.model.loader import load_config

        run = current()
        if getattr(template, "conversation", None) is None:
            from ..data.conversation import CONVERSATIONS

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
        if not run.shared_prefix:
            _announce_stock_evaluation(training_args)
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


def _fallback_reason(config, model_args, run: Run) -> str:
    """Why the shared-prefix step can't serve this run, or an empty string."""
    text = config.get_text_config()
    if getattr(text, "sliding_window", None) is not None:
        return f"the language model uses a sliding window of {text.sliding_window} tokens"
    if model_args.use_unsloth or model_args.enable_liger_kernel or model_args.shift_attn:
        return "unsloth, liger kernels and shift_attn replace the model's attention or head"
    if run.recipe.get("ld_alpha") is not None:
        return "ld_alpha needs per-token log-probs of the padded batch"
    return ""


def _announce_stock_evaluation(training_args) -> None:
    """LLaMA-Factory's own trainer evaluates in its own way. Raises ValueError if the run waits for a metric of ours."""
    if "preference_accuracy" in str(training_args.metric_for_best_model):
        raise ValueError(
            "metric_for_best_model: preference_accuracy comes from the plugin's evaluation, which needs the shared-prefix "
            "step. Use metric_for_best_model: rewards/accuracies with shared_prefix: false."
        )
    if training_args.do_eval or str(training_args.eval_strategy) not in ("no", "IntervalStrategy.NO"):
        logger.warning_rank0(
            "Without the shared-prefix step evaluations are LLaMA-Factory's own: no preference_eval.json. Score the "
            "result with evals/preference.py, which gives the same numbers as the plugin's evaluation."
        )


def _check_model_folder(model_args) -> None:
    from ..checkpoint import published as checkpoint

    if os.path.isdir(model_args.model_name_or_path) and not model_args.train_from_scratch:
        checkpoint.check_folder(model_args.model_name_or_path)


def collator(original):
    def make(template, model, tokenizer, processor, **kwargs):
        from ..step.collator import SharedPrefixCollator

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


def trainer(original):
    from ..training.trainer import SharedPrefixTrainer

    def make(*args, **kwargs):
        run = current()
        if not run.shared_prefix:
            return original(*args, **kwargs)
        return SharedPrefixTrainer(*args, plugin_arguments=run.arguments, **kwargs)

    return make


def log_callback(original):
    from ..training.callbacks import FullLogCallback

    return FullLogCallback
