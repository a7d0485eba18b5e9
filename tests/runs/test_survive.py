"""Trainings that are killed, stopped or hit by a fault: each goes on as if nothing had happened, or says what to do."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import kill
import psutil
import pytest
import torch
from transformers import TrainerCallback

from helpers.paths import ROOT
from helpers.ranks import train_on_processes
from helpers.recipes import build_trainer, photo_rows, recipe, run_cli, write_recipe, write_rows
from helpers.same_training import adapter
from llava_orpo.checkpoint import complete
from llava_orpo.errors import UserError

pytestmark = pytest.mark.slow

KEYS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "lora_target": "q_proj,v_proj",
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 3,
    "eval_dataset": "heldout",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 1,
    "dataloader_num_workers": 0,
}
STEPS = 8


class At(TrainerCallback):
    """Calls `act` once, at the event `when` of step `step`."""

    def __init__(self, when: str, step: int, act) -> None:
        self.step, self.act = step, act
        setattr(self, when, self._event)

    def _event(self, args, state, control, **kwargs):
        if self.act is not None and state.global_step == self.step:
            act, self.act = self.act, None
            act()


def train(keys: dict, *callbacks: TrainerCallback) -> None:
    """Trains in this process, as `llamafactory-cli train` would: it looks for a checkpoint in output_dir first."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train.callbacks import LogCallback

    from llava_orpo.integration.run import current
    from llava_orpo.training import workflow

    *arguments, _ = get_train_args(keys)
    workflow.run_dpo(current(), *arguments, [LogCallback(), *callbacks])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Rows, and the training that nothing happened to in `whole`."""
    folder = tmp_path_factory.mktemp("survive")
    write_rows(folder, photo_rows(8, 1))
    write_rows(folder, photo_rows(4, 1), "heldout")
    train(keys_of(folder, "whole"))
    return folder


def keys_of(folder: Path, name: str, **keys) -> dict:
    return recipe(folder, {**KEYS, "output_dir": str(folder / name), **keys})


def log_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [{key: line.get(key) for key in ("current_steps", "loss", "eval_loss", "train_loss")} for line in lines]


def assert_as_whole(folder: Path, name: str, logs: bool = True) -> None:
    """The training `name` ended bit-identical to `whole`."""
    expected, found = adapter(folder / "whole"), adapter(folder / name)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    if logs:
        assert log_lines(folder / name) == log_lines(folder / "whole")
        history = [json.loads((folder / one / "preference_eval.json").read_text()) for one in ("whole", name)]
        assert history[0] == history[1]


# kills --------------------------------------------------------------------------------------------------------


def survived(out: Path, *words: str) -> list[dict]:
    """The kills that scripts/kill.py made, in this process, which has imported everything; all left no trace."""
    assert kill.main(["--out", str(out), *words]) == 0
    made = json.loads((out / "kills.json").read_text())
    assert made["survived"] == len(made["kills"])
    return made["kills"]


def test_kills_in_a_checkpoint_and_in_an_evaluation_leave_no_trace(tmp_path):
    kills = survived(tmp_path / "out", "--kills", "3", "--series", "checkpoint,evaluation")
    assert [entry["series"] for entry in kills] == ["checkpoint", "checkpoint", "evaluation"]
    assert any(entry["half_written"] for entry in kills)


@pytest.mark.heavy
def test_twenty_kills_in_every_series_leave_no_trace(tmp_path):
    assert len(survived(tmp_path / "out", "--kills", "20")) == 20


def test_a_half_written_checkpoint_is_set_aside_and_named(folder, caplog, capfd):
    shutil.copytree(folder / "whole", folder / "half")
    for extra in (folder / "half").glob("*.*"):
        if extra.is_file() and extra.name not in ("trainer_log.jsonl", "preference_eval.json"):
            extra.unlink()
    (folder / "half" / "checkpoint-8" / "optimizer.pt").write_bytes(b"cut")
    (folder / "half" / "checkpoint-6" / complete.SAVING).touch()
    with pytest.raises(UserError, match=r"checkpoint-6 is incomplete \(it was being written.*; name .*checkpoint-3\."):
        train(keys_of(folder, "half", resume_from_checkpoint=str(folder / "half" / "checkpoint-6")))
    train(keys_of(folder, "half"))
    assert {path.name for path in (folder / "half").glob("incomplete-*")} == {
        "incomplete-checkpoint-8",
        "incomplete-checkpoint-6",
    }
    shown = capfd.readouterr().err + caplog.text
    assert re.search(r"checkpoint-8 is incomplete \(optimizer.pt has 3 bytes in place of \d+\) and was renamed", shown)
    assert_as_whole(folder, "half")


# signals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when, step, number, words, code",
    [
        ("on_step_begin", 3, signal.SIGTERM, "SIGTERM", 143),
        ("on_prediction_step", 6, signal.SIGINT, "Ctrl-C", 130),
        ("on_step_begin", STEPS - 1, signal.SIGTERM, "SIGTERM", 143),
    ],
)
def test_a_signal_saves_a_checkpoint_and_the_same_command_goes_on(folder, capfd, when, step, number, words, code):
    name = f"{when}-{step}"
    keys = keys_of(folder, name)
    with pytest.raises(SystemExit) as ended:
        train(keys, At(when, step, lambda: os.kill(os.getpid(), number)))
    saved = step if when == "on_prediction_step" else step + 1
    assert ended.value.code == code
    shown = capfd.readouterr().err
    assert f"Stopped by {words} at step {saved}; checkpoint-{saved} is saved. The same command goes on." in shown
    assert not (folder / name / "adapter_model.safetensors").exists()
    train(keys)
    assert_as_whole(folder, name)


def test_a_training_on_parquet_images_stops_goes_on_and_equals_one_on_arrow(folder):
    keys = keys_of(folder, "parquet", image_storage="parquet")
    with pytest.raises(SystemExit):
        train(keys, At("on_step_begin", 4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(keys)
    assert_as_whole(folder, "parquet")


def test_a_signal_before_the_training_ends_it_at_once(tmp_path):
    from llava_orpo.training.stopping import StopRequest

    with pytest.raises(SystemExit) as ended, StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert ended.value.code == 143


@pytest.mark.heavy
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_hands_a_signal_on_to_two_processes(folder, number, code):
    name = f"command-{code}"
    path = write_recipe(folder, {**KEYS, "output_dir": str(folder / name), "per_device_train_batch_size": 1}, name=name)
    programs = Path(sys.executable).parent
    env = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": f"{programs}:{os.environ['PATH']}"}
    command = [programs / "llamafactory-cli", "train", path]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as p:
        end = time.monotonic() + 300
        while not (folder / name / "trainer_log.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.01)
        p.send_signal(number)
        shown = p.communicate(timeout=300)[1]
    assert p.returncode == code
    assert re.search(r"Stopped by (SIGTERM|Ctrl-C) at step \d+; checkpoint-\d+ is saved", shown)
    assert "Traceback" not in shown
    run_cli("train", path, env={"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"})
    assert len(log_lines(folder / name)) == len(log_lines(folder / "whole"))


# faults -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: str):
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def remount(path: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)


def test_a_full_disk_stops_with_what_to_do_and_the_training_goes_on_when_there_is_space(folder):
    out, filler = folder / "full", folder / "full" / "filler"
    keys = keys_of(folder, "full")

    def fill() -> None:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    with small_disk(out, "64m"):
        with pytest.raises(UserError) as told:
            train(keys, At("on_step_begin", 4, fill))
        message = str(told.value)
        assert "no space is left on its disk" in message and "goes on from checkpoint-3" in message
        assert "\n" not in message
        assert [path.name for path in complete.checkpoints(out)] == ["checkpoint-3"]
        filler.unlink()
        train(keys)
        assert_as_whole(folder, "full")


def test_a_folder_that_becomes_read_only_stops_with_what_to_do(folder):
    out, keys = folder / "readonly", keys_of(folder, "readonly")
    with small_disk(out, "64m"):
        with pytest.raises(UserError, match=r"Read-only file system.*goes on from checkpoint-3\.$"):
            train(keys, At("on_step_begin", 4, lambda: remount(out, "ro")))
        remount(out, "rw")
        train(keys)
        assert_as_whole(folder, "readonly")


def test_an_unwritable_output_folder_is_refused_in_the_first_seconds(folder):
    (folder / "file").write_text("")
    path = write_recipe(folder, {**KEYS, "output_dir": str(folder / "file" / "out")}, name="unwritable")
    done = run_cli("train", path, check=False, fresh=True)
    assert done.returncode == 2
    assert done.stderr == f"error: output_dir: {folder}/file is a file, not a folder; name another folder.\n"


@pytest.mark.parametrize("sending", [False, True], ids=["", "while it sends a batch"])
def test_a_killed_dataloader_worker_stops_with_a_saved_state(folder, monkeypatch, sending):
    name = f"worker {sending}"
    keys = keys_of(folder, name, dataloader_num_workers=1)
    earlier = psutil.Process().children()  # of other tests: torch would tell of a worker of theirs at any later time

    def kill_workers() -> None:
        for child in set(psutil.Process().children()) - set(earlier):
            child.kill()

    def cut(*args, **kwargs):
        raise ConnectionResetError(104, "Connection reset by peer")

    def end() -> None:
        if sending:  # the batch is cut off before the worker has ended: here, a moment before
            monkeypatch.setattr("multiprocessing.queues.Queue.get", cut)
            threading.Timer(0.01, kill_workers).start()
        else:
            kill_workers()

    with pytest.raises(
        UserError, match="A dataloader worker was killed.*checkpoint-[12] is saved.*dataloader_num_workers"
    ):
        train(keys, At("on_step_begin", 1, end))
    monkeypatch.undo()
    gc.collect()  # torch may tell of the worker as long as its loader lives
    train(keys)
    assert_as_whole(folder, name)


@pytest.fixture
def wandb_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    yield wandb
    with contextlib.suppress(Exception):
        wandb.teardown()
    wandb.run = None


def test_an_unreachable_wandb_does_not_stop_the_training(folder, wandb_run, monkeypatch, capfd, caplog, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    train(keys_of(folder, "unreachable", report_to="wandb"))
    assert "this run is logged offline" in capfd.readouterr().err + caplog.text
    assert list(tmp_path.glob("wandb/offline-run-*"))
    assert_as_whole(folder, "unreachable")


def test_a_wandb_that_dies_in_the_middle_does_not_stop_the_training(folder, wandb_run, monkeypatch, capfd, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")

    def kill_service() -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
                if "wandb-core" in " ".join(child.cmdline()) or "gpu_stats" in child.name():
                    child.kill()

    train(keys_of(folder, "wandb-dies", report_to="wandb"), At("on_step_begin", 3, kill_service))
    assert_as_whole(folder, "wandb-dies")


# losses that are not finite -----------------------------------------------------------------------------------


def test_a_bad_step_is_skipped_listed_and_left_out_of_the_log(folder, monkeypatch):
    from llava_orpo.training.trainer import SharedPrefixTrainer

    original, seen = SharedPrefixTrainer.pair_losses, []

    def pair_losses(self, model, batch):
        terms, output = original(self, model, batch)
        if self.is_in_train and model.training:
            seen.append([row["pair_id"] for row in batch["rows"]])
            if len(seen) == 2:
                factor = torch.ones_like(terms["loss"])
                factor[1] = float("nan")
                terms = {**terms, "loss": terms["loss"] * factor}
        return terms, output

    monkeypatch.setattr(SharedPrefixTrainer, "pair_losses", pair_losses)
    kept = {}
    keys = keys_of(folder, "bad", logging_steps=1, eval_strategy="no", save_strategy="no", max_steps=3)

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            moments = [value["exp_avg"].clone() for value in optimizer.state.values()]
            kept[state.global_step] = weights, moments

    train(keys, Weights())
    assert all(torch.equal(tensor, kept[2][0][name]) for name, tensor in kept[1][0].items())
    assert all(map(torch.equal, kept[1][1], kept[2][1]))
    assert not all(torch.equal(tensor, kept[3][0][name]) for name, tensor in kept[2][0].items())
    [line] = [json.loads(line) for line in (folder / "bad" / "anomalies.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and line["reason"] == "non-finite loss"
    assert [(pair["pair_id"], pair["loss"], pair["dataset"]) for pair in line["pairs"]] == [(seen[1][1], "nan", "rows")]
    assert [entry["current_steps"] for entry in log_lines(folder / "bad") if entry["loss"]] == [1, 3]
    assert "NaN" not in (folder / "bad" / "trainer_log.jsonl").read_text()


def test_bad_steps_in_a_row_stop_the_training_with_the_last_checkpoint_intact(folder, monkeypatch):
    from llava_orpo.training.trainer import SharedPrefixTrainer

    original = SharedPrefixTrainer.pair_losses

    def pair_losses(self, model, batch):
        terms, output = original(self, model, batch)
        return ({**terms, "loss": terms["loss"] * 1e39} if self.state.global_step >= 3 else terms), output

    monkeypatch.setattr(SharedPrefixTrainer, "pair_losses", pair_losses)
    with pytest.raises(UserError, match=r"2 optimizer steps in a row.*max_anomalies: 2.*goes on from checkpoint-3\.$"):
        train(keys_of(folder, "diverges", max_anomalies=2, eval_strategy="no"))
    assert [complete.problem(path) for path in complete.checkpoints(folder / "diverges")] == [""]


@pytest.mark.heavy
def test_two_processes_skip_the_same_steps(folder):
    keys = keys_of(folder, "two-diverge", max_anomalies=2, pref_beta=1e39, eval_strategy="no", ddp_timeout=120)
    with pytest.raises(AssertionError, match="2 optimizer steps in a row"):
        train_on_processes(folder, [{**keys, "per_device_train_batch_size": 1}], 2)
    lines = [json.loads(line) for line in (folder / "two-diverge" / "anomalies.jsonl").read_text().splitlines()]
    assert [len(line["pairs"]) for line in lines] == [2, 2]


def test_the_filter_that_hides_losses_is_off(tmp_path):
    write_rows(tmp_path, photo_rows(1, 1))
    trainer = build_trainer(tmp_path, {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj"})
    assert trainer.args.logging_nan_inf_filter is False
