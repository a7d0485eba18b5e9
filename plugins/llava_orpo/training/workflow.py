"""A training, from a recipe's parsed arguments to the saved adapter: check, build, run_dpo.

Takes the place of llamafactory 0.9.5's train/dpo/workflow.py. What `llamafactory-cli train` reads before it comes here
is in `integration`; the step itself is in `trainer`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llamafactory.data import PairwiseDataCollatorWithPadding, get_dataset, get_template_and_fix_tokenizer
from llamafactory.extras import logging
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.extras.misc import calculate_tps
from llamafactory.extras.ploting import plot_loss
from llamafactory.model import load_model, load_tokenizer, loader
from llamafactory.train.callbacks import LogCallback
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.trainer_utils import create_modelcard_and_push, create_ref_model

from ..checkpoint.published import check_folder
from ..data.conversation import CONVERSATIONS
from ..data.skipped import report_skipped
from ..errors import UserError
from ..step.collator import SharedPrefixCollator
from .callbacks import FullLogCallback
from .trainer import SharedPrefixTrainer

if TYPE_CHECKING:
    from ..integration.run import Run

logger = logging.get_logger("llamafactory." + __name__)
PLOTTED = (
    "loss", "rewards/accuracies", "sft_loss", "odds_ratio_loss", "log_odds", "logps/chosen", "logps/rejected",
    "learning_rate", "grad_norm", "eval_loss", "eval_preference_accuracy",
)  # fmt: skip


def run_dpo(run: Run, model_args, data_args, training_args, finetuning_args, callbacks=None) -> None:
    """Trains, saves and evaluates, as the recipe's `do_train` and `do_eval` say."""
    trainer = build(run, model_args, data_args, training_args, finetuning_args, callbacks)
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        if finetuning_args.include_effective_tokens_per_second:
            result.metrics["effective_tokens_per_sec"] = tokens_per_second(run, trainer.train_dataset, result.metrics)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        if trainer.is_world_process_zero() and finetuning_args.plot_loss:
            logged = {key for entry in trainer.state.log_history for key in entry}
            curves = [*PLOTTED, *sorted(key for key in logged if key.startswith("eval_") and key.endswith("_loss"))]
            plot_loss(training_args.output_dir, keys=[key for key in dict.fromkeys(curves) if key in logged])
    if training_args.do_eval:
        metrics = (run.shared_prefix and trainer.evaluated_now()) or trainer.evaluate(metric_key_prefix="eval")
        if finetuning_args.use_ref_model and not (training_args.do_train or finetuning_args.ref_model):
            metrics = {key: value for key, value in metrics.items() if "rewards" not in key}  # its own reference
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    create_modelcard_and_push(trainer, model_args, data_args, training_args, finetuning_args)


