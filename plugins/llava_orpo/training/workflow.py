"""A training, from a recipe's parsed arguments to the saved adapter: check, build, run_dpo.

Takes the place of llamafactory 0.9.5's train/dpo/workflow.py. `integration` handles what `llamafactory-cli train` reads
before this point; the step itself is in `trainer`.
"""

from __future__ import annotations

import os
from collections import ChainMap
from typing import TYPE_CHECKING

import torch
from llamafactory.data import PairwiseDataCollatorWithPadding, get_dataset, get_template_and_fix_tokenizer
from llamafactory.extras import logging
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.extras.ploting import plot_loss
from llamafactory.model import load_model, load_tokenizer, loader
from llamafactory.train.callbacks import LogCallback
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from llamafactory.train.trainer_utils import create_modelcard_and_push, create_ref_model

from .. import upstream
from ..data.skipped import report_skipped, summarize_skipped
from ..errors import hide_tracebacks_of_foreseen_errors
from ..export.model_card import note_training
from ..loss_keys import runs_damaged
from ..step.attention import unwrap
from ..step.collator import SharedPrefixCollator
from ..step.damage import Damage
from . import checks, secrets
from .callbacks import FullLogCallback
from .image_check import ImageCheck
from .recompute import FewestLayers
from .reference import ReferenceOnce
from .stopping import StopRequest
from .survival import attach, choose_checkpoint, same_command, told_what_to_do
from .trainer import SharedPrefixTrainer

if TYPE_CHECKING:
    from ..integration.run import Run

logger = logging.get_logger("llamafactory." + __name__)
PLOTTED = (
    "loss",
    "rewards/accuracies",
    "sft_loss",
    "odds_ratio_loss",
    "log_odds",
    "image_loss",
    "grounding/margin",
    "grounding/accuracy",
    "logps/chosen",
    "logps/rejected",
    "learning_rate",
    "grad_norm",
    "eval_loss",
    "eval_preference_accuracy",
)


def run_dpo(run: Run, model_args, data_args, training_args, finetuning_args, callbacks=None) -> None:
    """Trains, saves and evaluates, as the recipe's `do_train` and `do_eval` say.

    A signal ends the process (see `stopping`); a failure of the machine raises UserError (see `survival`).
    """
    if "LOCAL_RANK" in os.environ:  # a process of torchrun, which `early` has not prepared
        hide_tracebacks_of_foreseen_errors()
    secrets.put_away(run, training_args, finetuning_args)
    with StopRequest() as request:
        if not training_args.do_train:
            request.phase = "during the evaluation. The same command starts it again"
        choose_checkpoint(run, training_args)
        trainer = build(run, model_args, data_args, training_args, finetuning_args, callbacks, request)
        with told_what_to_do(trainer):
            if training_args.do_train:
                _train(trainer, request, training_args, finetuning_args)
                if run.recipe and trainer.is_world_process_zero():
                    note_training(training_args.output_dir, run.recipe)
                if request.number is not None:  # it came after the last step
                    request.end(f"Stopped by {request.name} {request.phase}.")
            if training_args.do_eval:
                _evaluate(trainer, run, training_args, finetuning_args)
            trainer.accelerator.wait_for_everyone()  # every rank has listed the pairs it left out
            if trainer.is_world_process_zero():
                summarize_skipped(training_args.output_dir)
            create_modelcard_and_push(trainer, model_args, data_args, training_args, finetuning_args)


def _train(trainer, request: StopRequest, training_args, finetuning_args) -> None:
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.survival.stopping:
        if torch.distributed.is_initialized():  # its threads would abort a process that just ends
            torch.distributed.destroy_process_group()
        step, again = trainer.state.global_step, same_command(training_args)
        request.end(f"Stopped by {request.name} at step {step}; checkpoint-{step} is saved. T{again[1:]} goes on.")
    trainer.save_model()
    if isinstance(trainer, SharedPrefixTrainer) and trainer.objective.runs_damaged:
        trainer.undamaged.summarize(training_args.world_size)
    if finetuning_args.include_effective_tokens_per_second:
        speed = checks.tokens_per_second(trainer.train_dataset, result.metrics)
        result.metrics["effective_tokens_per_sec"] = speed
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and finetuning_args.plot_loss:
        logged = {key for entry in trainer.state.log_history for key in entry}
        curves = [*PLOTTED, *sorted(key for key in logged if key.startswith("eval_") and key.endswith("_loss"))]
        plot_loss(training_args.output_dir, keys=[key for key in dict.fromkeys(curves) if key in logged])


