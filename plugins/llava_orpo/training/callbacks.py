"""Callbacks of a training: a fuller trainer_log.jsonl, a W&B table of examples, Trackio after training."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any

from llamafactory.extras import logging
from llamafactory.train.callbacks import LogCallback
from transformers import TrainerCallback

logger = logging.get_logger("llamafactory." + __name__)


class _AtOnce:
    """Runs at once what LLaMA-Factory's LogCallback gives to a thread: a checkpoint must not be ahead of its log."""

    def submit(self, function: Callable, *args) -> None:
        function(*args)

    def shutdown(self, wait: bool = True) -> None:
        pass


class FullLogCallback(LogCallback):
    """LLaMA-Factory's LogCallback with every logged metric in trainer_log.jsonl, not only loss and accuracy.

    A line that cannot be written is left out, with one warning per training.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warned = False
        self._extra: deque[dict[str, Any]] = deque()  # one entry per line that a log will write, in order

    def on_log(self, args, state, control, **kwargs):
        if args.should_save and self.thread_pool is not None:
            self._extra.append({k: v for k, v in state.log_history[-1].items() if isinstance(v, (int, float))})
        super().on_log(args, state, control, **kwargs)

    def _write_log(self, output_dir: str, logs: dict[str, Any]) -> None:
        extra = self._extra.popleft() if "epoch" in logs else {}  # progress lines of an evaluation have no epoch
        try:
            super()._write_log(output_dir, {**extra, **logs})
        except OSError as error:
            if not self._warned:
                logger.warning_rank0(f"trainer_log.jsonl cannot be written ({error}); its lines are left out.")
            self._warned = True

    def _create_thread_pool(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        self.thread_pool = _AtOnce()


class WandbExamples(TrainerCallback):
    """Logs a table of held-out examples with their images when W&B is on."""

    COLUMNS = ["pair_id", "subset", "image", "question", "chosen", "rejected", "margin", "correct"]

    def __init__(self, trainer):
        self.trainer = trainer
        self.pending: tuple[list[dict[str, Any]], str] | None = None

    def offer(self, examples: list[dict[str, Any]], folder: str) -> None:
        """Takes the examples of the evaluation that just ended; they are logged with its metrics."""
        self.pending = (examples, folder)

    def on_evaluate(self, args, state, control, **kwargs):
        if self.pending is None or "wandb" not in (args.report_to or []) or not state.is_world_process_zero:
            return
        import wandb

        if wandb.run is None:
            return

        examples, folder = self.pending
        self.pending = None
        table = wandb.Table(columns=self.COLUMNS)
        for example in examples:
            logps = [example[f"{side}_logp"] / example[f"{side}_tokens"] for side in ("chosen", "rejected")]
            image = example["image"] and wandb.Image(os.path.join(folder, example["image"]["path"]))
            table.add_data(
                example["pair_id"],
                example["subset"],
                image,
                example["question"],
                example["chosen"],
                example["rejected"],
                logps[0] - logps[1],
                example["correct"],
            )
        wandb.log({"eval/examples": table, "train/global_step": state.global_step})


class TrackioAfterTraining(TrainerCallback):
    """Lets the evaluation after a training reach Trackio, in the run of that training.

    transformers 5.5.4's TrackioCallback ends its run with the training but does not note it, so LLaMA-Factory's
    evaluation with the best model would stop with "Call trackio.init() before trackio.log()".
    """

    def __init__(self, callback):
        self.callback = callback
        self.training = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_train_end(self, args, state, control, **kwargs):  # runs after the callback's own, which ended the run
        self.training = False
        self.callback._initialized = False  # it opens the run again, by name, when there is something to log

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.training and self.callback._initialized:
            self.callback.on_train_end(args, state, control)  # waits until everything is stored
            self.callback._initialized = False
