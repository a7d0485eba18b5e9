"""What touches the inside of transformers 5.5.4, PEFT 0.18 and accelerate 1.11, in one place.

Each function says what it works around. `other_versions` says when another version is installed than these were
written for; tests/test_upstream.py fails once a work-around is no longer needed.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate.utils
import numpy as np
import torch
from accelerate.utils.constants import OPTIMIZER_NAME
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import StateDictType
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

WRITTEN_FOR = {"transformers": "5.5.4", "accelerate": "1.11.0", "peft": "0.18.1"}
API_WRITTEN_FOR = {"uvicorn": "0.54.0"}  # `http_with_deadline`


def other_versions(written_for: Mapping[str, str] = WRITTEN_FOR) -> str:
    """The installed versions that differ from the wanted ones, as one sentence; "" if all are the same."""
    found = {name: importlib.metadata.version(name) for name in written_for}
    other = [
        f"{name} {found[name]} (written for {wanted})" for name, wanted in written_for.items() if found[name] != wanted
    ]
    return f"Other versions than this plugin was written for: {', '.join(other)}." if other else ""


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Inside, models are built as without DeepSpeed.

    With a ZeRO-3 configuration alive, transformers 5.5.4 enters `deepspeed.zero.Init` in every `_from_config`
    (modeling_utils.py), which cannot initialize weights on the meta device.
    """
    from transformers.integrations import deepspeed

    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive


def dtype_to_load(config, files: Sequence[Path]) -> torch.dtype:
    """The dtype that transformers 5.5.4's `from_pretrained(dtype="auto")` gives every weight of a checkpoint.

    files: its safetensors files; the first is asked where the config names no dtype (modeling_utils.py, _get_dtype).
    """
    from transformers import modeling_utils

    names = [str(file) for file in files]
    return modeling_utils._get_dtype("auto", names, config, None, None, weights_only=True, hf_quantizer=None)[1]


def keep_present_layer_names(model: torch.nn.Module) -> None:
    """Takes the names of classes that the model does not have out of `_no_split_modules`, in the model and its parts.

    LlavaNextPreTrainedModel names LlamaDecoderLayer whatever its language model is (modeling_llava_next.py), and both
    PEFT's and accelerate's FSDP wrap policies stop at a name that they do not find.
    """
    present = {type(module).__name__ for module in model.modules()}
    for module in model.modules():
        names = getattr(module, "_no_split_modules", None)
        if names:
            module._no_split_modules = {name for name in names if name in present}


def keep_frozen_tower_out_of_autograd(tower: torch.nn.Module) -> int:
    """Takes the hooks off a frozen vision tower that make its activations require gradients; returns how many.

    For a checkpointed model that is not quantized PEFT calls `enable_input_require_grads`, and transformers 5.5.4 hooks
    the input embedding of every PreTrainedModel inside (modeling_utils.py), CLIP's patch convolution too. LLaMA-Factory
    recomputes no frozen layer, so the whole tower would keep its activations for a backward that nobody reads.
    """
    if any(parameter.requires_grad for parameter in tower.parameters()):
        return 0
    removed = 0
    for module in tower.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                del module._forward_hooks[key]
                removed += 1
    return removed


