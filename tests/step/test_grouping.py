"""Pairs of one image in one batch: runs and batches as documented, a real run, and the announced fallback."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from llamafactory.hparams import get_train_args
from PIL import Image

from helpers.recipes import build_trainer, photo_rows, random_model, recipe, run_cli, write_recipe, write_rows
from llava_orpo.errors import UserError
from llava_orpo.integration.run import current
from llava_orpo.preference.scoring import ConditionedRows
from llava_orpo.step.batches import fill_batches, image_runs
from llava_orpo.step.collator import SharedPrefixCollator
from llava_orpo.training import checks, workflow

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}

HASHES = st.lists(st.sampled_from(["", *"abcdefgh"]), max_size=60)  # "": a pair without an image
SIZES = st.integers(1, 9)


def batches(order, size):
    order = list(order)
    return [order[start : start + size] for start in range(0, len(order), size)]


def joined(items):
    """Items without repeats of the one before: equal items that stand together count once."""
    items = list(items)
    return [item for i, item in enumerate(items) if i == 0 or items[i - 1] != item]


@st.composite
def shuffled_hashes(draw):
    hashes = draw(HASHES)
    return hashes, draw(st.permutations(range(len(hashes))))


# runs ---------------------------------------------------------------------------------------------------------


@given(shuffled_hashes(), SIZES)
def test_runs_are_of_one_image_and_as_few_as_possible(drawn, max_pairs):
    hashes, order = drawn
    runs = image_runs(hashes, order, max_pairs)
    assert sorted(index for run in runs for index in run) == list(range(len(hashes)))
    place = {index: i for i, index in enumerate(order)}
    lengths: dict[str, list[int]] = {}
    for run in runs:
        assert 1 <= len(run) <= max_pairs
        assert len({hashes[index] for index in run}) == 1
        assert [place[index] for index in run] == sorted(place[index] for index in run)
        lengths.setdefault(hashes[run[0]], []).append(len(run))
    assert [place[run[0]] for run in runs] == sorted(place[run[0]] for run in runs)
    for image, count in Counter(hashes).items():
        limit = max_pairs if image else 1  # without an image each pair stands alone
        assert lengths[image] == [limit] * (count // limit) + ([count % limit] if count % limit else [])


def test_runs_by_example():
    assert image_runs(["a", "b", "a", "", "a", ""], [4, 3, 1, 0, 5, 2], 2) == [[4, 0], [3], [1], [5], [2]]


# batches ------------------------------------------------------------------------------------------------------


@st.composite
def numbered_runs(draw, longest=12):
    runs, start = [], 0
    for length in draw(st.lists(st.integers(1, longest), max_size=20)):
        runs.append(list(range(start, start + length)))
        start += length
    return runs


@given(numbered_runs(), SIZES)
def test_batches_hold_every_pair_once_and_in_the_order_of_its_run(runs, batch_size):
    order = fill_batches(runs, batch_size)
    assert sorted(order) == [index for run in runs for index in run]
    run_of = {index: number for number, run in enumerate(runs) for index in run}
    for batch in batches(order, batch_size):
        pieces = joined(run_of[index] for index in batch)
        assert len(pieces) == len(set(pieces)), "pairs of one run stand together in a batch"
        for number in pieces:
            piece = [index for index in batch if run_of[index] == number]
            assert piece == list(range(piece[0], piece[0] + len(piece)))


@given(st.data(), SIZES)
def test_a_run_is_split_only_when_no_waiting_run_fits(data, batch_size):
    runs = data.draw(numbered_runs(longest=batch_size))
    run_of = {index: number for number, run in enumerate(runs) for index in run}
    filled = batches(fill_batches(runs, batch_size), batch_size)
    groups = [joined(run_of[index] for index in batch) for batch in filled]
    sizes = [Counter(run_of[index] for index in batch) for batch in filled]
    started: set[int] = set()
    for b, numbers in enumerate(groups):
        started.update(numbers)
        for number in numbers:
            if any(number in later for later in groups[b + 1 :]):
                assert number == numbers[-1], "a split run fills the end of its batch"
                room = sizes[b][number]
                waiting = [len(run) for i, run in enumerate(runs) if i not in started]
                assert all(length > room for length in waiting)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 10))
def test_runs_that_divide_the_batch_are_never_split(length, per_batch, count):
    runs = [list(range(length * i, length * (i + 1))) for i in range(count)]
    assert fill_batches(runs, length * per_batch) == [index for run in runs for index in run]


def test_batches_by_example():
    assert fill_batches([[0, 1, 2], [3, 4, 5], [6]], 4) == [0, 1, 2, 6, 3, 4, 5]
    assert fill_batches([[0, 1, 2], [3, 4, 5]], 4) == [0, 1, 2, 3, 4, 5]
    # Of the longer runs the best fitting one is split, the shortest: the run of four stays whole.
    runs = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12]]
    assert fill_batches(runs, 7) == [0, 1, 2, 3, 4, 5, 10, 6, 7, 8, 9, 11, 12]
    assert fill_batches([], 4) == []


# a real run ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grouped_run_counts_pairs_as_without_grouping(tmp_path):
    write_rows(tmp_path, photo_rows(3, 4))
    keys = {**LORA, "group_pairs_by_image": True, "max_pairs_per_image": 4, "num_train_epochs": 1, "logging_steps": 1}
    path = write_recipe(tmp_path, keys)
    for words, pairs, images, steps in (((), 12, 3, 3), (("max_samples=8",), 8, 2, 2)):
        out = tmp_path / f"out-{pairs}"
        done = run_cli("train", path, *words, f"output_dir={out}", env={"LLAMAFACTORY_VERBOSITY": "INFO"})
        announced = f"Grouping pairs by image: {pairs} pairs on {images} images (4.00 pairs per group, at most 4)."
        assert announced in done.stdout + done.stderr
        lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
        trained = [line for line in lines if "loss" in line and "grad_norm" in line]
        assert [line["current_steps"] for line in trained] == list(range(1, steps + 1))
        state = json.loads((out / "trainer_state.json").read_text())
        assert state["global_step"] == state["max_steps"] == steps
        assert state["epoch"] == trained[-1]["epoch"] == 1.0


# fallback -----------------------------------------------------------------------------------------------------


def model_with(folder: Path, **text) -> Path:
    """The small random model with other settings of its language model in config.json."""
    shutil.copytree(random_model(), folder / "model")
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"].update(text)
    path.write_text(json.dumps(config))
    return path.parent


@pytest.mark.parametrize(
    "text, model, keys, reason",
    [
        ({"sliding_window": 64}, {}, {}, "sliding window of 64 tokens"),
        ({}, {"use_unsloth": True}, {}, "unsloth"),
        ({}, {"enable_liger_kernel": True}, {}, "liger"),
        ({}, {}, {"shift_attn": True}, "shift_attn"),
        ({}, {}, {"ld_alpha": 0.5}, "ld_alpha"),
        ({"model_type": "llama"}, {}, {}, ""),  # its config knows no sliding window
        ({"sliding_window": None}, {}, {"ld_alpha": None}, ""),
    ],
)
def test_the_reason_to_fall_back(tmp_path, text, model, keys, reason):
    """model: keys that LLaMA-Factory refuses where a package is not installed, so they are set after parsing."""
    folder = model_with(tmp_path, **text)
    model_args, *others, _ = get_train_args(recipe(tmp_path, {**keys, "model_name_or_path": str(folder)}))
    for key, value in model.items():
        setattr(model_args, key, value)
    found = workflow.check(current(), model_args, *others)
    assert reason in found and bool(found) == bool(reason)


@pytest.mark.parametrize("work, data", [("--do_train", "--dataset"), ("--do_eval", "--eval_dataset")])
def test_the_reason_to_fall_back_is_seen_on_a_plain_command_line(tmp_path, work, data):
    """The flag before the key has no value: words are not simply key, value, key, value."""
    line = f"--plugins llava_orpo {work} --ld_alpha 0.5 --stage dpo --pref_loss sigmoid --output_dir {tmp_path}"
    line += f" --model_name_or_path {random_model()} --template llava_v16_mistral {data} rows --use_cpu"
    *arguments, _ = get_train_args(line.split())
    assert "ld_alpha" in workflow.check(current(), *arguments)
    *arguments, _ = get_train_args(line.replace("--ld_alpha 0.5 ", "").split())
    assert workflow.check(current(), *arguments) == ""


@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches: true can't send packed batches"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length is not supported"),
    ],
)
def test_ways_to_load_that_packed_batches_do_not_go_through_are_refused(tmp_path, keys, problem):
    *arguments, _ = get_train_args(recipe(tmp_path, keys))
    with pytest.raises(UserError, match=problem):
        workflow.check(current(), *arguments)


def test_a_deepspeed_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    from types import SimpleNamespace

    state = tmp_path / "checkpoint-4" / "global_step4"
    state.mkdir(parents=True)
    for rank in range(4):
        (state / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (state / "mp_rank_00_model_states.pt").touch()
    run = SimpleNamespace(deepspeed="z.json", resume_from_checkpoint=str(state.parent), world_size=2)
    with pytest.raises(UserError, match="saved by DeepSpeed on 4 processes.*this run has 2. Start 4 processes"):
        checks.refuse_other_sharding(run)
    run.world_size = 4
    checks.refuse_other_sharding(run)
    run.deepspeed, run.world_size = None, 2
    checks.refuse_other_sharding(run)


@pytest.mark.parametrize("window", [64, None])
def test_a_sliding_window_trains_with_llama_factorys_own_trainer(tmp_path, monkeypatch, window):
    folder = model_with(tmp_path, sliding_window=window)
    write_rows(tmp_path, photo_rows(1, 2))
    warnings = []
    monkeypatch.setattr(workflow.logger, "warning_rank0", warnings.append)
    trainer = build_trainer(tmp_path, {**LORA, "model_name_or_path": str(folder)})
    announced = [text for text in warnings if "falling back" in text]
    if window is None:
        assert not announced and type(trainer).__name__ == "SharedPrefixTrainer"
    else:
        assert len(announced) == 1 and "sliding window of 64 tokens" in announced[0]
        assert type(trainer).__name__ == "CustomDPOTrainer"


def test_other_images_are_grouped_by_the_image_shown():
    """Rows A B A C with another row's image show B A C A: the two rows of A must not share a picture."""

    class Processor:
        def image_processor(self, pictures, return_tensors):
            return {"widths": [picture.width for picture in pictures]}

    def picture(number):
        data = io.BytesIO()
        Image.new("RGB", (10 + number, 20), (number, 0, 0)).save(data, "PNG")
        return data.getvalue()

    numbers = {"A": 0, "B": 1, "C": 2}
    rows = Dataset.from_list(
        [
            {
                "pair_id": str(i),
                "image_hash": name,
                "image": picture(numbers[name]),
                "width": 10 + numbers[name],
                "height": 20,
                "num_image_tokens": 5 + numbers[name],
                "prompt_ids": [1, 99, 2],
                "chosen_ids": [3],
                "rejected_ids": [4],
            }
            for i, name in enumerate("ABAC")
        ]
    )
    shown = ConditionedRows(rows, range(4), "other")
    batch = SharedPrefixCollator(Processor(), 99, group_by_image=True)([shown[i] for i in range(4)])
    assert batch["image_inputs"] == {"widths": [11, 10, 12]}
    assert [row["pair_id"] for row in batch["rows"]] == ["0", "1", "3", "2"]
    assert [row["image_hash"] for row in batch["rows"]] == ["A", "B", "C", "A"]  # records keep their own
