"""Runs the trainings of a study: several at once, resumable, failures noted and passed over."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import progress
from ..errors import UserError
from ..files import write_json
from . import results
from .shown import RunList
from .spec import Run, Study

TRAINER_LOG = "trainer_log.jsonl"
SHOW_SECONDS = 0.25


class Stopped(Exception):
    """The user stopped the study; the same command goes on."""


class Runner:
    """Runs trainings of `study`, up to `jobs` at once, and stores their results.

    A run with a stored result of the same recipe and command is not repeated, one that was interrupted goes on from its
    last checkpoint, one that failed is tried again by the next command. programs: {the first word of a command: what is
    started in its place}, by default this environment's own.
    """

    def __init__(self, study: Study, jobs: int, shown: RunList, programs: dict[str, str] | None = None) -> None:
        self.study, self.jobs, self.shown = study, jobs, shown
        self.programs = programs if programs is not None else own_programs()
        self.stop = threading.Event()

    def run_all(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """The results of `runs` in their order, each as it is stored.

        Raises Stopped after Ctrl-C, SIGTERM or SIGHUP, once the running commands have ended; any other error of this
        process likewise.
        """
        stored = {run.name: results.stored(self.study, run) for run in runs}
        found = {run.name: stored[run.name] for run in runs if is_done(self.study, run, stored[run.name])}
        waiting = [run for run in runs if run.name not in found]
        futures: dict[str, Future] = {}
        with ThreadPoolExecutor(self.jobs) as pool, self._interrupts():
            try:
                for run in waiting:
                    futures[run.name] = pool.submit(self._run, run)
                left = set(futures.values())
                while left and not self.stop.is_set():
                    done, left = wait(left, SHOW_SECONDS, "FIRST_EXCEPTION")
                    if any(future.exception() for future in done):
                        break
                    self.shown.tick()
            finally:
                if any(not future.done() for future in futures.values()):
                    self.stop.set()
                    pool.shutdown(cancel_futures=True)
        for future in futures.values():
            if not future.cancelled() and (error := future.exception()) and not isinstance(error, KeyboardInterrupt):
                raise error
        if self.stop.is_set():
            raise Stopped
        return [found[run.name] if run.name in found else futures[run.name].result() for run in runs]

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Notes what asks this process to stop, in place of raising in the middle of something."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before[number] = signal.signal(number, lambda *_: self.stop.set())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self, run: Run) -> dict[str, Any]:
        if self.stop.is_set():
            raise KeyboardInterrupt
        state = self._prepare(run)
        for number, words in enumerate((run.command, *run.after)):
            if number < len(state["done"]):
                continue
            log = self.study.outputs / f"{run.name}{f'.after{number}' if number else ''}.log"
            self.shown.begin(run, words)
            started = time.monotonic()
            failed = self._start(run, words, log, number == 0)
            state["done"].append(time.monotonic() - started)
            if failed:
                return self._end(run, state, f"{failed} ({log})")
            write_json(_state_file(self.study, run), state)
        try:
            return self._end(run, state, "", results.read_metrics(self.study.metrics, run.output_dir))
        except UserError as error:
            return self._end(run, state, str(error))

    def _prepare(self, run: Run) -> dict[str, Any]:
        """How far a run with the same mark has come, as {"mark", "done": seconds of each finished command}.

        A folder of another recipe or command, or without a checkpoint to go on from, is removed.
        """
        path = _state_file(self.study, run)
        state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if state is None and run.output_dir.exists():
            raise UserError(f"{run.output_dir} was not made by this study; move it away, or rename the study's file.")
        if state and (state["mark"] != run.mark or not (state["done"] or any(run.output_dir.glob("checkpoint-*")))):
            shutil.rmtree(run.output_dir, ignore_errors=True)
            state = None
        if state is None:
            state = {"mark": run.mark, "done": []}
            write_json(path, state)
        return state

    def _start(self, run: Run, words: Sequence[str], log: Path, trains: bool) -> str:
        """Runs one command; returns "" or why it failed. Raises KeyboardInterrupt when the study is stopped."""

        def show(follower: progress.Follower) -> None:
            if self.stop.is_set():
                raise KeyboardInterrupt
            self.shown.follow(run, follower)

        command = [self.programs.get(words[0], words[0]), *words[1:]]
        env = dict(os.environ)
        env.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
        if self.jobs > 1:
            env.setdefault("OMP_NUM_THREADS", "1")
        trainer_log = run.output_dir / TRAINER_LOG if trains else None
        try:
            code = progress.run(command, log, show, trainer_log, env)
        except OSError as error:
            return f"{words[0]} cannot be started: {error.strerror}"
        return f"exit code {code}: {_last_line(log)}" if code else ""

    def _end(self, run: Run, state: dict[str, Any], failed: str, metrics: dict[str, float] | None = None) -> dict:
        result = results.write_result(self.study, run, sum(state["done"]), metrics or {}, failed)
        self.shown.end(run, result)
        return result


def is_done(study: Study, run: Run, result: dict[str, Any] | None) -> bool:
    """Whether nothing of a run is left to do, given its stored result.

    A metric that the study has named since is read from the run's folder, if that is there.
    """
    if not results.is_finished(result):
        return False
    has_all = all(results.value(result, metric) is not None for metric in study.metrics)
    return has_all or not _state_file(study, run).exists()


def done(study: Study, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The results of those runs of which nothing is left to do."""
    stored = [(run, results.stored(study, run)) for run in runs]
    return [result for run, result in stored if is_done(study, run, result)]


def own_programs() -> dict[str, str]:
    """This environment's programs by the names that commands call them."""
    return {"llamafactory-cli": str(Path(sys.executable).with_name("llamafactory-cli")), "python": sys.executable}


@contextmanager
def alone(study: Study) -> Iterator[None]:
    """Keeps a second command of the same study out while the block runs. Raises UserError if one is running."""
    study.outputs.mkdir(parents=True, exist_ok=True)
    with open(study.outputs / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{study.file} is being run already; wait for that command, or stop it.") from None
        yield


def _state_file(study: Study, run: Run) -> Path:
    return study.outputs / f"{run.name}.state.json"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if len(lines) > 1 else "no output"  # the first is the command
