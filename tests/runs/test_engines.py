"""DeepSpeed and FSDP in two processes train what one process does; ragged epochs and text-only pairs included.

Sharded initialization draws other random numbers, so every run goes on from one saved adapter. On CPUs accelerate does
not offer FSDP and its saving under FSDP2 (see `helpers.cpu_fsdp`): there the terms of every step are compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.ranks import train, train_on_processes
from helpers.same_training import ONE, TWO, assert_same, losses, made, rows_of

pytestmark = pytest.mark.heavy
ENGINES = ROOT / "recipes" / "engines"
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

    zero = [
        one for stage in (2, 3) for one in recipes(f"zero{stage}", {"deepspeed": str(ENGINES / f"zero{stage}.json")})
    ]
    for one in zero:
        del one["use_cpu"]  # DeepSpeed takes its device from DS_ACCELERATOR
    train_on_processes(folder, zero, 2, timeout=1800, DS_ACCELERATOR="cpu")
    for version, name in ((1, "fsdp"), (2, "fsdp2")):
        config = json.loads((ENGINES / f"{name}.json").read_text())
        config = {**config, "sync_module_states": False, "cpu_ram_efficient_loading": False}  # both need a GPU
        keys = {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
        states = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"} if version == 1 else {}
        train_on_processes(folder, recipes(name, keys), 2, timeout=1800, module="helpers.cpu_fsdp", **states)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_sharded_processes_train_what_one_does(trained, engine, case):
    worst = assert_same(trained / case / "one", trained / case / engine, norms=engine != "fsdp")
    print(f"{engine}, {case}: adapters differ by at most {worst:.1e} of their largest weight")


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_steps_are_those_of_one_process(trained, case):
    one, two = losses(trained / case / "one"), losses(trained / case / "fsdp2")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
