"""Going on after an interruption: which checkpoint is taken, what the logs keep, and when a checkpoint is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.extras import logging
from llamafactory.extras.constants import TRAINER_LOG
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from ..checkpoint import complete
from ..errors import UserError
from ..files import whole_lines, write_atomic
from ..precheck import incomplete_checkpoint
from ..preference.records import HISTORY, drop_history_after
from ..step.attention import unwrap
from ..upstream import forget_lost_workers, is_of_lost_worker, recomputed
from .anomalies import ANOMALIES
from .callbacks import WandbExamples
from .recompute import free_memory, more
from .stopping import StopRequest

if TYPE_CHECKING:
    from transformers import Trainer

    from ..integration.run import Run

logger = logging.get_logger("llamafactory." + __name__)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
LITTLE = 1 << 20  # bytes: a disk with less is taken as full when writing to it failed
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ProcessGroup")


def choose_checkpoint(run: Run, training_args) -> None:
    """Sets `resume_from_checkpoint` to the newest whole checkpoint of `output_dir`, on all processes alike.

    LLaMA-Factory takes the newest folder, whole or not. Newer ones that are not whole are renamed and named in a
    warning. Raises UserError if the recipe names one that is not whole.
    """
    given = training_args.resume_from_checkpoint
    if not training_args.do_train or given is None or given is False:
        return
    if run.resumes_named:
        if lacking := complete.problem(given):
            raise UserError(incomplete_checkpoint(given, lacking))
        return
    chosen = [_newest_whole(training_args.output_dir) if training_args.process_index == 0 else None]
    if training_args.world_size > 1:
        torch.distributed.broadcast_object_list(chosen, src=0)
    if chosen[0] is None and str(given).lower() == "true":
        raise UserError(
            f"resume_from_checkpoint: true, but {training_args.output_dir} holds no whole checkpoint; leave the key "
            "out to start from the beginning."
        )
    training_args.resume_from_checkpoint = chosen[0]


def _newest_whole(output_dir: str) -> str | None:
    for folder in complete.checkpoints(output_dir):
        lacking = complete.problem(folder)
        if not lacking:
            return str(folder)
        aside = complete.set_aside(folder)
        before = complete.newest_whole(output_dir)
        logger.warning_rank0(
            f"{folder} is incomplete ({lacking}) and was renamed to {aside.name}; the training "
            + (f"goes on from {before.name}." if before else "starts from the beginning.")
        )
    return None


def cut_logs(output_dir: str | Path, step: int, history: list[dict[str, Any]] | None) -> None:
    """Drops from the logs in `output_dir` what was written after the checkpoint of `step`, which is written again.

    history: the checkpoint's log_history, which says how many of the step's own lines it knows; None for a training
    from the beginning, whose trainer_log.jsonl starts empty.
    """
    log = Path(output_dir) / TRAINER_LOG
    if log.exists():
        left = sum(entry.get("step") == step for entry in history or [])
        kept = []
        for line in whole_lines(log.read_bytes()).splitlines(keepends=True):
            entry = _entry(line)
            at = entry.get("current_steps")
            if history is None or at is None or at > step or "epoch" not in entry:
                continue
            if at == step:
                left -= 1
            if at < step or left >= 0:
                kept.append(line)
        write_atomic(log, b"".join(kept))
    anomalies = Path(output_dir) / ANOMALIES
    if anomalies.exists():
        lines = whole_lines(anomalies.read_bytes()).splitlines(keepends=True)
        write_atomic(anomalies, b"".join(line for line in lines if _entry(line).get("step", step + 1) <= step))
    if (Path(output_dir) / HISTORY).exists():
        drop_history_after(Path(output_dir) / HISTORY, step)


def _entry(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


class Survival(TrainerCallback):
    """Cuts the logs when a training begins, stops it on a signal, and marks each checkpoint as whole.

    trainer         set after the trainer was built
    evaluation_due  the evaluation of the current step is still to be made; a checkpoint keeps it
    stopping        all processes have agreed to stop after this step
    earlier         checkpoints of the training that overwrite_output_dir replaces, until the first new one is whole
    over            the training was resumed after its last step
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.trainer: Trainer | None = None
        self.evaluation_due = False
        self.stopping = False
        self.over = False
        self.earlier: list[Path] = []

    # whether to stop ----------------------------------------------------------------------------------------

    def agreed(self, ours: bool) -> bool:
        """Whether `ours` is true on any process."""
        if self.trainer.args.world_size == 1:
            return ours
        flag = torch.tensor(float(ours), device=self.trainer.args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def on_train_begin(self, args, state, control, **kwargs):
        self.request.saving = True
        resumed = state.global_step > 0
        if args.process_index == 0:
            self.earlier = [] if args.resume_from_checkpoint else complete.checkpoints(args.output_dir)
            cut_logs(args.output_dir, state.global_step, state.log_history if resumed else None)
        if self.trainer.args.world_size > 1:
            self.trainer.accelerator.wait_for_everyone()
        if resumed and hasattr(self.trainer, "restore_window") and self.trainer.restore_window():
            self.trainer.evaluate_now()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # resumed after its last step: Trainer would make one more
            self.over = control.should_training_stop = True

    def on_step_end(self, args, state, control, **kwargs):
        whole_epoch = float(state.epoch).is_integer()
        self.evaluation_due = args.eval_strategy == IntervalStrategy.EPOCH and whole_epoch
        exchanged = getattr(self.trainer, "signalled", None)  # with the step's anomalies, in one message
        if self.agreed(self.request.number is not None) if exchanged is None else exchanged:
            self.stopping = True
            self.evaluation_due |= control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopping or self.over:
            control.should_evaluate = control.should_save = control.should_log = False

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluation_due = False

    def on_train_end(self, args, state, control, **kwargs):
        self.request.saving = False
        self.request.phase = "after the last step. The same command makes what is left"

    # checkpoints --------------------------------------------------------------------------------------------

    def on_save(self, args, state, control, **kwargs):
        """Runs after every other callback has added its files."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.world_size > 1:
            self.trainer.accelerator.wait_for_everyone()
        if not args.should_save:
            return
        with told_of_full_disk(self.trainer):
            complete.finish(folder)
        for old in self.earlier:
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        self.earlier = []
        rotate_checkpoints(
            output_dir=args.output_dir,
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )


@contextmanager
def told_of_full_disk(trainer: Trainer) -> Iterator[None]:
    """Turns a failure to write the step's checkpoint into a UserError, after its half-written files were removed."""
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    try:
        yield
    except Exception as error:
        if not (reason := not_writable(error, folder.parent)):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {reason}. Repair that; {goes_on(trainer)}.") from error


def not_writable(error: BaseException, folder: Path) -> str:
    """Why `error` means that nothing can be written to `folder`, or ""."""
    code = error.errno if isinstance(error, OSError) else None
    if code in NO_SPACE or "No space left" in str(error):
        return "no space is left on its disk"
    if code in NOT_WRITABLE:
        name = error.filename if isinstance(error.filename, str) else str(folder)
        return str(error) if Path(name).absolute().is_relative_to(folder.absolute()) else ""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as lost:
        return str(lost)
    return "no space is left on its disk" if free < LITTLE and not isinstance(error, UserError) else ""


@contextmanager
def told_what_to_do(trainer: Trainer) -> Iterator[None]:
    """Turns failures of the machine during a training into a UserError that says how to go on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        output_dir = Path(trainer.args.output_dir)
        if is_of_lost_worker(error):
            forget_lost_workers()
            saved = _emergency_checkpoint(trainer)
            raise UserError(
                f"A dataloader worker was killed, probably for lack of memory: {saved}. Lower dataloader_num_workers "
                f"(now {trainer.args.dataloader_num_workers}) or free memory; {goes_on(trainer)}."
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            clear_frames(error.__traceback__)  # they hold the step's tensors
            raise UserError(_out_of_memory(trainer)) from error
        if reason := not_writable(error, output_dir):
            raise UserError(f"{output_dir} could not be written: {reason}. Repair that; {goes_on(trainer)}.") from error
        if trainer.args.world_size > 1 and any(words in str(error) for words in LOST_PEER):
            raise UserError(f"Another process of this training ended; {goes_on(trainer)}.") from error
        raise


def _out_of_memory(trainer: Trainer) -> str:
    """Saves the state where one step was made, and says which key helps."""
    layers = unwrap(trainer.model).get_decoder().layers
    count, step = recomputed(layers), trainer.state.global_step
    if not (trainer.is_in_train and trainer.model.training):
        return f"Out of memory during an evaluation: lower per_device_eval_batch_size; {goes_on(trainer)}."
    trainer.model.zero_grad(set_to_none=True)
    free_memory()
    saved = _emergency_checkpoint(trainer) if step else "no step was made"
    if count == len(layers):
        remedy = "lower per_device_train_batch_size or anyres_max_tiles"
    elif trainer.model.is_gradient_checkpointing or count:
        remedy = f"set `recompute: {more(count, len(layers))}`"
    else:
        remedy = "leave `disable_gradient_checkpointing` and `recompute` out"
    return (
        f"Out of memory in step {step + 1}, with {count} of {len(layers)} decoder layers recomputed: {saved}. "
        f"{remedy[0].upper()}{remedy[1:]}; {goes_on(trainer)}."
    )


def goes_on(trainer: Trainer) -> str:
    """How the training goes on, and from which of its checkpoints, as the middle of a sentence."""
    earlier = trainer.survival.earlier
    own = [path for path in complete.checkpoints(trainer.args.output_dir) if path not in earlier]
    newest = next((path for path in own if not complete.problem(path)), None)
    if newest is None:
        return "no checkpoint was saved before, so the same command starts again"
    return f"{same_command(trainer.args)} goes on from {newest.name}"


def same_command(args) -> str:
    """The command that goes on; under overwrite_output_dir the same one would start again."""
    overwrites = getattr(args, "overwrite_output_dir", False)
    return "the same command" + (" with overwrite_output_dir=false" if overwrites else "")


def _emergency_checkpoint(trainer: Trainer) -> str:
    """Saves the state between two steps; what came of it as the middle of a sentence."""
    step = trainer.state.global_step
    newest = complete.newest_whole(trainer.args.output_dir)
    if newest is None or complete.step_of(newest) != step:
        if trainer.args.world_size > 1 or not getattr(trainer, "back_to_step_begin", bool)():
            return "the state between two checkpoints could not be saved"
        trainer.save_now()
    return f"checkpoint-{step} is saved"


def attach(trainer: Trainer, request: StopRequest) -> None:
    """Adds the callback as the trainer's last one, and lets no logging service stop the training."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.integrations") or isinstance(callback, WandbExamples):
            tolerate(callback)
    trainer.survival = Survival(request)
    trainer.survival.trainer = trainer
    trainer.add_callback(trainer.survival)


def _forget_wandb_settings() -> None:
    """Lets W&B read its environment variables again."""
    with suppress(Exception):
        import wandb

        wandb.teardown()


def tolerate(callback: TrainerCallback) -> None:
    """Makes a logging service's callback warn once and fall silent where it would stop the training.

    W&B is tried once more in its offline mode, so that the run can be sent later.
    """
    name = type(callback).__name__.removesuffix("Callback")
    failed: list[Exception] = []

    def guarded(event: str):
        original = getattr(callback, event)

        def call(*args, **kwargs):
            if failed:
                return None
            try:
                return original(*args, **kwargs)
            except Exception as error:
                line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if name == "Wandb" and event == "setup" and os.environ.get("WANDB_MODE") != "offline":
                    os.environ["WANDB_MODE"] = "offline"
                    _forget_wandb_settings()
                    logger.warning_rank0(
                        f"W&B failed ({line}); this run is logged offline. Send it later: "
                        "wandb sync wandb/offline-run-*"
                    )
                    return call(*args, **kwargs)
                failed.append(error)
                logger.warning_rank0(f"{name} failed ({line}) and gets nothing more of this run; the training goes on.")

        return call

    for event in ("setup", *EVENTS):
        if hasattr(callback, event):
            setattr(callback, event, guarded(event))
