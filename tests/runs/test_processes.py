"""Two processes train what one does: ragged epochs, text-only pairs, bad images, a trained vision tower, resuming."""

from __future__ import annotations

import pytest
import torch

from helpers.ranks import train, train_on_processes
from helpers.same_training import (
    ACCUMULATED,
    IN_PARTS,
    ONE,
    TWO,
    TWO_ACCUMULATED,
    adapter,
    assert_same,
    losses,
    made,
    rows_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]  # one fixture trains for all


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every case on one process, and on two with and without accumulation."""
    folder = tmp_path_factory.mktemp("processes")
    cases = rows_of(folder)
    for name, keys in cases.items():
        train(made(folder, f"{name}/one", {**keys, **ONE}))
    recipes = [made(folder, f"{name}/two", {**keys, **TWO}) for name, keys in cases.items()]
    recipes += [made(folder, f"{name}/accumulated", {**cases[name], **TWO_ACCUMULATED}) for name in ACCUMULATED]
    recipes += [made(folder, f"{name}/parts", {**cases[name], **IN_PARTS}) for name in CUT]
    saved = {**cases["grouped"], **TWO, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    recipes.append(made(folder, "resumed/cut", {**saved, "max_steps": 4}))  # in the middle of the second epoch
    resumed = {**cases["grouped"], "resume_from_checkpoint": str(folder / "resumed/cut/checkpoint-4")}
    recipes.append(made(folder, "resumed/two", {**resumed, **TWO}))
    printed = train_on_processes(folder, recipes, 2, LLAMAFACTORY_VERBOSITY="INFO")
    train(made(folder, "resumed/one", {**resumed, **ONE}))
    return folder, printed


# the micro-batches of the two processes are cut into different numbers of parts in the second
CUT = ["grouped", "text-only"]
CASES = ["ragged", "text-only", "bad images alone", "vision tower", "grouped"]


@pytest.mark.parametrize(
    "case, way",
    [(c, "two") for c in CASES] + [(c, "accumulated") for c in ACCUMULATED] + [(c, "parts") for c in CUT],
)
def test_two_processes_train_what_one_does(trained, case, way):
    folder, _ = trained
    assert_same(folder / case / "one", folder / case / way)


def test_batches_in_parts_are_said_once_a_training(trained):
    _, printed = trained
    assert printed.count("A micro-batch runs in 2 parts of at most") == len(CUT)


def test_every_pair_of_a_ragged_epoch_weighs_the_same(trained):
    """The second step of the epoch has three pairs: its terms are the means of three, whoever ran them."""
    folder, _ = trained
    assert [line["step"] for line in losses(folder / "ragged" / "two")] == [1, 2, 3, 4]


def test_bad_images_alone_neither_log_zeros_nor_count(trained):
    folder, _ = trained
    for way in ("one", "two", "accumulated"):
        last = losses(folder / "bad images alone" / way)[-1]  # four pairs: two of them can't be decoded
        assert last["loss"] > 5 and last["logps/chosen"] < -5
        files = (folder / "bad images alone" / way).glob("skipped_rows*.jsonl")  # each process has its own
        skipped = [line for file in files for line in file.read_text().splitlines()]
        assert len(skipped) == 2 and all("bad image" in line for line in skipped)


def test_what_llava_never_reads_of_a_trained_vision_tower_is_frozen_and_named(trained):
    folder, printed = trained
    assert "parameters of the vision tower are frozen, because LLaVA never reads" in printed
    last = [t for name, t in adapter(folder / "vision tower" / "two").items() if "vision" in name and "lora_B" in name]
    assert any(tensor.abs().max() > 0 for tensor in last)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_a_grouped_run_cut_in_its_second_epoch_goes_on_where_it_stopped(trained, processes):
    """On as many processes as before, and on another number with the same global batch."""
    folder, _ = trained
    whole, resumed = folder / "grouped" / "two", folder / "resumed" / processes
    left, right = adapter(whole), adapter(resumed)
    for name, tensor in left.items():
        torch.testing.assert_close(right[name], tensor, rtol=2e-4, atol=2e-6)
    ahead, after = losses(whole), losses(resumed)
    assert [line["step"] for line in ahead] == list(range(1, 10))
    assert [line["loss"] for line in after][-5:] == pytest.approx([line["loss"] for line in ahead][4:], abs=2e-4)
