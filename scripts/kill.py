"""Kills trainings at random moments and checks that each one ends bit-identical to the training that nobody killed.

    python scripts/kill.py --kills 20 --out outputs/kill

Trains a small random model on photographs, in several series. In each one the same command is killed with SIGKILL,
started again, and so on; at its end the adapter, the optimizer, the scheduler, trainer_log.jsonl, the trainer's history
and the evaluation's files are compared with those of the uninterrupted training. Moments are drawn from --seed.

    random       at any moment, loading included
    checkpoint   while a checkpoint is being written
    evaluation   during an evaluation
    grouped      in the second epoch of a training that groups pairs by image
    sigterm      SIGTERM in place of SIGKILL, so that the training saves and ends by itself
    rank         one of two processes, through `llamafactory-cli train`

All series but the last start the training in a process forked from one that has imported everything, which saves 15 s
per start. --series picks some of them. Writes <out>/kills.json. Takes about 10 minutes for 20 kills on two CPU cores.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_orpo import recipe
from llava_orpo.errors import UserError
from llava_orpo.files import write_json

SERIES = ("checkpoint", "random", "evaluation", "grouped", "sigterm", "rank")
STEPS_PER_EPOCH = 6
EVALUATION_BATCHES = 10  # not the number of steps: the two progress bars are told apart by it
MISSES = 10  # trainings in a row that were over before the moment of the kill came
TIMES = ("time", "runtime", "per_second", "data_wait_fraction", "elapsed", "remaining")
WAIT_SECONDS = 300.0


@dataclass
class Kill:
    """One kill: the series, the moment that was meant, and the step after which the log ended then."""

    series: str
    moment: str
    seconds: float
    logged_step: int
    half_written: bool


def main(argv: list[str]) -> int:
    flags = recipe.flags(__doc__)
    flags.add_argument("--kills", type=int, default=20, help="kills in all, dealt out to the series in turn")
    flags.add_argument("--out", type=Path, default=Path("outputs/kill"))
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--series", default=",".join(SERIES), help="some of " + ", ".join(SERIES))
    options = flags.parse_args(argv)
    names = options.series.split(",")
    if unknown := set(names) - set(SERIES):
        raise UserError(f"--series: {', '.join(sorted(unknown))} is none of {', '.join(SERIES)}.")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    _make_data(options.out)
    if set(names) - {"rank"}:
        warm = _forks().Process(target=int)  # imports everything, once for all trainings
        warm.start()
        warm.join()
    counts = {name: options.kills // len(names) + (i < options.kills % len(names)) for i, name in enumerate(names)}
    draw = random.Random(options.seed)
    whole: dict[str, tuple[Path, float]] = {}
    kills, results = [], []
    for name in names:
        kind = name if name in ("grouped", "rank") else "plain"
        if kind not in whole:
            started = time.monotonic()
            folder = options.out / f"whole-{kind}"
            code = _Training(options.out, kind, folder).wait()
            if code:
                raise UserError(f"The uninterrupted training of {kind} failed: see {folder}.log.")
            whole[kind] = (folder, time.monotonic() - started)
        folder = options.out / name
        done = _run_series(options.out, name, kind, folder, counts[name], whole[kind][1], draw)
        differences = compare(whole[kind][0], folder)
        kills += done
        results.append({"series": name, "kills": len(done), "differences": differences})
        half = sum(kill.half_written for kill in done)
        steps = ", ".join(str(kill.logged_step) for kill in done)
        found = f"differs in {', '.join(differences)}" if differences else "identical"
        print(f"{name:<12} {len(done)} kills ({half} half-written), after steps {steps}: {found}", flush=True)
    bad = [result for result in results if result["differences"]]
    survived = sum(result["kills"] for result in results if not result["differences"])
    print(f"{survived} of {len(kills)} kills survived, {len(results) - len(bad)} of {len(results)} series identical.")
    content = {"survived": survived, "series": results, "kills": [vars(kill) for kill in kills]}
    write_json(options.out / "kills.json", content)
    return 1 if bad else 0


def _run_series(out, name: str, kind: str, folder: Path, count: int, seconds: float, draw) -> list[Kill]:
    done: list[Kill] = []
    missed = 0
    while len(done) < count:
        training = _Training(out, kind, folder)
        started = time.monotonic()
        reached = _MOMENTS[name](training, folder, seconds, draw)
        if training.ended():
            if training.wait():
                raise UserError(f"A training of the series {name} failed: see {folder}.log.")
            shutil.rmtree(folder)  # it was over before its moment came
            missed += 1
            if missed == MISSES:
                raise UserError(f"--series {name}: {MISSES} trainings in a row were over before they could be killed.")
            continue
        missed = 0
        training.kill(signal.SIGTERM if name == "sigterm" else signal.SIGKILL, draw)
        half = any(folder.glob("checkpoint-*/.saving"))
        done.append(Kill(name, reached, round(time.monotonic() - started, 3), _logged_step(folder), half))
    code = _Training(out, kind, folder).wait()
    if code:
        raise UserError(f"The last training of the series {name} failed: see {folder}.log.")
    return done


# moments ------------------------------------------------------------------------------------------------------


def _poll(training: _Training, met: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not met() and not training.ended() and time.monotonic() < end:
        time.sleep(0.002)


def _any_moment(training, folder, seconds, draw) -> str:
    if draw.random() < 0.25:
        wait = draw.uniform(0.0, 0.5) * seconds
        end = time.monotonic() + wait
        _poll(training, lambda: time.monotonic() >= end)
        return f"{wait:.2f} s after its start"
    step = draw.randrange(2 * STEPS_PER_EPOCH)
    bar = re.compile(rb"\b(\d+)/%d \[" % (2 * STEPS_PER_EPOCH))
    _poll(training, lambda: max(map(int, bar.findall(training.printed())), default=-1) >= step)
    wait = draw.uniform(0, 0.3)
    time.sleep(wait)
    return f"{wait * 1000:.0f} ms after step {step} or the first one of this start"


def _in_a_checkpoint(training, folder, seconds, draw) -> str:
    nth = draw.choice((1, 1, 2))
    seen: set[str] = set()

    def met() -> bool:
        seen.update(path.parent.name for path in folder.glob("checkpoint-*/.saving"))
        return len(seen) >= nth

    _poll(training, met)
    wait = draw.uniform(0, 0.03)
    time.sleep(wait)
    return f"{wait * 1000:.0f} ms into a checkpoint"


def _in_an_evaluation(training, folder, seconds, draw) -> str:
    earlier = draw.choice((0, 1, 1, 2))
    _poll(training, lambda: training.printed().count(b"'eval_loss'") >= earlier)
    printed = len(training.printed())
    # the bar's first line: its name may come too late, because a bar is printed again only after a tenth of a second
    _poll(training, lambda: f"| 0/{EVALUATION_BATCHES} [".encode() in training.printed()[printed:])
    wait = draw.uniform(0, 0.1)
    time.sleep(wait)
    return f"{wait * 1000:.0f} ms into an evaluation, after {earlier} others"


def _in_the_second_epoch(training, folder, seconds, draw) -> str:
    step = draw.randrange(STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH)
    _poll(training, lambda: b"Running training" in training.printed() and _logged_step(folder) >= step)
    wait = draw.uniform(0, 0.05)
    time.sleep(wait)
    return f"{wait * 1000:.0f} ms after step {step} or the first one of this start"


def _after_a_step(training, folder, seconds, draw) -> str:
    _poll(training, lambda: b"Running training" in training.printed())
    first = _logged_step(folder)
    _poll(training, lambda: _logged_step(folder) > first)
    wait = draw.uniform(0, 0.15) * seconds
    time.sleep(wait)
    return f"{wait:.2f} s after a logged step"


_MOMENTS = {
    "random": _any_moment,
    "checkpoint": _in_a_checkpoint,
    "evaluation": _in_an_evaluation,
    "grouped": _in_the_second_epoch,
    "sigterm": _after_a_step,
    "rank": _after_a_step,
}


# trainings ----------------------------------------------------------------------------------------------------


class _Training:
    """The same training, started once more: forked, or for `rank` two processes of the command."""

    def __init__(self, out: Path, kind: str, folder: Path) -> None:
        self.log = folder.with_suffix(".log")
        self._printed_before = self.log.stat().st_size if self.log.exists() else 0
        keys = _keys(out, kind, folder)
        self.command = self.process = None
        if kind == "rank":
            path = folder.with_suffix(".yaml")
            path.write_text(json.dumps(keys))  # JSON is YAML
            programs = Path(sys.executable).parent
            env = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": f"{programs}:{os.environ['PATH']}"}
            with self.log.open("ab") as log:
                self.command = subprocess.Popen(
                    [programs / "llamafactory-cli", "train", path],
                    env={**os.environ, **env},
                    stdout=log,
                    stderr=log,
                )
        else:
            self.process = _forks().Process(target=_train, args=(keys, str(self.log)))
            self.process.start()

    def printed(self) -> bytes:
        """What it has printed so far."""
        if not self.log.exists():
            return b""
        with self.log.open("rb") as log:
            log.seek(self._printed_before)
            return log.read()

    def ended(self) -> bool:
        return self.command.poll() is not None if self.command else not self.process.is_alive()

    def kill(self, number: int, draw) -> None:
        """Kills it, or one of its two processes, and waits for the end of all."""
        if self.command:
            import psutil

            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(self.command.pid).children(recursive=True)
                workers = sorted(
                    (child for child in children if "RANK" in child.environ()), key=lambda child: child.pid
                )
                if workers:
                    draw.choice(workers).send_signal(number)
        else:
            os.kill(self.process.pid, number)
        self.wait()

    def wait(self) -> int:
        if self.command:
            return self.command.wait(WAIT_SECONDS * 2)
        self.process.join(WAIT_SECONDS * 2)
        return self.process.exitcode


def _forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llamafactory.train.tuner", "llava_orpo.training.workflow"])
    return context


def _train(keys: dict, log: str) -> None:
    """What `llamafactory-cli train` does after it has read its command line."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # a moment is known by what was printed
    from llamafactory.train.tuner import run_exp

    run_exp(keys)