def _evaluate(trainer, run: Run, training_args, finetuning_args) -> None:
    metrics = (run.shared_prefix and trainer.evaluated_now()) or trainer.evaluate(metric_key_prefix="eval")
    if finetuning_args.use_ref_model and not (training_args.do_train or finetuning_args.ref_model):
        metrics = {key: value for key, value in metrics.items() if "rewards" not in key}  # it is its own reference
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def build(
    run: Run, model_args, data_args, training_args, finetuning_args, callbacks=None, request: StopRequest | None = None
) -> CustomDPOTrainer:
    """The trainer: a SharedPrefixTrainer, or the stock one where the shared-prefix step is off or cannot serve.

    Raises UserError for what `check` and `read_rows` refuse.
    """
    fallback = check(run, model_args, data_args, training_args, finetuning_args)
    if run.shared_prefix and fallback:
        logger.warning_rank0(f"shared_prefix: falling back to LLaMA-Factory's own step: {fallback}.")
        run.shared_prefix = False
    module = load_tokenizer(model_args)
    tokenizer, processor = module["tokenizer"], module["processor"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    rows = read_rows(run, template, module, model_args, data_args, training_args)
    model = load_model(tokenizer, model_args, finetuning_args, training_args.do_train)
    upstream.keep_present_layer_names(model)
    checks.freeze_unread(model)
    upstream.keep_frozen_tower_out_of_autograd(unwrap(model).model.vision_tower)
    if run.arguments.recompute.isdecimal() and not model_args.disable_gradient_checkpointing:
        upstream.recompute_first(unwrap(model).get_decoder().layers, int(run.arguments.recompute))
    reference = None
    if finetuning_args.use_ref_model:
        own = finetuning_args.ref_model is None and not training_args.do_train
        reference = model if own else create_ref_model(model_args, finetuning_args)
    training_args.accelerator_config.non_blocking = training_args.dataloader_pin_memory  # else each copy waits
    training_args.logging_nan_inf_filter = False  # it hides a diverging loss, and waits for the device twice per batch
    shared = dict(
        model=model,
        ref_model=reference,
        args=training_args,
        finetuning_args=finetuning_args,
        callbacks=[FullLogCallback() if type(c) is LogCallback else c for c in callbacks or []],
        **rows,
        **module,
    )
    if run.shared_prefix:
        collator = SharedPrefixCollator.of(processor, model, run.arguments, training_args.world_size)
        if runs_damaged(vars(run.arguments)):
            collator.damage = Damage(run.arguments.damaged_image, training_args.seed, rows.get("train_dataset"))
        trainer = SharedPrefixTrainer(data_collator=collator, plugin_arguments=run.arguments, **shared)
        keys = [vars(part) for part in (data_args, model_args, finetuning_args, training_args, run.arguments)]
        keys = dict(ChainMap(*keys))
        if run.arguments.recompute == "auto" and not model_args.disable_gradient_checkpointing:
            trainer.add_callback(FewestLayers(trainer, keys))
        if run.arguments.image_check:
            trainer.add_callback(ImageCheck(trainer))
        if run.arguments.reference == "cached" and training_args.do_train:
            trainer.add_callback(ReferenceOnce(trainer, keys))
        attach(trainer, request or StopRequest())
        return trainer
    ignored = IGNORE_INDEX if data_args.ignore_pad_token_for_loss else tokenizer.pad_token_id
    collator = PairwiseDataCollatorWithPadding(
        template=template, model=model, pad_to_multiple_of=8, label_pad_token_id=ignored, **module
    )
    trainer = CustomDPOTrainer(data_collator=collator, **shared)
    if run.arguments.image_check:
        trainer.add_callback(ImageCheck(trainer))
    attach(trainer, request or StopRequest())
    return trainer


def check(run: Run, model_args, data_args, training_args, finetuning_args) -> str:
    """Checks what can be known before the data is read; returns why the shared-prefix step cannot serve, or "".

    Raises UserError for a template, model, length or key that this plugin cannot train with, and for a best-model
    metric that the run will not have.
    """
    config = loader.load_config(model_args)  # through its module: `anyres_max_tiles` swaps it there
    checks.refuse_unsupported(config, model_args, data_args)
    checks.refuse_unsupported_loading(training_args)
    checks.refuse_other_sharding(training_args)
    checks.settle_recompute(config, run.arguments, model_args, training_args)
    reason = checks.fallback_reason(config, model_args, finetuning_args)
    checks.refuse_loss(run.arguments, finetuning_args, reason if run.shared_prefix else "shared_prefix: false")
    checks.refuse_token_limit(run.arguments, finetuning_args, run.shared_prefix and not reason)
    if reason or not run.shared_prefix:
        checks.announce_stock_evaluation(training_args)
    else:
        checks.announce_flash_attention(model_args)
    return reason


def read_rows(run: Run, template, module, model_args, data_args, training_args) -> dict:
    """{"train_dataset", "eval_dataset"}, as far as the recipe names them, tokenized (see `data.pairs.PairProcessor`).

    Skipped rows are listed in `output_dir`. Raises UserError when too many were, and for text-only pairs that LLaMA-
    Factory's own step would train on several processes.
    """
    run.skipped, run.considered = [], 0
    rows = get_dataset(template, model_args, data_args, training_args, stage="rm", **module)
    limit, write = run.arguments.max_skipped_fraction, training_args.should_save
    # a start that goes on with a run, or only evaluates one, keeps what that run found while training
    goes_on = training_args.resume_from_checkpoint is not None or not training_args.do_train
    report_skipped(run.skipped, run.considered, limit, training_args.output_dir, write, keep_training=goes_on)
    checks.refuse_unusable_rows(rows, run, training_args)
    checks.refuse_imageless(rows.get("train_dataset"), run.arguments)
    if run.shared_prefix:
        checks.refuse_longer_pairs(rows, run.arguments)
    return rows
