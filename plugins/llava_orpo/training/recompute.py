"""`recompute: auto`: as few recomputed decoder layers as the GPU's memory allows, computed and tried before step 1.

Where a micro-batch of several pairs does not fit with all of them, it runs in parts (`max_tokens_per_step`).
"""

from __future__ import annotations

import gc
import logging as python_logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from llamafactory.extras import logging
from transformers import TrainerCallback

from .. import upstream
from ..errors import UserError
from ..plan.recomputed import Recomputed
from ..plan.report import RESERVE, need_of
from ..plan.sizes import group_tokens, sizes_of
from ..plan.trace import PairSize, Setting
from ..step.attention import unwrap
from ..step.batches import cut_to_fit
from ..step.order import Drawn, PaddedRows
from ..step.parts import parts_of

logger = logging.get_logger("llamafactory." + __name__)
NOTCHES = 8  # going back on out-of-memory recomputes an eighth of the layers more
NO_LIMIT = 1 << 24  # tokens of a forward; what a process says that needs no parts


def memory_limit(device: torch.device) -> int | None:
    """Bytes that this process can have on the device, what it has now included; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def more(count: int, layers: int) -> int:
    """How many layers are recomputed one notch back from `count`."""
    return min(layers, count + max(1, layers // NOTCHES))


class FewestLayers(TrainerCallback):
    """Chooses how many decoder layers are recomputed when the training begins; nothing else of it changes.

    trainer: a SharedPrefixTrainer. keys: the recipe's keys as LLaMA-Factory parsed them, the plugin's among them.

    The number comes from tracing the longest batch (see `plan`), and is the largest of all processes. Where each
    process holds the whole model, that batch then runs forward and backward once; out of memory, on any process, means
    one notch more. Sharded models (DeepSpeed, FSDP) are not tried: a process that fails leaves the others waiting.
    """

    def __init__(self, trainer, keys: Mapping[str, Any]) -> None:
        self.trainer, self.keys = trainer, keys

    def on_train_begin(self, args, state, control, **kwargs):
        limit = memory_limit(args.device)
        layers = unwrap(self.trainer.model).get_decoder().layers
        random = upstream.random_state()
        count, allowed = (len(layers), NO_LIMIT) if limit is None else self._planned(limit, len(layers))
        count, allowed = self._largest(count), -self._largest(-allowed)
        upstream.recompute_first(layers, count)
        if allowed < NO_LIMIT:
            self._limit_tokens(allowed)
        sharded = self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled
        if self._largest(limit is not None) and not sharded:
            count = self._tried(layers, count)
        upstream.set_random_state(random)
        if limit is not None:
            logger.info_rank0(
                f"recompute: auto recomputes {count} of {len(layers)} decoder layers"
                + (" (computed, not tried on a sharded model)." if sharded else ".")
            )

    def traces(self) -> Recomputed:
        """Traces of the longest batch. Raises UserError for a recipe whose memory is not computed."""
        data = sizes_of(self.trainer.train_dataset, self.keys, unwrap(self.trainer.model).config)
        groups = [[data.sizes[i] for i in run] for run in self._longest(data)]
        if self.trainer.data_collator.max_tokens is not None:
            groups = max(cut_to_fit(groups, _tokens, self.trainer.data_collator.max_tokens), key=_tokens)
        return self._traces_of(groups)

    def _traces_of(self, groups: list[list[PairSize]]) -> Recomputed:
        config = unwrap(self.trainer.model).config
        setting = Setting.of(self.keys, "cuda", config)
        ranks, engine = self.trainer.args.world_size, self._engine()
        return Recomputed(config, setting, groups, lambda t: need_of(t, ranks, setting.quantized, engine))

    def _planned(self, limit: int, layers: int) -> tuple[int, int]:
        """(the fewest layers that fit by computation, with the plan's reserve, or all; the most tokens of a forward).

        The second is NO_LIMIT where the longest batch fits whole, and where a single pair of it would not fit either.
        """
        try:
            traces = self.traces()
        except UserError as error:
            logger.warning_rank0(f"recompute: auto is all here, because memory is not computed: {error}")
            return layers, NO_LIMIT
        with _quiet(), upstream.without_zero_init():
            count = traces.fewest(limit)
            allowed = NO_LIMIT if count is not None else self._allowed_tokens(traces, limit, layers)
        need = traces.need(layers if count is None else count)
        found = (
            f"recompute: {need / 1e9:.1f} GB computed for the longest batch ({traces.at(0).tokens:,} tokens, "
            f"{RESERVE / 1e9:.1f} GB of it reserve) with "
        )
        room = f"; {limit / 1e9:.1f} GB can be had."
        if count is None:
            remedy = " It may not fit: see scripts/plan.py." if allowed == NO_LIMIT else ""
            logger.warning_rank0(f"{found}all layers recomputed{room}{remedy}")
            return layers, allowed
        logger.info_rank0(f"{found}{count} of {layers} layers recomputed{room}")
        return count, NO_LIMIT

    def _allowed_tokens(self, traces: Recomputed, limit: int, layers: int) -> int:
        """The tokens of a forward that fit with all layers recomputed, between the longest pair and the whole batch.

        Memory grows with the tokens about as between these two, which are traced.
        """
        pair = max((pair for group in traces.groups for pair in group), key=lambda pair: group_tokens([pair]))
        if len(traces.groups) == len(traces.groups[0]) == 1 or not self.trainer.takes_a_limit:
            return NO_LIMIT
        one = self._traces_of([[pair]])
        if one.need(layers) > limit:
            return NO_LIMIT
        least, most = one.at(layers).tokens, traces.at(layers).tokens
        share = (limit - one.need(layers)) / (traces.need(layers) - one.need(layers))
        return least + int(share * (most - least))

    def _limit_tokens(self, allowed: int) -> None:
        self.trainer.limit_tokens(allowed)
        logger.warning_rank0(
            f"recompute: micro-batches of more than {allowed:,} tokens run in parts, because they do not fit with all "
            "layers recomputed."
        )

    def _longest(self, data) -> list[list[int]]:
        """The numbers of the pairs of the longest batch, one list per group."""
        arguments = self.trainer.plugin
        grouped = arguments.max_pairs_per_image if arguments.group_pairs_by_image else None
        return data.longest(self.trainer.args.per_device_train_batch_size, grouped)

    def _engine(self) -> str | None:
        """The name under which `plan.report.engines` counts this run; None: DDP or one GPU."""
        if self.trainer.is_fsdp_enabled:
            return "ZeRO-3 / FSDP"
        if not self.trainer.is_deepspeed_enabled:
            return None
        stage = self.trainer.accelerator.state.deepspeed_plugin.zero_stage
        return {2: "ZeRO-2", 3: "ZeRO-3 / FSDP"}.get(stage)

    def _largest(self, value: float) -> int:
        """The largest of the processes' values."""
        if self.trainer.args.world_size == 1:
            return int(value)
        found = torch.tensor(float(value), device=self.trainer.args.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return int(found.item())

    def _tried(self, layers, count: int) -> int:
        """Runs the longest batch with `count` layers recomputed, or as many more as it takes; returns their number.

        Raises UserError if it does not even fit with all of them.
        """
        data = sizes_of(self.trainer.train_dataset, self.keys, unwrap(self.trainer.model).config)
        longest_batch = [i for run in self._longest(data) for i in run]
        rows = PaddedRows(self.trainer.train_dataset).__getitems__([Drawn(i) for i in longest_batch])
        pair = max(group_tokens([data.sizes[i]]) for i in longest_batch)
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
        while self._largest(not self._fits(batch)):
            if count == len(layers):
                longest = _longest_part(batch)
                if self.trainer.takes_a_limit and longest > pair:
                    self._limit_tokens(max(pair, longest * 3 // 4))
                    batch = self.trainer._prepare_inputs(self.trainer.data_collator(rows))
                    if _longest_part(batch) < longest:
                        continue
                raise UserError(
                    "Out of memory before the first step, on the longest batch of the data with every decoder layer "
                    "recomputed. Lower per_device_train_batch_size or anyres_max_tiles; `python scripts/plan.py` with "
                    "this recipe names what fits."
                )
            before, count = count, more(count, len(layers))
            upstream.recompute_first(layers, count)
            logger.warning_rank0(
                f"recompute: the longest batch does not fit with {before} of {len(layers)} layers recomputed; "
                f"now {count} are."
            )
        return count

    def _fits(self, batch: dict[str, Any]) -> bool:
        """Whether one forward and backward fit beside the gradients and moments that later steps hold."""
        trainer, model = self.trainer, self.trainer.model
        training, fits = model.training, True
        model.train()
        try:
            with self._later_tensors():
                for part in parts_of(batch):
                    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                        loss = trainer.pair_losses(model, part)[0]["loss"].mean()
                    loss.backward()
                    del loss
        except torch.OutOfMemoryError:  # it and its frames, which hold tensors, are gone after this block
            fits = False
        model.zero_grad(set_to_none=True)
        model.train(training)
        if not fits:
            free_memory()
        return fits

    @contextmanager
    def _later_tensors(self) -> Iterator[None]:
        """Inside, there are tensors like the gradients of earlier micro-batches and the optimizer's moments."""
        learnt = [p for p in self.trainer.model.parameters() if p.requires_grad]
        moments = []
        if not self.trainer.optimizer.state:
            moments = [torch.empty_like(p) for p in learnt for _ in range(2)]
        if self.trainer.args.gradient_accumulation_steps > 1:
            for parameter in learnt:
                parameter.grad = torch.zeros_like(parameter)
        yield
        moments.clear()


def _tokens(groups: list[list[PairSize]]) -> int:
    return sum(map(group_tokens, groups))


def _longest_part(batch: dict[str, Any]) -> int:
    return max(part["packed"].num_tokens for part in parts_of(batch))


def free_memory() -> None:
    """Gives the memory of tensors that nothing needs any more back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, nobody logs that a model is made ready for training: each trace makes one."""
    before = python_logging.root.manager.disable
    python_logging.disable(python_logging.INFO)
    try:
        yield
    finally:
        python_logging.disable(before)
