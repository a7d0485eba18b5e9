"""The alarm: before its first step a training scores its first batch with the images made grey (`image_check: true`).

Nobody sees a model that trains without its images, because its loss falls all the same. Two things are looked at,
without gradients, and no random state is changed:

- The log-probs of the chosen answers must move when every image of the batch is made grey.
- Up to four of its pairs must have the log-probs of a plain transformers forward over prompt, answer and the pair's own
  image. That catches images that went to other pairs, which grey ones cannot show. The plain forward shares weights,
  token ids and the image's bytes with the step, and nothing else.

Both are measured in nats per token: the mean over a chosen answer's tokens of |difference of log-probs|, the largest of
all pairs. Measured on a CPU by `python -m pytest -s -m heavy tests/training/test_image_check.py`, on five random models
and on the demo's, before and after ORPO, in fp32, NF4, bf16, NF4 with bf16, and with `shared_prefix: false`:

    moved by grey images                  8.0e-2 to 1.4; 0 exactly where the image path is broken
    from the plain forward, fp32 and NF4  at most 2.9e-7
    from the plain forward, bf16          at most 4.0e-3
    the same with the images swapped      5.2e-2 to 1.2, and at least 0.34 of what grey images move
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from llamafactory.extras import logging
from llamafactory.extras.constants import IGNORE_INDEX
from transformers import TrainerCallback

from .. import upstream
from ..data import images
from ..data.conversation import full_prompt_ids
from ..data.image_store import load_image
from ..errors import UserError
from ..step.attention import unwrap
from ..step.collator import SharedPrefixCollator
from ..step.model import packed_logps
from ..step.order import PaddedRows
from ..step.parts import parts_of
from ..step.token_logps import token_logps

logger = logging.get_logger("llamafactory." + __name__)
MOVED = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # grey images must move more
# A plain forward must be nearer than this, or than a share of what grey images move: the rounding of 16 bits grows with
# the log-probs, which are larger in a real model.
NEAR = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
NEAR_SHARE = 0.1
PLAIN_PAIRS = 4
BATCHES = 8  # so many of a process's batches are looked through for one with an image
REMEDY = "`image_check: false` trains without this check."


class Answer(NamedTuple):
    """A pair of a batch and the log-probs of its chosen answer's tokens, (tokens,) fp32 on the host."""

    row: dict[str, Any]
    logps: torch.Tensor
    counts: bool  # whether it has an image and a weight in the loss


