"""Batches in parts in two processes, under every engine: what one process trains and scores without a limit.

The processes have different numbers of parts in most micro-batches; an engine that shards would wait forever for the
one with fewer, so that every case also shows that they agree on a number. See `test_engines` for the set-up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.engines import FSDP, fsdp_keys, train_under_deepspeed, train_under_fsdp
from helpers.ranks import train, train_on_processes
from helpers.same_training import IN_PARTS, ONE, assert_same, made, rows_of

pytestmark = pytest.mark.heavy
CASES = ["text-only", "grouped"]
WAYS = ["ddp", "ddp-accumulated", "zero2", "zero3", "fsdp", "fsdp2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts-on-engines")
    cases = {name: keys for name, keys in rows_of(folder).items() if name in CASES}
    train(made(folder, "start", {**cases["grouped"], **ONE, "max_steps": 1}))
    start = {"adapter_name_or_path": str(folder / "start"), "create_new_adapter": False}
    evaluated = {"do_eval": True, "per_device_eval_batch_size": 2}
    for name, keys in cases.items():
        cases[name] = {**keys, **start, **evaluated, "eval_dataset": keys["dataset"], "num_train_epochs": 2}
        train(made(folder, f"{name}/one", {**cases[name], **ONE}))
        train(made(folder, f"{name}/one-accumulated", {**cases[name], **ONE, "gradient_accumulation_steps": 2}))

    def recipes(way: str, keys: dict) -> list[dict]:
        return [made(folder, f"{name}/{way}", {**case, **IN_PARTS, **keys}) for name, case in cases.items()]

    ddp = [*recipes("ddp", {}), *recipes("ddp-accumulated", {"gradient_accumulation_steps": 2})]
    train_on_processes(folder, ddp, 2, timeout=1800)
    train_under_deepspeed(folder, recipes)
    for name in FSDP:
        train_under_fsdp(folder, recipes(name, fsdp_keys(name)))
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_in_parts_train_and_score_what_one_does_without(trained, way, case):
    one = trained / case / ("one-accumulated" if way == "ddp-accumulated" else "one")
    # Where a gradient is nearly zero, Adam makes steps of its rounding error: 1.5e-4 with accumulation, 3e-6 without.
    tolerance = 5e-4 if way == "ddp-accumulated" else 1e-5
    worst = assert_same(one, trained / case / way, tolerance, norms=way != "fsdp")
    print(f"{way}, {case}: adapters differ by at most {worst:.1e} of their largest weight")
    scores = [
        [json.loads(line) for line in (folder / "preference_pairs.jsonl").read_text().splitlines()]
        for folder in (one, trained / case / way)
    ]
    assert [pair["pair_id"] for pair in scores[0]] == [pair["pair_id"] for pair in scores[1]] and scores[0]
    for whole, parts in zip(*scores, strict=True):
        for key in ("chosen_logp", "rejected_logp"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-4), key