class ListsOnHost(TorchFunctionMode):
    """Inside, `torch.tensor` leaves its data on the host, whatever device is asked for.

    LlavaNextModel.pack_image_features of transformers 5.5.4 makes a tensor of the images' lengths on the device, which
    waits for the vision tower; nothing reads it.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs.pop("device", None)
        return func(*args, **kwargs)


def recompute_first(layers: Sequence[torch.nn.Module], count: int) -> None:
    """Lets the first `count` of the layers run their forward again in the backward pass, and the others not.

    A switch of every layer in transformers 5.5.4 (modeling_layers.py, GradientCheckpointingLayer), which its own
    methods set for a whole model. The last layers keep their activations, because the backward pass frees them first.
    Raises ValueError for layers without the switch, or that no checkpointing function was given to.
    """
    for number, layer in enumerate(layers):
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(f"{type(layer).__name__} is no GradientCheckpointingLayer: it cannot be recomputed")
        if number < count and not hasattr(layer, "_gradient_checkpointing_func"):
            raise ValueError(f"layer {number} has no checkpointing function: gradient checkpointing is not enabled")
        layer.gradient_checkpointing = number < count


def recomputed(layers: Sequence[torch.nn.Module]) -> int:
    """How many of the layers run their forward again in the backward pass."""
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers)


def _same_storage(storage, location: str):
    return storage if re.fullmatch(r"cpu:\d+", location) else None


def load_onto_numbered_cpus() -> None:
    """Lets `torch.load(map_location="cpu:0")` work, which torch 2.11 refuses: a CPU is a CPU.

    In several processes on CPUs transformers' Trainer loads the optimizer onto its device, and that is cpu:0.
    """
    if not any(entry[2] is _same_storage for entry in torch.serialization._package_registry):
        torch.serialization.register_package(40, lambda storage: None, _same_storage)


@contextmanager
def whole_weights(accelerator) -> Iterator[None]:
    """Inside, Trainer's `save_model` gathers the weights of a sharded model and saves them.

    transformers 5.5.4 saves nothing there under FSDP while `state_dict_type` is SHARDED_STATE_DICT, which is
    accelerate's choice for FSDP 2: a training would end without a model, and checkpoints would hold no adapter.
    """
    plugin = accelerator.state.fsdp_plugin
    before = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = before


def _load_fsdp_optimizer(plugin, accelerator, optimizer, model, input_dir, optimizer_index=0, **more) -> None:
    if plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        accelerate.utils.load_fsdp_optimizer(plugin, accelerator, optimizer, model, input_dir, optimizer_index, **more)
        return
    accelerator.wait_for_everyone()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}  # with moments, which are zero
    checkpoint.load(state, checkpoint_id=str(Path(input_dir) / f"{OPTIMIZER_NAME}_{optimizer_index}"))
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


@contextmanager
def fsdp_optimizer_loaded() -> Iterator[None]:
    """Inside, Trainer loads the state of the optimizer under FSDP 2 as well.

    accelerate 1.11 reads a sharded checkpoint into the state of a new optimizer, which is empty (fsdp_utils.py,
    load_fsdp_optimizer): nothing is read, and the training goes on without the moments, silently.
    """
    import transformers.trainer

    with mock.patch.object(transformers.trainer, "load_fsdp_optimizer", _load_fsdp_optimizer, create=True):
        yield


@contextmanager
def without_rotation() -> Iterator[None]:
    """Inside, Trainer deletes no older checkpoints.

    transformers 5.5.4 does so in `_save_checkpoint`, before other processes and callbacks have written their files.
    """
    import transformers.trainer

    with mock.patch.object(transformers.trainer, "rotate_checkpoints", lambda *args, **kwargs: None):
        yield


def import_llamafactory() -> None:
    """Imports LLaMA-Factory in the order of its own commands, which alone works with transformers 5.5.4.

    `llamafactory.hparams` comes first: with `llamafactory.model` first, trl 0.24 takes transformers' pair (False, None)
    for "mergekit is installed", and nothing that imports its DPOTrainer can be imported any more.
    """
    import llamafactory.hparams
    import llamafactory.train.dpo.trainer  # noqa: F401


def stock_orpo_loss(model, batch: dict[str, Any], beta: float, device: torch.device) -> torch.Tensor:
    """The ORPO loss, a scalar, of LLaMA-Factory's own step, without a dataset and a trainer around it.

    batch: what its PairwiseDataCollatorWithPadding makes. llamafactory 0.9.5's `get_batch_loss_metrics` is called on a
    CustomDPOTrainer that has only what it reads there (train/dpo/trainer.py); AttributeError when it reads more.
    """
    import_llamafactory()
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    trainer = object.__new__(CustomDPOTrainer)
    trainer.finetuning_args = SimpleNamespace(use_ref_model=False)
    trainer.accelerator = SimpleNamespace(device=device)
    trainer.loss_type, trainer.beta, trainer.ftx_gamma, trainer.ld_alpha = "orpo", beta, 0.0, None
    loss, _ = trainer.get_batch_loss_metrics(model, batch)
    return loss


def is_of_lost_worker(error: BaseException) -> bool:
    """Whether `error` says that a dataloader worker ended.

    torch says so itself once the worker has ended. One that is killed after it has announced a batch is still ending
    when its tensors are asked for, and then the broken connection is all that torch tells.
    """
    if "DataLoader worker" in str(error):
        return True
    code = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data.__code__
    fetched = any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))
    return fetched and isinstance(error, (ConnectionError, EOFError, FileNotFoundError))


def forget_lost_workers() -> None:
    """Takes torch's handler for ended child processes away, until the next loader with workers is made.

    A worker that is still ending would be told of in the middle of what the program does next.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = False