class ImageCheck(TrainerCallback):
    """Stops a training whose images do not reach the model, before its first step, on all processes.

    trainer: a SharedPrefixTrainer, or LLaMA-Factory's own over rows of `PairProcessor`. Pairs without an image are
    passed over, and so are batches whose every image is of one colour. A resumed training is not checked again.
    Raises UserError, one line.
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            return
        random = upstream.random_state()
        try:
            complaint = self._complaint()
        finally:
            upstream.set_random_state(random)
        if complaint:
            raise UserError(complaint)

    @property
    def _together(self) -> bool:
        """Whether every forward needs all processes, because they gather sharded weights in it."""
        return self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled

    @property
    def _packs(self) -> bool:
        return isinstance(self.trainer.data_collator, SharedPrefixCollator)

    def _complaint(self) -> str:
        """What is wrong on the first process that finds something, or ""."""
        rows = self._first_rows()
        if not any(self._of_all_processes(rows is not None)):
            logger.info_rank0(
                f"image_check: no image of more than one colour in the first {BATCHES} batches; nothing was checked."
            )
            return ""
        complaint = ""
        if rows is not None or self._together:
            complaint = self._look(rows or self._rows_of_batch(0))
        return next(filter(None, self._of_all_processes(complaint)), "")

    def _of_all_processes(self, value: Any) -> list[Any]:
        if self.trainer.args.world_size == 1:
            return [value]
        values = [None] * self.trainer.args.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    # the batch ----------------------------------------------------------------------------------------------

    def _first_rows(self) -> list[dict[str, Any]] | None:
        """The rows of this process's first batch that shows something; None if the first few show nothing."""
        for number in range(BATCHES):
            rows = self._rows_of_batch(number)
            if any(_shows_something(row) for row in rows):
                return rows
        return None

    def _rows_of_batch(self, number: int) -> list[dict[str, Any]]:
        """The rows of this process's batch in the first epoch; the training's own dataloader is not touched.

        LLaMA-Factory's trainer draws its order when an epoch begins: for it these are the first rows of the data.
        """
        trainer, args = self.trainer, self.trainer.args
        order = list(trainer._get_train_sampler()) if self._packs else list(range(len(trainer.train_dataset)))
        size = trainer._train_batch_size
        if args.accelerator_config.split_batches:
            size //= args.world_size
        start = (number * args.world_size + args.process_index) * size
        numbers = order[start : start + size] or order[: size if number == 0 else 0]
        return [dict(row) for row in PaddedRows(trainer.train_dataset).__getitems__(numbers)] if numbers else []

    # the forwards -------------------------------------------------------------------------------------------

    def _look(self, rows: list[dict[str, Any]]) -> str:
        """What is wrong with a batch of these rows, or ""."""
        trainer = self.trainer
        model = trainer.model_wrapped if self._together else trainer.model
        with (
            _evaluating(model),
            torch.no_grad(),
            trainer.compute_loss_context_manager(),
            trainer.accelerator.autocast(),
        ):
            shown = self._answers(model, rows)
            hidden = self._answers(model, [_grey(row) for row in rows])
            counted = [pair for pair in zip(shown, hidden, strict=True) if pair[0].counts]
            some = _of_different_images([answer for answer, _ in counted])[:PLAIN_PAIRS]
            plain = [self._plain_logps(model, answer.row) for answer in some]
            if self._together:  # as many forwards as on the other processes
                for _ in range(PLAIN_PAIRS - len(plain)):
                    self._plain_logps(model, self._stand_in(rows[0]))
        moved = _finite([_apart(answer.logps, grey.logps) for answer, grey in counted])
        apart = [_apart(answer.logps, logps) for answer, logps in zip(some, plain, strict=True)]
        if not moved:
            return ""  # no answer here has an image, or none has a finite log-prob (see `anomalies`)
        dtype = self._dtype()
        if max(moved) <= MOVED[dtype]:
            return (
                f"The image does not reach the model: grey images move the log-probs of the first batch by "
                f"{max(moved):.1e} nats per token (more than {MOVED[dtype]:.0e} is expected), so this training would "
                f"not learn from its images. {REMEDY}"
            )
        farthest, limit = max(_finite(apart), default=0.0), max(NEAR[dtype], NEAR_SHARE * max(moved))
        if farthest > limit:
            worst = apart.index(farthest)
            name = some[worst].row["pair_id"] or repr(some[worst].row["question"])
            return (
                f"Pair {name} does not see its own image: the log-probs of its chosen answer are {farthest:.1e} "
                f"nats per token from those of a plain forward with that image (at most {limit:.1e} is expected), "
                f"so images of the first batch may be swapped. {REMEDY}"
            )
        logger.info_rank0(
            f"image_check: grey images move the log-probs of the first batch by {max(moved):.1e} nats per token; "
            f"{len(apart)} of its pairs are within {farthest:.1e} of a plain forward."
        )
        return ""

    def _dtype(self) -> torch.dtype:
        """What the model computes in."""
        args = self.trainer.args
        if args.bf16 or args.fp16 or args.tf32:  # TF32 has the mantissa of fp16
            return torch.bfloat16 if args.bf16 else torch.float16
        return unwrap(self.trainer.model).get_output_embeddings().weight.dtype

    def _answers(self, model, rows: list[dict[str, Any]]) -> list[Answer]:
        """The pairs of the batch that the collator makes of `rows`, scored as the step scores them."""
        trainer = self.trainer
        batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
        if not self._packs:
            return _answers_of_two_sequences(model, batch, rows)
        (batch,) = trainer._in_lockstep([batch])
        answers = []
        for part in parts_of(batch):
            scored = packed_logps(model, part, trainer.args.device, skip_unread=trainer._tower_frozen)
            logps = token_logps(scored.logits.reshape(-1, scored.logits.shape[-1]), scored.packed.targets)
            by_response = logps.cpu().split(scored.packed.response_lengths)  # chosen first
            for row, weight, each in zip(part["rows"], part["weights"].tolist(), by_response, strict=False):
                answers.append(Answer(row, each, bool(weight) and row["image"] is not None))
        return answers

    def _plain_logps(self, model, row: dict[str, Any]) -> torch.Tensor:
        """The log-probs of the chosen answer's tokens, as transformers scores one plain sequence with one image."""
        answer = row["chosen_ids"]
        ids = torch.tensor([[*full_prompt_ids(row, self._image_token), *answer]])
        pictures = self.trainer.data_collator.processor.image_processor([load_image(row["image"])], return_tensors="pt")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
        inputs = self.trainer._prepare_inputs(inputs)
        logits = model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
        return token_logps(logits, inputs["input_ids"][0, -len(answer) :]).cpu()

    @property
    def _image_token(self) -> int:
        return unwrap(self.trainer.model).config.image_token_id

    def _stand_in(self, row: dict[str, Any]) -> dict[str, Any]:
        return SharedPrefixCollator(self.trainer.data_collator.processor, self._image_token)._stand_in(row)


def _answers_of_two_sequences(model, batch: dict[str, torch.Tensor], rows: list[dict[str, Any]]) -> list[Answer]:
    """The same from a batch of LLaMA-Factory's collator: all chosen sequences, then all rejected ones."""
    labels = batch["labels"][: len(rows), 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    answers = []
    for row, logit, label in zip(rows, logits, labels, strict=False):
        at = (label != IGNORE_INDEX).nonzero()[:, 0]
        answers.append(Answer(row, token_logps(logit[at], label[at]).cpu(), row["image"] is not None))
    return answers


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode; afterwards each is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shows_something(row: dict[str, Any]) -> bool:
    """Whether the row has an image that can be read and has more than one colour."""
    if row["image"] is None or row.get("padding"):
        return False
    try:
        return any(low != high for low, high in load_image(row["image"]).getextrema())
    except (images.ImageError, OSError):
        return False


def _grey(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a grey image of the same size, for either collator."""
    if row["image"] is None:
        return row
    grey = images.grey_like(row["width"], row["height"])
    return {**row, "image": grey, **({"images": [grey]} if "images" in row else {})}


def _of_different_images(answers: Sequence[Answer]) -> list[Answer]:
    """The answers in their order, those of an image that came before last."""
    first: list[Answer] = []
    again: list[Answer] = []
    seen = set()
    for answer in answers:
        name = answer.row["image_hash"] or id(answer)
        (again if name in seen else first).append(answer)
        seen.add(name)
    return first + again


def _apart(logps: torch.Tensor, others: torch.Tensor) -> float:
    """The mean of |difference|, in nats per token."""
    return (logps.double() - others.double()).abs().mean().item()


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if value < float("inf")]
