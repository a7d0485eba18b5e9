"""DeepSpeed and FSDP in two processes train what one process does; ragged epochs and text-only pairs included.

Sharded initialization draws other random numbers, so every run goes on from one saved adapter. accelerate offers FSDP
on GPUs only; `helpers.cpu_fsdp` lets it shard on CPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.engines import FSDP, fsdp_keys, train_under_deepspeed, train_under_fsdp
from helpers.ranks import train
from helpers.same_training import ONE, TWO, adapter, assert_same, losses, made, rows_of

pytestmark = pytest.mark.heavy
CASES = ["ragged", "text-only", "grouped"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    cases = {name: keys for name, keys in rows_of(folder).items() if name in CASES}
    train(made(folder, "start", {**cases["ragged"], **ONE, "max_steps": 1}))
    start = {"adapter_name_or_path": str(folder / "start"), "create_new_adapter": False}
    for name, keys in cases.items():
        train(made(folder, f"{name}/one", {**keys, **ONE, **start}))

    def recipes(engine: str, keys: dict) -> list[dict]:
        return [made(folder, f"{name}/{engine}", {**case, **TWO, **start, **keys}) for name, case in cases.items()]

    train_under_deepspeed(folder, recipes)
    for name in FSDP:
        keys = fsdp_keys(name)
        runs = recipes(name, keys)
        saved = {"save_strategy": "steps", "save_steps": 2}
        runs.append(made(folder, f"cut/{name}", {**cases["grouped"], **TWO, **start, **keys, **saved, "max_steps": 4}))
        goes_on = {"resume_from_checkpoint": str(folder / f"cut/{name}/checkpoint-4")}  # within the second epoch
        resumed = {**cases["grouped"], **start, **keys, **goes_on}
        runs.append(made(folder, f"resumed/{name}-2", {**resumed, **TWO}))
        train_under_fsdp(folder, runs)
        four = made(folder, f"resumed/{name}-4", {**resumed, "per_device_train_batch_size": 1})
        train_under_fsdp(folder, [four], processes=4)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp", "fsdp2"])
def test_sharded_processes_train_what_one_does(trained, engine, case):
    worst = assert_same(trained / case / "one", trained / case / engine, norms=engine != "fsdp")
    print(f"{engine}, {case}: adapters differ by at most {worst:.1e} of their largest weight")


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("engine", ["fsdp", "fsdp2"])
def test_a_sharded_training_resumes_on_as_many_or_more_processes(trained, engine, processes):
    """Cut in the middle of its second epoch; bit-identical where nothing is added up in another order."""
    whole, resumed = trained / "grouped" / engine, trained / "resumed" / f"{engine}-{processes}"
    left, right = adapter(whole), adapter(resumed)
    worst = max((right[name] - tensor).abs().max().item() / tensor.abs().max().item() for name, tensor in left.items())
    print(f"{engine}, resumed on {processes}: adapters differ by at most {worst:.1e} of their largest weight")
    assert worst == 0 if processes == 2 else worst < 2e-4
    ahead, after = losses(whole), losses(resumed)
    assert [line["step"] for line in after] == [line["step"] for line in ahead] == list(range(1, 10))
    assert [line["loss"] for line in after] == pytest.approx([line["loss"] for line in ahead], abs=2e-4)
    assert (trained / "cut" / engine / "checkpoint-4" / "adapter_model.safetensors").is_file()