def _keys(out: Path, kind: str, folder: Path) -> dict:
    keys = {
        "plugins": "llava_orpo",
        "model_name_or_path": str(out / "model"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 4,
        "lora_dropout": 0.1,  # a lost random state would show
        "lora_target": "q_proj,v_proj",
        "pref_loss": "orpo",
        "dataset_dir": str(out),
        "dataset": "train",
        "eval_dataset": "heldout",
        "template": "llava_v16_mistral",
        "cutoff_len": 4096,
        "output_dir": str(folder),
        "report_to": "none",
        "disable_tqdm": False,  # not what TRANSFORMERS_VERBOSITY says: a moment is known by the bars
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,  # EVALUATION_BATCHES batches
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 4,  # checkpoints cut through what one log sums up
        "save_steps": 3,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "seed": 0,
    }
    if kind == "grouped":
        keys |= {"group_pairs_by_image": True, "max_pairs_per_image": 3, "logging_steps": 1}
    if kind == "rank":
        keys |= {"per_device_train_batch_size": 2, "ddp_timeout": 120, "logging_steps": 1}
    return keys


def _make_data(out: Path) -> None:
    from llava_orpo.tiny import photo_pairs, random_model

    random_model.write(random_model.Geometry((64, 128, 2, 4, 2), (32, 64, 3, 2), tile=56), out / "model")
    info = {}
    for name, images, pairs in (("train", 8, 3), ("heldout", EVALUATION_BATCHES, 2)):
        photo_pairs.write(
            out / f"{name}.parquet", photo_pairs.rows(images, pairs, 8, 5, sizes=[(300, 200), (200, 300)])
        )
        info[name] = {"file_name": f"{name}.parquet", "formatting": "rlaif_v", "ranking": True}
    write_json(out / "dataset_info.json", info)


# comparing ----------------------------------------------------------------------------------------------------


def _logged_step(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        return json.loads((folder / "trainer_log.jsonl").read_text().splitlines()[-1])["current_steps"]
    return 0


def compare(whole: Path, other: Path) -> list[str]:
    """The files in which two trainings differ, apart from times."""
    import torch

    found = []
    last = sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[-1].name
    for name in ("adapter_model.safetensors", "preference_eval.json", "preference_pairs.jsonl"):
        if (whole / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(folder / last / name, weights_only=True) for folder in (whole, other)]
        if list(_leaves(states[0])) != list(_leaves(states[1])):
            found.append(f"{last}/{name}")
    logs = [
        [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
        for folder in (whole, other)
    ]
    if list(map(_timeless, logs[0])) != list(map(_timeless, logs[1])):
        found.append("trainer_log.jsonl")
    states = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, other)]
    if list(map(_timeless, states[0])) != list(map(_timeless, states[1])):
        found.append("trainer_state.json")
    return found


def _timeless(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if not any(word in key for word in TIMES)}


def _leaves(state, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _leaves(state[key], f"{path}/{key}")
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from _leaves(value, f"{path}/{number}")
    elif hasattr(state, "numpy"):
        yield path, (str(state.dtype), tuple(state.shape), state.contiguous().numpy().tobytes())
    else:
        yield path, state


if __name__ == "__main__":
    recipe.run(main)
