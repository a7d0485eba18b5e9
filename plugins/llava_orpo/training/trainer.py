"""LLaMA-Factory's preference trainer on shared-prefix batches, with exact evaluation.

Built for llamafactory 0.9.5's `CustomDPOTrainer` (train/dpo/trainer.py). ORPO and SimPO need no reference model;
losses that do (sigmoid, hinge, ipo, kto_pair, …) run policy and reference on the same packed layout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from llamafactory.extras import logging
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from peft import PeftModel
from transformers import Trainer
from transformers.integrations import TrackioCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

from ..arguments import PluginArguments
from ..checkpoint import complete, resume
from ..data import columns
from ..data.images import reference_name
from ..data.skipped import TRAINING, stop_at_bad_row, write_skipped
from ..errors import UserError
from ..preference import scoring, writing
from ..preference.records import CONDITIONS
from ..preference.scoring import ScoredRow
from ..preference.writing import Evaluation
from ..step.attention import unwrap
from ..step.batches import image_runs
from ..step.model import packed_logps, prepare
from ..step.order import PaddedRows, PairOrder
from ..step.parts import chosen_first, filled_up, num_tokens, parts_of, response_tokens
from ..upstream import (
    LossOnHost,
    forget_step,
    fsdp_optimizer_loaded,
    load_onto_numbered_cpus,
    logs_now,
    loss_on_host,
    mean_loss,
    random_state,
    read_window,
    set_random_state,
    set_step_loss,
    step_loss,
    whole_weights,
    without_rotation,
    write_window,
)
from .anomalies import ANOMALIES, Anomalies
from .callbacks import TrackioAfterTraining, WandbExamples
from .objective import GROUNDING, Objective, log_probs, over_damaged
from .stopping import EvaluationStopped
from .survival import Survival, goes_on, told_of_full_disk
from .undamaged import Undamaged

logger = logging.get_logger("llamafactory." + __name__)
WINDOW = "log_window_{}.pt"  # of each process: the terms since the last log


class SharedPrefixTrainer(CustomDPOTrainer):
    """`CustomDPOTrainer` whose step takes the batches of `SharedPrefixCollator`.

    Logged terms keep the names of LLaMA-Factory and TRL. Two are defined here: `logits/*` is the mean logit at
    response positions (stock LLaMA-Factory averages over every position of the padded batch, which are not computed
    here), and `data_wait_fraction` is the share of the time since the last log that was spent waiting for data.
    """

    def __init__(self, *args, plugin_arguments: PluginArguments, **kwargs):
        self.plugin = plugin_arguments
        super().__init__(*args, **kwargs)
        self.objective = Objective.of(self.plugin, self.finetuning_args, self.compute_preference_loss)
        for model in {id(m): m for m in (self.model, self.ref_model) if m is not None}.values():
            line = prepare(model, self.args.device, self.plugin.attention_backend, self.plugin.cudnn_attention)
        logger.info_rank0(line)
        tower = unwrap(self.model).model.vision_tower
        self._tower_frozen = not any(p.requires_grad for p in tower.parameters())
        self._pairs_in_step: torch.Tensor | None = None  # see get_batch_samples
        self._told_of_parts: set[str] = set()
        self._sums: dict[str, dict[str, torch.Tensor]] = {}  # see store_metrics
        self._read: dict[str, float] = {}  # see _read_window
        self._bad_images: set[tuple[str, str, int]] = set()
        self.undamaged = Undamaged()
        self._waited, self._since = 0.0, time.perf_counter()
        self.survival: Survival | None = None  # see survival.attach
        self.signalled: bool | None = None  # whether a process was asked to stop, as of the last optimizer step
        self._anomalies = Anomalies(self.plugin.max_anomalies)
        self._random_before: dict[str, Any] | None = None
        self._weights_change = False  # between the gradient and the next step's batches
        self._before_step: tuple[dict[str, torch.Tensor], torch.Tensor | None] = ({}, None)
        self.wandb_examples = WandbExamples(self)
        self.add_callback(self.wandb_examples)
        for callback in [c for c in self.callback_handler.callbacks if isinstance(c, TrackioCallback)]:
            self.add_callback(TrackioAfterTraining(callback))
        if self.plugin.group_pairs_by_image:
            self._announce_groups()

    def limit_tokens(self, allowed_tokens: int | None) -> None:
        """Lets no forward have more tokens than that, where pairs can be told apart; before `train` or `evaluate`.

        The recipe's `max_tokens_per_step` goes before it. None: no limit. All processes must set a limit, or none.
        """
        if self.takes_a_limit:
            self.data_collator.max_tokens = allowed_tokens

    @property
    def takes_a_limit(self) -> bool:
        """Whether `limit_tokens` has an effect: not beside the recipe's own, nor with BCO, whose mean is a batch's."""
        return self.plugin.max_tokens_per_step is None and self.bco_gemma < 1e-6

    # data ---------------------------------------------------------------------------------------------------

    def _announce_groups(self) -> None:
        if self.train_dataset is None:
            return
        hashes = columns.values(self.train_dataset, "image_hash")
        runs = image_runs(hashes, range(len(hashes)), self.plugin.max_pairs_per_image)
        size = self.args.per_device_train_batch_size
        if size < 2:
            logger.warning_rank0(
                "group_pairs_by_image has nothing to group with per_device_train_batch_size: 1; set it to "
                f"max_pairs_per_image ({self.plugin.max_pairs_per_image}) and lower gradient_accumulation_steps."
            )
        logger.info_rank0(
            f"Grouping pairs by image: {len(hashes)} pairs on {len(set(hashes))} images "
            f"({len(hashes) / max(len(runs), 1):.2f} pairs per group, at most {self.plugin.max_pairs_per_image})."
        )

    def get_train_dataloader(self):
        return self._get_dataloader(
            dataset=PaddedRows(self.train_dataset),
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, *args, **kwargs) -> PairOrder:
        world, grouped = self.args.world_size, self.plugin.group_pairs_by_image
        split = self.args.accelerator_config.split_batches
        size = self._train_batch_size // world if split else self._train_batch_size
        order = PairOrder(
            len(self.train_dataset),
            global_batch=size * world * self.args.gradient_accumulation_steps,
            batch_size=size,
            processes=world,
            shuffle=not self.finetuning_args.disable_shuffling and self.args.train_sampling_strategy == "random",
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            image_hashes=columns.values(self.train_dataset, "image_hash") if grouped else None,
            max_pairs=self.plugin.max_pairs_per_image,
            epoch_now=lambda: self.state.global_step // order.steps,
            pad=not self.args.dataloader_drop_last,
        )
        return order

    def get_batch_samples(self, *args, **kwargs):
        """The micro-batches of one optimizer step; counts the pairs that have weight in it, on all processes."""
        if self.control.should_training_stop:
            return [], None
        self._anomalies.begin_step()
        self._before_step = (dict(self._sums.get("train", {})), step_loss(self))
        self._random_before = random_state()
        self._weights_change = False
        started = time.perf_counter()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._waited += time.perf_counter() - started
        batches = self._in_lockstep(batches)
        if batches:
            counted = torch.stack([batch["weights"].sum() for batch in batches]).sum()
            counted = counted.to(self.args.device, torch.float32)
            self._pairs_in_step = self.accelerator.reduce(counted, "sum") if self.args.world_size > 1 else counted
        return batches, items

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 * parameters * tokens (transformers' estimate), with the tokens that are really run."""
        return 6 * self.model.num_parameters(exclude_embeddings=True) * num_tokens(inputs)

    # step ---------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a micro-batch, or of its parts one after the other: the same sums of gradients.

        Under DDP only the last part's backward sends gradients, so that the processes may have different numbers of
        parts. DDP also exchanges buffers in a forward, but only in the first one after gradients were sent. Engines
        that shard exchange something in every forward and backward: there `_in_lockstep` has made the numbers equal,
        and every part sends its gradients, because whole ones would have to be kept until the last.
        """
        self._tell_of_parts(inputs)
        parts = parts_of(inputs)
        if len(parts) == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        whole = {"weights": inputs["weights"], "response_tokens": response_tokens(inputs)}
        losses = []
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self._gradients_kept(model):
                losses.append(super().training_step(model, {**part, "whole": whole}, num_items_in_batch))
        return torch.stack(losses).sum()

    @contextmanager
    def _gradients_kept(self, model) -> Iterator[None]:
        """Inside, a backward adds to the gradients, and is not the last one of the optimizer step."""
        last = self.accelerator.sync_gradients
        self.accelerator.sync_gradients = False  # DeepSpeed would make its step in the backward
        try:
            with nullcontext() if self._all_forwards_together else self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.sync_gradients = last

    @property
    def _all_forwards_together(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _in_lockstep(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches, each with as many parts as on the process with the most; the host waits for that once."""
        limited = self.data_collator.max_tokens is not None
        if not (batches and limited and self._all_forwards_together and self.args.world_size > 1):
            return batches
        counts = torch.tensor([len(parts_of(batch)) for batch in batches], device=self.args.device)
        torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
        return [filled_up(batch, count) for batch, count in zip(batches, counts.tolist(), strict=True)]

    def _tell_of_parts(self, batch: dict[str, Any]) -> None:
        limit = self.data_collator.max_tokens
        lengths = [part["packed"].num_tokens for part in parts_of(batch) if not part.get("filler")]
        if len(lengths) > 1 and "parts" not in self._told_of_parts:
            self._told_of_parts.add("parts")
            logger.info_rank0(
                f"A micro-batch runs in {len(lengths)} parts of at most {max(lengths):,} tokens, one after the other, "
                "as every one does that is too long for one forward: gradients and logged terms are the same."
            )
        if limit is not None and max(lengths) > limit and "pair" not in self._told_of_parts:
            self._told_of_parts.add("pair")
            logger.warning_rank0(
                f"A pair of {max(lengths):,} tokens is longer than the {limit:,} that a forward may have, and can't be "
                "cut; it runs as it is. Lower `cutoff_len` to leave such pairs out, or set `anyres_max_tiles`."
            )

    def concatenated_forward(self, model, batch: dict[str, Any], is_ref_model: bool = False) -> dict[str, torch.Tensor]:
        """Runs one forward for all responses.

        Returns what `objective.log_probs` does, (n,) each; `{chosen,rejected}_logps`, LLaMA-Factory's, which are means
        for ipo, orpo and simpo, else sums; `{chosen,rejected}_logits`, mean logits; and logps_sum, (2n,), the sums
        without those under a damaged image, chosen first. Where no rejected answer was run nothing is said of them.
        """
        scored = packed_logps(model, batch, self.args.device, skip_unread=self._tower_frozen)
        packed, out = scored.packed, log_probs(scored)
        kind = "mean" if self.loss_type in ("ipo", "orpo", "simpo") else "sum"
        with torch.no_grad():  # counted on the host: `lengths` would have to come from the device
            flat = scored.logits.detach().reshape(-1, scored.logits.shape[-1])
            parts = flat.split([*packed.response_tokens, len(flat) - sum(packed.response_tokens)])
            for which, rows in zip(("chosen", "rejected") if packed.n_rejected else ("chosen",), parts, strict=False):
                out[f"{which}_logps"], out[f"{which}_logits"] = out[f"{which}_{kind}"], rows.float().mean()
        out["logps_sum"] = scored.sums[: packed.n_pairs + packed.n_rejected]
        return out

    def reference_forward(self, model, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`concatenated_forward` of the reference model without gradients: the second one, or without the adapter."""
        if "reference" in batch:
            return batch["reference"].to(self.args.device, non_blocking=True).terms()
        reference, context = self.ref_model, nullcontext()
        if reference is None:
            reference, context = model, self.accelerator.unwrap_model(model).disable_adapter()
        with torch.no_grad(), context:
            return self.concatenated_forward(reference, batch, is_ref_model=True)

    def pair_losses(self, model, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(terms per pair, each (n,); the forward's output).

        The terms are those of `Objective.terms`. A batch in parts takes a forward for each, whose gradients would keep
        all parts in memory: see `training_step`.
        """
        if "parts" not in batch:
            return self._pair_losses(model, batch)
        scored = [(part, *self._pair_losses(model, part)) for part in batch["parts"]]
        scored = [each for each in scored if not each[0].get("filler")]
        terms = {key: torch.cat([terms[key] for _, terms, _ in scored]) for key in scored[0][1]}
        output = {key: [output[key] for _, _, output in scored] for key in scored[0][2]}
        joined = {key: torch.cat(values) for key, values in output.items() if values[0].dim() and key != "logps_sum"}
        joined["logps_sum"] = chosen_first(output["logps_sum"])
        counts = torch.tensor([part["packed"].response_tokens for part, _, _ in scored], dtype=torch.float32)
        for key, count in zip(("chosen_logits", "rejected_logits"), counts.T.to(self.args.device), strict=True):
            if key in output:
                joined[key] = (torch.stack(output[key]) * count).sum() / count.sum()
        return terms, joined

    def _pair_losses(self, model, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        output = self.concatenated_forward(model, batch)
        reference = self.reference_forward(model, batch) if self.finetuning_args.use_ref_model else None
        out = self.objective.terms(output, reference)
        if self.ftx_gamma > 1e-6:
            out["loss"] = out["loss"] + self.ftx_gamma * out["sft_loss"]
        return out, output

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
        """(loss, logged terms): means over the pairs of the batch or, for a part of one, its addends to them."""
        if train_eval == "eval":
            (batch,) = self._in_lockstep([batch])
            self._tell_of_parts(batch)
        terms, output = self.pair_losses(model, batch)
        self._note_bad_images(batch)
        if train_eval == "train":
            self.undamaged.note(batch)
            self._anomalies.note(batch["rows"], terms["loss"])
        weights = batch["weights"].to(terms["loss"].device, torch.float32)  # DeepSpeed hands them over in bf16
        whole = batch.get("whole", batch)
        share = weights / whole["weights"].to(weights.device, torch.float32).sum().clamp(min=1.0)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (values * share).sum()

        metrics = {}
        if "rejected_rewards" in terms:
            chosen, rejected = terms["chosen_rewards"], terms["rejected_rewards"]
            metrics = {
                "rewards/chosen": mean(chosen),
                "rewards/rejected": mean(rejected),
                "rewards/accuracies": mean((chosen > rejected).float()),
                "rewards/margins": mean(chosen - rejected),
            }
        answers = [which for which in ("chosen", "rejected") if f"{which}_logps" in output]
        metrics |= {f"logps/{which}": mean(output[f"{which}_logps"]) for which in answers}
        metrics |= {f"logits/{which}": output[f"{which}_logits"] for which in answers}
        if "whole" in batch:
            counts = zip(batch["packed"].response_tokens, whole["response_tokens"], strict=True)
            for which, (part, all_of_it) in zip(answers, counts, strict=False):
                share_of_it = 0.0 if batch.get("filler") else part / all_of_it
                metrics[f"logits/{which}"] = metrics[f"logits/{which}"] * share_of_it
        if self.objective.name in ("orpo", "sft"):
            metrics["sft_loss"] = metrics["nll_loss"] = mean(terms["sft_loss"])
        if self.objective.name == "orpo":
            metrics["odds_ratio_loss"] = mean(terms["odds_ratio_loss"])
            metrics["log_odds"] = metrics["log_odds_chosen"] = mean(terms["log_odds"])
            metrics["log_odds_ratio"] = -metrics["odds_ratio_loss"]  # TRL's ORPOTrainer: mean logsigmoid(log_odds)
        if "has_damaged" in terms and train_eval == "train":
            metrics |= {name: mean(terms[key]) for key, name in GROUNDING.items()}
        prefix = "eval_" if train_eval == "eval" else ""
        return mean(terms["loss"]), {f"{prefix}{key}": value.detach() for key, value in metrics.items()}

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The micro-batch's part of the mean loss over all pairs of the optimizer step.

        The mean over the micro-batch, times its pairs over the mean number of pairs of the step's micro-batches on all
        processes: Trainer divides by the number of micro-batches, and gradients are averaged over processes. So every
        pair weighs the same whatever the number of processes and accumulation steps; the factor is exactly 1 where
        all micro-batches are full.
        """
        loss, metrics = self.get_batch_loss_metrics(model, inputs)
        weights = [batch["weights"].to(loss.device, torch.float32) for batch in (inputs, inputs.get("whole", inputs))]
        pairs, count = (each.sum() for each in weights)  # of a part, and of its micro-batch
        self.store_metrics(metrics, "train", count, pairs)
        if self._pairs_in_step is not None:
            micro_batches = self.args.world_size * self.current_gradient_accumulation_steps
            loss = loss * (count * micro_batches / self._pairs_in_step.clamp(min=1.0))
        return (loss, metrics) if return_outputs else loss

    def store_metrics(
        self,
        metrics,
        train_eval="train",
        count: torch.Tensor | float = 1.0,
        pairs: torch.Tensor | float | None = None,
    ) -> None:
        """Adds a micro-batch's terms to the sums of the next log, `count` times each; nothing leaves the device.

        pairs: how many of the micro-batch's `count` pairs these terms are of, where they are of a part.
        """
        sums = self._sums.setdefault(train_eval, {})
        for key, value in metrics.items():
            if not isinstance(value, torch.Tensor):  # LLaMA-Factory's own evaluation has read them
                value = torch.tensor(value, device=self.args.device)
            sums[key] = sums.get(key, 0.0) + value.float() * count
        sums[""] = sums.get("", 0.0) + (count if pairs is None else pairs)  # the number of pairs

    def _note_bad_images(self, batch: dict[str, Any]) -> None:
        """Logs and lists each pair whose image could not be decoded, once per run; stops under `bad_rows: error`."""
        for index, reason in batch["bad_images"]:
            row = batch["rows"][index]
            name = row["pair_id"] or reference_name(row["image"])  # pairs of other LLaMA-Factory formats have no id
            number = row.get("row", -1)
            if (row["dataset"], name, number) in self._bad_images:
                continue
            self._bad_images.add((row["dataset"], name, number))
            entry = {"stage": TRAINING, "dataset": row["dataset"], "row": number, "pair_id": name}
            entry["reason"] = f"bad image: {reason}"
            write_skipped(self.args.output_dir, [entry], rank=self.args.process_index)
            stop_at_bad_row([entry], self.plugin.bad_rows)
            logger.warning(f"Pair {name} is left out, its image can't be decoded: {reason}")

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["data_wait_fraction"] = round(self._waited / max(now - self._since, 1e-9), 4)
            self._waited, self._since = 0.0, now
            terms, self._read = self._read, {}
        else:
            terms = self._sums.pop("eval", {})
            if terms:
                terms = dict(zip(terms, self._total(terms).tolist(), strict=True))
        pairs = terms.pop("", 0.0)
        if pairs:  # the mean over all pairs since the last log, on all processes
            logs.update(over_damaged({key: value / pairs for key, value in terms.items()}))
        Trainer.log(self, logs, *args, **kwargs)  # CustomDPOTrainer.log averages over micro-batches, empty ones too

    def _total(self, sums: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sums of all processes, (len(sums),)."""
        return self.accelerator.reduce(torch.stack(list(sums.values())), "sum")

    def _read_window(self, loss: torch.Tensor, norm: torch.Tensor | float | None) -> tuple[float, float | None]:
        """(loss, gradient norm) of the next log; keeps the terms for `log`. It waits for the device once for all."""
        sums = self._sums.pop("train", {})
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        device_norm = [norm.reshape(1)] if isinstance(norm, torch.Tensor) else []
        parts = [mean_loss(loss, self.args).reshape(1), *device_norm, *([self._total(sums)] if sums else [])]
        mean, *values = torch.cat([part.to(loss.device) for part in parts]).tolist()
        if device_norm:
            norm, *values = values
        self._read = dict(zip(sums, values, strict=True))
        return mean, norm

    # interruptions ------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm of the step's gradient, or None for a step that is skipped because it or a loss is not finite.

        The processes agree on that, and on whether one of them was asked to stop, in one message and one wait for the
        device. A skipped step has no gradients, so that no optimizer changes anything. With a loss scaler the norm is
        not looked at: its overflows are usual, and skipped by the scaler itself.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        bad = self._anomalies.any_loss(self.args.device)
        if norm is not None and self.accelerator.scaler is None and not self.args.fp16:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            bad = torch.maximum(bad, (~torch.isfinite(whole)).to(bad))
        asked = self.survival is not None and self.survival.request.number is not None
        if self.args.world_size > 1:
            flags = torch.stack([bad, torch.full_like(bad, float(asked))])
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            skip, self.signalled = map(bool, flags.tolist())
        else:
            skip = bool(bad.item())
        self._weights_change = True
        if not skip:
            self._anomalies.in_a_row = 0
            return norm
        self._skip_step()
        return None

    def back_to_step_begin(self) -> bool:
        """Undoes the part of a step that an error broke off, so that the state can be saved; False if it cannot be.

        torch raises the death of a dataloader worker wherever the process happens to be, in an optimizer's step too.
        """
        if self._weights_change or self._random_before is None:
            return False
        set_random_state(self._random_before)
        sums, loss = self._before_step
        self._sums["train"] = sums
        set_step_loss(self, loss)
        return True

    def _skip_step(self) -> None:
        sums, loss = self._before_step
        self._sums["train"] = sums
        set_step_loss(self, loss)
        forget_step(self)
        self.optimizer.zero_grad(set_to_none=True)
        parts = [self._anomalies.pairs()]
        if self.args.world_size > 1:
            mine, parts = parts[0], [None] * self.args.world_size
            torch.distributed.all_gather_object(parts, mine)
        if self.is_deepspeed_enabled:  # it makes its step in backward
            self._anomalies.limit = 1
        step = self.state.global_step + 1
        write = parts if self.is_world_process_zero() else None
        self._anomalies.skipped(self.args.output_dir, step, write, goes_on(self))
        logger.warning_rank0(f"Step {step} is skipped: its loss or gradient is not finite (see {ANOMALIES}).")

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, *args, **kwargs):
        loss = tr_loss
        if logs_now(self):
            mean, grad_norm = self._read_window(tr_loss, grad_norm)
            loss = LossOnHost(mean)
            tr_loss.zero_()
        try:
            with loss_on_host():
                super()._maybe_log_save_evaluate(loss, grad_norm, model, *args, **kwargs)
        except EvaluationStopped:
            self.survival.stopping = self.survival.evaluation_due = True
            self.control.should_evaluate, self.control.should_training_stop = False, True
            self.save_now()

    def save_now(self) -> None:
        """Saves a checkpoint of the last step."""
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def evaluate_now(self) -> None:
        """Makes the evaluation that was due when the checkpoint was saved."""
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics, None) and self.args.save_strategy == SaveStrategy.BEST:
            self.save_now()

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with told_of_full_disk(self), without_rotation():
            if self.args.should_save:
                complete.begin(folder)
            super()._save_checkpoint(model, trial)
            due = self.survival is not None and self.survival.evaluation_due
            window = {**read_window(self), "sums": self._sums.get("train", {}), "due": due}
            window["processes"] = self.args.world_size
            folder.mkdir(parents=True, exist_ok=True)  # the first process may be later
            torch.save(window, folder / WINDOW.format(self.args.process_index))

    def restore_window(self) -> bool:
        """Gives the terms since the last log back from the checkpoint; returns whether an evaluation is due.

        After another number of processes the first one gets the sums of all, and each the mean loss.
        """
        files = sorted(Path(self.args.resume_from_checkpoint).glob(WINDOW.format("*")))
        windows = {file.name: torch.load(file, map_location=self.args.device, weights_only=True) for file in files}
        if not windows:
            return False
        own = windows.get(WINDOW.format(self.args.process_index))
        if own is None or own["processes"] != self.args.world_size:
            own = dict(windows[files[0].name])
            own["loss"] = torch.stack([window["loss"] for window in windows.values()]).mean()
            first = self.args.process_index == 0
            own["sums"] = {key: sum(w["sums"][key] for w in windows.values()) * first for key in own["sums"]}
        write_window(self, own)
        if own["sums"]:
            self._sums["train"] = {key: value.to(self.args.device) for key, value in own["sums"].items()}
        return own["due"]

    # whole models -------------------------------------------------------------------------------------------

    def _is_whole_model(self) -> bool:
        return not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with whole_weights(self.accelerator) if self.is_fsdp_enabled else nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self._is_whole_model():
            model = unwrap(self.model)
            resume.save_into(model, output_dir or self.args.output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self._is_whole_model() and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            resume.load_into(unwrap(model or self.model), resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        load_onto_numbered_cpus()
        with fsdp_optimizer_loaded():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        if self._is_whole_model() and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            resume.load_into(unwrap(self.model), self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    # evaluation ---------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Scores every pair of the evaluation set once; see `preference.scoring` and `preference.metrics`."""
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if not self.plugin.preference_eval:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]

        self._memory_tracker.start()
        started = time.perf_counter()
        conditions = CONDITIONS if self.plugin.grounding_eval else ("true",)
        merged = {condition: self._score(dataset, condition) for condition in conditions}
        evaluation = Evaluation.of(dataset, merged, self.beta, self.plugin.eval_min_subset)
        metrics = self._metrics_of(evaluation, metric_key_prefix, time.perf_counter() - started)
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            suffix = "" if metric_key_prefix == "eval" else "_" + metric_key_prefix.removeprefix("eval_")
            examples = writing.write_evaluation(
                folder,
                dataset,
                evaluation,
                self.processing_class,
                self.plugin.eval_examples,
                step=self.state.global_step,
                epoch=float(self.state.epoch or 0.0),
                suffix=suffix,
            )
            if examples:
                self.wandb_examples.offer(examples, str(folder))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def evaluated_now(self) -> dict[str, float] | None:
        """Metrics of the evaluation that training ended with, if the model is still that of the last step."""
        if self.args.load_best_model_at_end:
            return None
        last = [entry for entry in self.state.log_history if entry.get("step") == self.state.global_step]
        last = [entry for entry in last if any(key.startswith("eval_") for key in entry)]
        return {key: value for entry in last for key, value in entry.items() if key != "step"} or None

    def _metrics_of(self, evaluation: Evaluation, prefix: str, seconds: float) -> dict[str, float]:
        """The scalars of an evaluation as they are logged."""
        metrics = writing.flat_metrics(evaluation.summary, prefix)
        if self.objective.name != "orpo":  # the summary knows ORPO's loss; other losses were computed by the trainer
            losses = [row.loss for row in evaluation.scored["true"]]
            metrics[f"{prefix}_loss"] = sum(losses) / len(losses)
        for name in ("grey", "other") if evaluation.grounding else ():
            accuracy = evaluation.grounding[name]["preference_accuracy"]
            metrics[f"{prefix}_preference_accuracy_{name}_image"] = accuracy
        metrics[f"{prefix}_unusable_pairs"] = len(evaluation.unusable)
        metrics[f"{prefix}_runtime"] = round(seconds, 4)
        scored = sum(map(len, evaluation.scored.values()))
        metrics[f"{prefix}_pairs_per_second"] = round(scored / seconds, 3)
        metrics["epoch"] = self.state.epoch or 0.0
        return metrics

    def _score(self, dataset, condition: str) -> tuple[list[ScoredRow], list[ScoredRow]]:
        """(scored, unusable) rows of all ranks."""

        def forward(model, batch):
            terms, output = self.pair_losses(model, batch)
            return {"logps": output["logps_sum"], "loss": terms["loss"]}

        parts = [self._scored(dataset, condition, range(len(dataset)), forward)]
        if self.args.world_size > 1:
            mine, parts = parts[0], [None] * self.args.world_size
            torch.distributed.all_gather_object(parts, mine)
        if any(part is None for part in parts):
            raise EvaluationStopped
        return scoring.merge(parts)

    def score_reference(
        self, dataset, condition: str, positions: Sequence[int], on_rows: Callable[[list[ScoredRow]], None]
    ) -> list[ScoredRow]:
        """This process's share of the rows at `positions`, scored by the reference model; on_rows sees each batch's."""

        def forward(model, batch):
            sums = [self.reference_forward(model, part)["logps_sum"] for part in parts_of(batch)]
            return {"logps": chosen_first(sums[: len([p for p in parts_of(batch) if not p.get("filler")])])}

        return self._scored(dataset, condition, positions, forward, on_rows)

    def _scored(
        self,
        dataset,
        condition: str,
        positions: Sequence[int],
        forward: Callable[[Any, dict[str, Any]], dict[str, torch.Tensor]],
        on_rows: Callable[[list[ScoredRow]], None] | None = None,
    ) -> list[ScoredRow] | None:
        """This rank's rows; None where it was asked to stop."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise UserError("Evaluate without training under DeepSpeed is not supported: leave `deepspeed` out.")
        was_training = model.training
        model.eval()
        size = self.args.per_device_eval_batch_size
        positions = scoring.in_groups(dataset, positions, size, condition, self.plugin)
        positions = scoring.shard(positions, self.args.process_index, self.args.world_size, size)

        def score_batch(batch):
            (batch,) = self._in_lockstep([self._prepare_inputs(batch)])
            self._tell_of_parts(batch)
            with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
                scores = forward(model, batch)
            self._note_bad_images(batch)
            return scores

        def on_batch(scored):
            if on_rows is not None:  # which shows its own progress
                return on_rows(scored)
            stoppable = not self._all_forwards_together  # else all processes must run every forward
            if self.is_in_train and self.survival and self.survival.request.number is not None and stoppable:
                raise EvaluationStopped
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.prediction_bar is not None:
                    callback.prediction_bar.set_description(f"evaluation, {condition} image", refresh=False)

        def on_loader(loader):
            self.callback_handler.eval_dataloader = loader

        rows = None  # stays so where the evaluation is stopped
        with torch.random.fork_rng(devices=[]), suppress(EvaluationStopped):  # the loader draws a seed
            rows = scoring.score(
                score_batch,
                dataset,
                positions,
                self.data_collator,
                size,
                condition,
                num_workers=self.args.dataloader_num_workers,
                on_batch=on_batch,
                on_loader=on_loader,
            )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback):
                callback.on_evaluate(self.args, self.state, self.control)  # the next condition gets its own bar
        if was_training:
            model.train()
        return rows