def read_window(trainer) -> dict[str, Any]:
    """What Trainer knows of the losses since its last log and before it, which its checkpoints leave out."""
    return {
        "loss": trainer._tr_loss.detach().cpu(),
        "logged_loss": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
    }


def write_window(trainer, window: dict[str, Any]) -> None:
    """Gives a resumed trainer back what `read_window` took."""
    trainer._tr_loss.copy_(window["loss"])
    trainer._total_loss_scalar = window["logged_loss"]
    trainer._globalstep_last_logged = window["logged_step"]


class LossOnHost(float):
    """The mean loss of all processes, read from the device, where Trainer expects a tensor to gather and to read."""

    def mean(self) -> LossOnHost:
        return self

    def item(self) -> float:
        return float(self)


def logs_now(trainer) -> bool:
    """Whether Trainer's `_maybe_log_save_evaluate` is about to log."""
    return trainer.control.should_log and trainer.state.global_step > trainer._globalstep_last_logged


def mean_loss(loss: torch.Tensor, arguments) -> torch.Tensor:
    """The mean of all processes' losses on the device, as Trainer logs it."""
    import transformers.trainer

    return transformers.trainer.nested_gather(loss, arguments.parallel_mode).mean()


@contextmanager
def loss_on_host() -> Iterator[None]:
    """Inside, Trainer takes a `LossOnHost` for the loss of its next log.

    transformers 5.5.4 reads loss and gradient norm from the device one after the other, and waits for it twice.
    """
    import transformers.trainer

    gather = transformers.trainer.nested_gather

    def gather_tensors(tensors, *args, **kwargs):
        return tensors if isinstance(tensors, LossOnHost) else gather(tensors, *args, **kwargs)

    with mock.patch.object(transformers.trainer, "nested_gather", gather_tensors):
        yield


def step_loss(trainer) -> torch.Tensor | None:
    """A copy of the sum of losses since the last log; None before the training."""
    loss = getattr(trainer, "_tr_loss", None)
    return None if loss is None else loss.clone()


def set_step_loss(trainer, loss: torch.Tensor | None) -> None:
    """Puts the sum of losses back to what `step_loss` gave, out of which a broken step falls."""
    if loss is not None:
        trainer._tr_loss.copy_(loss)


def forget_step(trainer) -> None:
    """Takes the running step out of the number of steps that the next log's loss is the mean of."""
    trainer._globalstep_last_logged += 1


def random_state() -> dict[str, Any]:
    """The random states that Trainer's checkpoints hold."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    return {**state, "cuda": torch.cuda.random.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the random states back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.random.set_rng_state(state["cuda"])


def http_with_deadline(seconds: float, body: bytes) -> type:
    """uvicorn's HTTP protocol, on whose connections the head of a request must be whole after some seconds.

    Later it is answered with status 408 and `body`, JSON, and the connection is closed. uvicorn 0.54 lets a client that
    sends a head byte by byte, or nothing at all, stay connected for ever (protocols/http/h11_impl.py); between two
    requests of a connection its own timeout_keep_alive holds.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
    late = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    class Protocol(H11Protocol):
        deadline = None

        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
            super().connection_lost(exc)

        def watch(self) -> None:
            """Starts the clock where a head has begun, or nothing ever came; stops it where a head is whole."""
            begun = self.cycle is None or bool(self.conn.trailing_data[0])
            if self.conn.their_state is h11.IDLE and begun:
                self.deadline = self.deadline or self.loop.call_later(seconds, self.too_late)
            elif self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def too_late(self) -> None:
            if not self.transport.is_closing():
                self.transport.write(late)
                self.transport.close()

    return Protocol
