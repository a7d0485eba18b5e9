"""The order in which pairs are trained: the same for any number of processes, and complete without a repeated pair.

Which pairs make up an optimizer step depends on seed, epoch and global batch alone, so a run may be resumed on another
number of processes with the same global batch. Where an epoch does not fill its last global batch, the missing places
are held by `Padding`: a rank without a pair runs a masked one, and no pair counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from .batches import fill_batches, image_runs


class Drawn(int):
    """The number of a pair as an epoch draws it; `epoch` travels with it into the dataloader's workers."""

    epoch: int

    def __new__(cls, number: int, epoch: int = 0) -> Drawn:
        made = super().__new__(cls, number)
        made.epoch = epoch
        return made

    def __getnewargs__(self) -> tuple[int, int]:
        return int(self), self.epoch


class Padding(Drawn):
    """The number of a pair that holds an empty place of a batch: it is loaded, but has no weight."""


class PaddedRows(Dataset):
    """The rows of a training set by number.

    The row of a `Drawn` number gets its `epoch` and its `place`, the number itself; that of a `Padding` number is also
    marked with `padding: True`.
    """

    def __init__(self, rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        found = self.rows.__getitems__([int(index) for index in indices])
        return [{**row, **_marks(index)} for row, index in zip(found, indices, strict=True)]


def _marks(index: int) -> dict[str, Any]:
    if not isinstance(index, Drawn):
        return {}
    marks: dict[str, Any] = {"epoch": index.epoch, "place": int(index)}
    return {**marks, "padding": True} if isinstance(index, Padding) else marks


class PairOrder(Sampler[int]):
    """Every pair once per epoch, shuffled or in the given order, padded to whole batches on every process.

    Args:
        n: number of pairs.
        global_batch: pairs per optimizer step, over all processes and accumulation steps.
        batch_size: pairs per process and micro-batch.
        processes: micro-batches that run at a time.
        seed, epoch_now: the shuffle of epoch e is `torch.randperm` seeded with seed + e, as accelerate 1.11's
            SeedableRandomSampler draws it. epoch_now says which epoch it is: accelerate's own `set_epoch` does not
            reach a sampler below a resumed run's skipped batches. Without it epochs are counted here.
        image_hashes, max_pairs: puts pairs of one image together, at most max_pairs of them. Cells of max_pairs pairs
            are filled with whole runs (see `batches.fill_batches`) and shuffled; each global batch is a stretch of
            that order, arranged so that micro-batches hold whole runs as far as they fit.
        pad: False where the dataloader drops what does not fill a batch on every process.
    """

    def __init__(
        self,
        n: int,
        *,
        global_batch: int,
        batch_size: int,
        processes: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        image_hashes: Sequence[str] | None = None,
        max_pairs: int = 1,
        epoch_now: Callable[[], int] | None = None,
        pad: bool = True,
    ):
        self.n, self.global_batch, self.batch_size, self.processes = n, global_batch, batch_size, processes
        self.shuffle, self.seed, self.pad = shuffle, seed, pad
        self.image_hashes = None if image_hashes is None else list(image_hashes)
        self.max_pairs, self.epoch_now = max_pairs, epoch_now
        self.epoch = 0

    def __len__(self) -> int:
        return self.n + (-self.n % (self.batch_size * self.processes) if self.pad else 0)

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch, as transformers' Trainer counts them."""
        rounds = len(self) // (self.batch_size * self.processes)  # micro-batches per process
        accumulated = self.global_batch // (self.batch_size * self.processes)
        return max(-(-rounds // accumulated), 1)

    def __iter__(self) -> Iterator[int]:
        if self.epoch_now is not None:
            self.epoch = self.epoch_now()
        epoch, order = self.epoch, self.pairs(self.epoch)
        self.epoch += 1
        padding = [Padding(order[-1], epoch) for _ in range(len(self) - self.n)]
        return iter([*(Drawn(number, epoch) for number in order), *padding])

    def pairs(self, epoch: int) -> list[int]:
        """The numbers of all pairs in the order of an epoch, without padding."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.n, generator=generator).tolist() if self.shuffle else list(range(self.n))
        if self.image_hashes is None:
            return order
        order = fill_batches(image_runs(self.image_hashes, order, self.max_pairs), self.max_pairs)
        if self.shuffle:  # best fit puts full cells first: shuffle whole cells, keep a short last one last
            cells = [order[start : start + self.max_pairs] for start in range(0, self.n, self.max_pairs)]
            full = self.n // self.max_pairs
            picked = [*torch.randperm(full, generator=generator).tolist(), *range(full, len(cells))]
            order = [index for cell in picked for index in cells[cell]]
        steps = [order[start : start + self.global_batch] for start in range(0, self.n, self.global_batch)]
        return [index for step in steps for index in self._arranged(step)]

    def _arranged(self, step: list[int]) -> list[int]:
        """The pairs of one optimizer step, with those of one image in one micro-batch as far as they fit."""
        return fill_batches(image_runs(self.image_hashes, step, self.max_pairs), self.batch_size)
