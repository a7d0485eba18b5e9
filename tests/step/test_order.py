"""The order of training: every pair once per epoch, the same on any number of processes, resumed or not."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from llava_orpo.step.batches import image_runs
from llava_orpo.step.order import PaddedRows, Padding, PairOrder

HASHES = st.lists(st.sampled_from(["", *"abcdefgh"]), min_size=1, max_size=60)  # "": a pair without an image
SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def order_of(hashes, batch_size, max_pairs=None, *, accumulation=1, processes=1, seed=None, **more):
    """A PairOrder, grouped where `max_pairs` is given, shuffled where a seed is."""
    return PairOrder(
        len(hashes),
        global_batch=batch_size * processes * accumulation,
        batch_size=batch_size,
        processes=processes,
        shuffle=seed is not None,
        seed=seed or 0,
        image_hashes=hashes if max_pairs else None,
        max_pairs=max_pairs or 1,
        **more,
    )


def cut(items, size):
    items = list(items)
    return [items[start : start + size] for start in range(0, len(items), size)]


# one process --------------------------------------------------------------------------------------------------


@given(HASHES, SIZES, st.none() | SIZES, SEEDS)
def test_every_epoch_is_a_permutation_and_repeats_from_its_seed(hashes, batch_size, max_pairs, seed):
    one, same = (order_of(hashes, batch_size, max_pairs, seed=seed) for _ in range(2))
    for _ in range(3):
        order = list(one)
        assert len(one) == len(order) and len(order) % batch_size == 0
        pairs = [index for index in order if not isinstance(index, Padding)]
        assert sorted(pairs) == list(range(len(hashes)))
        assert order[: len(pairs)] == pairs, "empty places come last"
        assert len(order) - len(pairs) < batch_size
        assert order == list(same)


@given(st.integers(12, 30), st.integers(1, 4), st.integers(1, 4), SEEDS)
def test_epochs_and_seeds_differ(images, pairs, batch_size, seed):
    hashes = [str(i) for i in range(images) for _ in range(pairs)]
    one = order_of(hashes, batch_size, 4, seed=seed)
    assert one.pairs(0) != one.pairs(1)
    assert one.pairs(0) != order_of(hashes, batch_size, 4, seed=seed + 1 if seed < 2**32 - 1 else 0).pairs(0)


@given(st.integers(1, 50), st.integers(0, 5), SEEDS)
def test_without_grouping_it_is_the_order_of_accelerates_own_sampler(n, epoch, seed):
    stock = SeedableRandomSampler(range(n), data_seed=seed)
    stock.set_epoch(epoch)
    assert order_of([""] * n, 3, seed=seed).pairs(epoch) == list(stock)


@given(HASHES, SIZES, SIZES)
def test_unshuffled_the_given_order_is_kept(hashes, batch_size, max_pairs):
    one = order_of(hashes, batch_size, max_pairs)
    assert one.pairs(0) == one.pairs(1) and sorted(one.pairs(0)) == list(range(len(hashes)))
    assert order_of(hashes, batch_size).pairs(3) == list(range(len(hashes)))
    assert order_of([""] * len(hashes), batch_size, max_pairs).pairs(0) == list(range(len(hashes)))


@given(st.integers(1, 10), st.integers(1, 4), st.integers(1, 6), st.none() | SEEDS)
def test_each_batch_is_one_image_when_the_counts_fit(images, runs_per_image, size, seed):
    """Rows of the images interleaved; max_pairs and batch size the same, as the documentation advises."""
    hashes = [str(i) for _ in range(runs_per_image * size) for i in range(images)]
    for batch in cut(order_of(hashes, size, size, seed=seed), size):
        assert len(batch) == size and len({hashes[index] for index in batch}) == 1


@given(HASHES, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SEEDS)
def test_shuffled_batches_keep_their_images_together(hashes, max_pairs, cells, accumulation, seed):
    """A batch of whole cells: no more groups than runs, and one split per cell; the groups obey the limit."""
    batch_size = max_pairs * cells
    groups = 0
    for batch in cut(
        order_of(hashes, batch_size, max_pairs, accumulation=accumulation, seed=seed).pairs(0), batch_size
    ):
        runs = image_runs([hashes[index] for index in batch], range(len(batch)), max_pairs)
        assert all(len(run) <= max_pairs for run in runs)
        groups += len(runs)
    pieces = len(image_runs(hashes, range(len(hashes)), max_pairs))
    assert groups <= pieces + len(hashes) // max_pairs + len(hashes) // batch_size


@given(st.integers(1, 12), SEEDS)
def test_pairs_of_an_image_stay_together_with_a_half_full_last_batch(images, seed):
    """2 pairs per image in batches of 4: with an odd number of images the last batch is half full, and stays last."""
    hashes = [str(i // 2) for i in range(2 * images)]
    for batch in cut(order_of(hashes, 4, 4, seed=seed).pairs(0), 4):
        assert set(Counter(hashes[index] for index in batch).values()) == {2}


# any number of processes --------------------------------------------------------------------------------------


@given(HASHES, st.none() | st.integers(1, 5), st.integers(0, 2), SEEDS)
def test_the_pairs_of_a_step_depend_on_the_global_batch_alone(hashes, max_pairs, epoch, seed):
    ways = [(12, 1, 1), (3, 4, 1), (6, 1, 2), (3, 1, 4), (3, 2, 2), (1, 3, 4)]  # batch, accumulation, processes
    steps = set()
    for batch_size, accumulation, processes in ways:
        order = order_of(hashes, batch_size, max_pairs, accumulation=accumulation, processes=processes, seed=seed)
        assert len(order) % (batch_size * processes) == 0 and order.steps == -(-len(hashes) // 12)
        steps.add(tuple(tuple(sorted(step)) for step in cut(order.pairs(epoch), 12)))
    assert len(steps) == 1
    (steps,) = steps
    assert sorted(index for step in steps for index in step) == list(range(len(hashes)))


def loaders(rows, order, batch_size, processes, workers=0):
    """The dataloader of every process, as Trainer makes it with accelerate."""
    return [
        prepare_data_loader(
            DataLoader(rows, batch_size, sampler=order, num_workers=workers, collate_fn=list),
            num_processes=processes,
            process_index=rank,
            put_on_device=False,
        )
        for rank in range(processes)
    ]


class Rows:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitems__(self, indices):
        return [{"pair": index} for index in indices]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_resumed_run_sees_the_pairs_of_the_whole_one(processes, grouped, workers, monkeypatch):
    """Cut in epochs 0, 1 and 2 after two of five steps; the rest goes through accelerate's `skip_first_batches`."""
    monkeypatch.setattr("accelerate.data_loader.synchronize_rng_states", lambda *_: None)  # needs a process group
    hashes = [str(i // 3) for i in range(37)]
    batch_size, accumulation = 2, 4 // processes
    for epoch in range(3) if workers == 0 else (1,):

        def steps_of(epoch, skipped):
            rows = PaddedRows(Rows(len(hashes)))
            order = order_of(
                hashes,
                batch_size,
                3 if grouped else None,
                accumulation=accumulation,
                processes=processes,
                seed=5,
                epoch_now=lambda: epoch,
            )
            ranks = []
            for loader in loaders(rows, order, batch_size, processes, workers):
                if skipped:
                    loader = skip_first_batches(loader, skipped * accumulation)
                loader.set_epoch(epoch)  # what Trainer does: it does not reach a sampler this deep
                ranks.append([row for batch in loader for row in batch])
            size = batch_size * accumulation
            return [
                sorted(row["pair"] for rank in ranks for row in rank[start : start + size] if "padding" not in row)
                for start in range(0, len(ranks[0]), size)
            ]

        whole = steps_of(epoch, 0)
        assert [len(step) for step in whole] == [8, 8, 8, 8, 5]
        assert sorted(index for step in whole for index in step) == list(range(37))
        assert steps_of(epoch, 2) == whole[2:]
        expected = [sorted(step) for step in cut(order_of(hashes, 8, 3 if grouped else None, seed=5).pairs(epoch), 8)]
        assert whole == expected, "the same as in one process"


def test_padding_is_marked_and_survives_the_dataloaders_workers():
    rows = PaddedRows(Rows(5))
    order = order_of([""] * 5, 2, processes=2)
    assert list(order) == [0, 1, 2, 3, 4, 4, 4, 4] and len(order) == 8
    ranks = [[row for batch in loader for row in batch] for loader in loaders(rows, order, 2, 2, workers=1)]
    drawn = [[(row.pop("place"), row.pop("epoch")) for row in rank] for rank in ranks]
    assert drawn == [[(row["pair"], 1 + number) for row in rank] for number, rank in enumerate(ranks)]
    assert ranks == [
        [{"pair": 0}, {"pair": 1}, {"pair": 4}, {"pair": 4, "padding": True}],
        [{"pair": 2}, {"pair": 3}, {"pair": 4, "padding": True}, {"pair": 4, "padding": True}],
    ]
    assert rows[3] == {"pair": 3} and len(rows) == 5


def test_nothing_is_padded_where_the_loader_drops_what_does_not_fill_a_batch():
    order = order_of([""] * 7, 2, processes=2, pad=False)
    assert list(order) == list(range(7)) and len(order) == 7 and order.steps == 1


def test_the_seed_is_torchs():
    assert (
        order_of([""] * 9, 3, seed=2).pairs(1) == torch.randperm(9, generator=torch.Generator().manual_seed(3)).tolist()
    )