def build(run: Run, model_args, data_args, training_args, finetuning_args, callbacks=None) -> CustomDPOTrainer:
    """The trainer: a SharedPrefixTrainer, or LLaMA-Factory's own where the shared-prefix step is off or cannot serve.

    Raises UserError for what `check` and `read_rows` refuse.
    """
    fallback = check(run, model_args, data_args, training_args, finetuning_args)
    if run.shared_prefix and fallback:
        logger.warning_rank0(f"shared_prefix: falling back to LLaMA-Factory's own step: {fallback}.")
        run.shared_prefix = False
    if not run.shared_prefix:
        announce_stock_evaluation(training_args)

    module = load_tokenizer(model_args)
    tokenizer, processor = module["tokenizer"], module["processor"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    rows = read_rows(run, template, module, model_args, data_args, training_args)
    model = load_model(tokenizer, model_args, finetuning_args, training_args.do_train)
    reference = None
    if finetuning_args.use_ref_model:
        own = finetuning_args.ref_model is None and not training_args.do_train
        reference = model if own else create_ref_model(model_args, finetuning_args)
    shared = dict(
        model=model, ref_model=reference, args=training_args, finetuning_args=finetuning_args,
        callbacks=[FullLogCallback() if type(c) is LogCallback else c for c in callbacks or []], **rows, **module,
    )  # fmt: skip
    if run.shared_prefix:
        collator = SharedPrefixCollator.of(processor, model, run.arguments)
        return SharedPrefixTrainer(data_collator=collator, plugin_arguments=run.arguments, **shared)
    ignored = IGNORE_INDEX if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    collator = PairwiseDataCollatorWithPadding(
        template=template, model=model, pad_to_multiple_of=8, label_pad_token_id=ignored, **module
    )
    return CustomDPOTrainer(data_collator=collator, **shared)


def check(run: Run, model_args, data_args, training_args, finetuning_args) -> str:
    """What can be known before the data is read. Returns why the shared-prefix step cannot serve this run, or "".

    Raises UserError for a template, model, length or key that this plugin cannot train with.
    """
    if data_args.template not in CONVERSATIONS:
        raise UserError(
            f"template: {data_args.template} is not one of the exact LLaVA-1.6 templates "
            f"({', '.join(CONVERSATIONS)}) that plugins: llava_orpo trains with."
        )
    config = loader.load_config(model_args)  # through its module: `anyres_max_tiles` swaps it there
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
            "streaming: true is not supported with plugins: llava_orpo: the held-out split and the image index need the "
            "whole dataset once. Leave it out; nothing but one Arrow copy is written."
        )
    if os.path.isdir(model_args.model_name_or_path) and not model_args.train_from_scratch:
        check_folder(model_args.model_name_or_path)
    if getattr(text, "sliding_window", None) is not None:
        return f"the language model uses a sliding window of {text.sliding_window} tokens"
    if model_args.use_unsloth or model_args.enable_liger_kernel or model_args.shift_attn:
        return "unsloth, liger kernels and shift_attn replace the model's attention or head"
    if finetuning_args.ld_alpha is not None:
        return "ld_alpha needs per-token log-probs of the padded batch"
    return ""


def announce_stock_evaluation(training_args) -> None:
    """LLaMA-Factory's own trainer evaluates in its own way. Raises UserError if the run waits for a metric of ours."""
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


def read_rows(run: Run, template, module, model_args, data_args, training_args) -> dict:
    """{"train_dataset", "eval_dataset"}, as far as the recipe names them, tokenized (see `data.pairs.PairProcessor`).

    Skipped rows are listed in `output_dir`. Raises UserError when too many were, and for text-only pairs on several
    processes.
    """
    run.skipped, run.considered = [], 0
    rows = get_dataset(template, model_args, data_args, training_args, stage="rm", **module)
    report_skipped(
        run.skipped, run.considered, run.arguments.max_skipped_fraction, training_args.output_dir,
        write=training_args.should_save,
    )  # fmt: skip
    if any(part is not None and not len(part) for part in rows.values()):
        raise UserError(f"Every row was skipped; the reasons are in {training_args.output_dir}/skipped_rows.jsonl.")
    if run.arguments.allow_text_only and training_args.world_size > 1:
        for part in rows.values():
            if "image" in (getattr(part, "column_names", None) or []) and None in part["image"]:
                raise UserError(
                    "Text-only pairs can't be trained on several processes: a rank whose batch has no image "
                    "would leave the others waiting for the projector's gradients. Leave `allow_text_only` out."
                )
    return rows


def tokens_per_second(run: Run, rows, metrics: dict[str, float]) -> float:
    """LLaMA-Factory's effective_tokens_per_sec: the tokens of prompt + chosen and prompt + rejected, per second."""
    if not run.shared_prefix:
        return calculate_tps(rows, metrics, stage="rm")
    columns = rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", "num_image_tokens"])
    return calculate_tps(map(_two_sequences, columns), metrics, stage="rm")


def _two_sequences(row) -> dict[str, range]:
    """As many tokens as LLaMA-Factory's own columns of this pair would hold."""
    prompt = len(row["prompt_ids"]) + max(row["num_image_tokens"] - 1, 0)
    return {f"{side}_input_ids": range(prompt + len(row[f"{side}_ids"])) for side in ("chosen", "rejected")}
