"""The recipes for several GPUs: what their headers promise, and each tiny twin through the real command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.paths import ROOT
from helpers.ranks import train_on_processes
from helpers.recipes import photo_rows, random_model, run_cli, write_rows

NAMES = [
    "llava16_orpo_qlora_ddp",
    "llava16_orpo_lora_zero2",
    "llava16_orpo_full_zero3",
    "llava16_orpo_lora_fsdp2",
    "llava16_orpo_ray",
]
TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
ENGINES = ROOT / "recipes" / "engines"


def text_of(name: str, folder: str = "") -> str:
    return (ROOT / "recipes" / folder / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_the_number_of_gpus_does_and_the_twin_has_the_same_keys(name):
    full, twin = yaml.safe_load(text_of(name)), yaml.safe_load(text_of(name, "tiny"))
    assert full.keys() == twin.keys()
    header = text_of(name).split("\n###")[0]
    batch = re.search(r"# Batch: +(\d+) pairs per step = \S+ (\d+) x \S+ (\d+) x (\d+) GPUs", header)
    pairs, size, accumulated, gpus = map(int, batch.groups())
    assert pairs == size * accumulated * gpus
    assert (size, accumulated) == (full["per_device_train_batch_size"], full["gradient_accumulation_steps"])
    assert all(word in header for word in ("eval_steps", "save_steps", "Hardware:", "Comes out:", "omputed"))
    for key in ("deepspeed", "fsdp_config"):
        assert full.get(key) == twin.get(key) and (key not in full or json.loads((ROOT / full[key]).read_text()))
    for file in re.findall(r"recipes/engines/[\w.]+", header):
        assert (ROOT / file).is_file()


def overridden(folder: Path) -> list[str]:
    """What replaces the tiny model and the demo data, which only the quickstart makes."""
    write_rows(folder, photo_rows(8, 1))
    keys = {
        "model_name_or_path": random_model(),
        "dataset_dir": folder,
        "dataset": "rows",
        "eval_dataset": "rows",
        "output_dir": folder / "out",
        "cutoff_len": 4096,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "ddp_timeout": 300,
        "grounding_eval": False,
    }
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]


def assert_trained(out: Path, weights: str = "adapter_model.safetensors") -> None:
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines if "loss" in line] == [1, 2]
    assert (out / weights).is_file()
    pairs = [json.loads(line) for line in (out / "preference_pairs.jsonl").read_text().splitlines()]
    assert len({pair["pair_id"] for pair in pairs}) == len(pairs) == 8


@pytest.mark.heavy
@pytest.mark.parametrize("name, more", [(NAMES[0], {}), (NAMES[1], {"DS_ACCELERATOR": "cpu"})])
def test_the_twin_trains_in_two_processes(tmp_path, name, more):
    run_cli("train", f"recipes/tiny/{name}.yaml", *overridden(tmp_path), env={**TWO, **more})
    assert_trained(tmp_path / "out")


@pytest.mark.heavy
@pytest.mark.parametrize("config", ["zero3.json", "zero3_offload.json"])
def test_all_weights_train_under_zero3(tmp_path, config):
    words = [*overridden(tmp_path), f"deepspeed=recipes/engines/{config}"]
    run_cli("train", "recipes/tiny/llava16_orpo_full_zero3.yaml", *words, env={**TWO, "DS_ACCELERATOR": "cpu"})
    assert_trained(tmp_path / "out", "model.safetensors")


@pytest.mark.heavy
def test_the_twin_of_fsdp2_trains(tmp_path):
    """accelerate offers FSDP on GPUs alone: the recipe's keys are those of the file, the command is the test's."""
    keys = yaml.safe_load(text_of("llava16_orpo_lora_fsdp2", "tiny"))
    keys.update(yaml.safe_load("\n".join(word.replace("=", ": ", 1) for word in overridden(tmp_path))))
    config = {**json.loads((ROOT / keys["fsdp_config"]).read_text()), "cpu_ram_efficient_loading": False}
    keys.update(fsdp_config=config, use_cpu=True, save_strategy="no")
    train_on_processes(tmp_path, [keys], 2, module="helpers.cpu_fsdp")
    lines = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


@pytest.mark.heavy
@pytest.mark.parametrize("lost", [True, False], ids=["a process is lost", "asked to stop"])
def test_an_elastic_training_goes_on_when_a_process_is_lost_and_stops_when_it_is_asked_to(tmp_path, lost):
    words = [*overridden(tmp_path), "max_steps=16", "eval_strategy=no"]
    programs = Path(sys.executable).parent
    env = {**os.environ, **TWO, "RDZV_ID": "elastic", "MAX_RESTARTS": "1", "LLAMAFACTORY_VERBOSITY": "INFO"}
    env["PATH"] = f"{programs}:{env['PATH']}"
    command = [programs / "llamafactory-cli", "train", f"recipes/tiny/{NAMES[0]}.yaml", *words]
    command.append("overwrite_output_dir=false")  # true starts every training from the beginning
    with (tmp_path / "log").open("w") as log:
        training = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        end = time.monotonic() + 300
        while not (tmp_path / "out" / "checkpoint-2" / "complete.json").exists() and time.monotonic() < end:
            assert training.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        if lost:
            children = psutil.Process(training.pid).children(recursive=True)
            next(child for child in children if child.environ().get("RANK") == "1").kill()
        else:
            training.send_signal(signal.SIGTERM)
        code = training.wait(400)
    printed = (tmp_path / "log").read_text()
    assert code == (0 if lost else 143), printed[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()]
    steps = [line["current_steps"] for line in lines if "loss" in line]
    if lost:
        assert steps == list(range(1, 17)) and printed.count("Running training") == 2
    else:
        assert re.search(rf"Stopped by SIGTERM at step {steps[-1]}; checkpoint-{steps[-1]} is saved", printed)
        assert steps[-1] < 16 and printed.count("Running training") == 1


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo 127.0.0.1;; requeue) echo "requeued $2" >> "$SCONTROL_LOG";; esac
"""


@pytest.mark.heavy
def test_the_slurm_script_saves_before_its_time_is_over_and_requeues(tmp_path):
    """On one machine, with two commands of SLURM's in other form: a task here, in place of one on each machine."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    words = [*overridden(tmp_path), "max_steps=200", "save_strategy=no", "eval_strategy=no"]
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7"}
    env = {**os.environ, **slurm, "NPROC_PER_NODE": "2", "SCONTROL_LOG": str(tmp_path / "requeued")}
    env["PATH"] = f"{programs}:{env['PATH']}"
    command = ["bash", ENGINES / "train.sbatch", "recipes/tiny/llava16_orpo_qlora_ddp.yaml", *words]
    another_job = subprocess.Popen(["bash", "-c", 'exec -a "llamafactory-cli train other.yaml" sleep 600'])
    with (tmp_path / "job.log").open("w") as log:
        job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
        end = time.monotonic() + 300
        while not (tmp_path / "out" / "trainer_log.jsonl").exists() and time.monotonic() < end:
            assert job.poll() is None, (tmp_path / "job.log").read_text()[-3000:]
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        code = job.wait(300)
    assert code == 143, (tmp_path / "job.log").read_text()[-3000:]
    assert another_job.poll() is None
    another_job.kill()
    another_job.wait()
    assert re.search(r"Stopped by SIGTERM at step \d+; checkpoint-\d+ is saved", (tmp_path / "job.log").read_text())
    assert (tmp_path / "requeued").read_text() == "requeued 7\n"
    assert list((tmp_path / "out").glob("checkpoint-*/complete.json"))
