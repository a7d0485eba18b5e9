"""The progress of a study's runs: live on a terminal, lines anywhere else."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from ..progress import LOG_SECONDS, Follower
from .results import is_finished
from .spec import Run

SHOWN_ENDED = 8  # finished runs in the live list


class RunList:
    """Where there is no terminal: each run's commands as they begin, its progress every 20 s, and what came out.

    total: number of runs; ended: how many of them have a result; seconds: what those took, each; estimate: seconds of
    a run where none has finished, or None. Called by several threads.
    """

    def __init__(
        self,
        total: int,
        ended: int,
        seconds: Sequence[float],
        estimate: float | None,
        jobs: int,
        file: IO[str] | None = None,
    ) -> None:
        self.total, self.ended, self.jobs = total, ended, jobs
        self.failed = 0
        self.seconds = list(seconds)
        self.estimate = estimate
        self.file = file or sys.stdout
        self.running: dict[str, tuple[Sequence[str], Follower | None, float]] = {}
        self._lock = threading.RLock()
        self._next: dict[str, float] = {}

    def __enter__(self) -> RunList:
        return self

    def __exit__(self, *_) -> None:
        pass

    def begin(self, run: Run, command: Sequence[str]) -> None:
        """Says that a command of a run starts now."""
        with self._lock:
            _, _, started = self.running.get(run.name, ((), None, time.monotonic()))
            self.running[run.name] = (command, None, started)
            self._next[run.name] = LOG_SECONDS
            self._print(f"\n[{run.name}]\n$ {shlex.join(command)}")

    def follow(self, run: Run, follower: Follower) -> None:
        """Takes the progress of a run's running command (see `progress.run`)."""
        with self._lock:
            command, _, started = self.running[run.name]
            self.running[run.name] = (command, follower, started)
            if follower.seconds >= self._next[run.name]:
                self._next[run.name] = follower.seconds + LOG_SECONDS
                self._print(f"  {run.name}, {follower.seconds:.0f} s  {state(follower)}")

    def end(self, run: Run, result: dict[str, Any]) -> None:
        """Says that a run has ended, and with what."""
        with self._lock:
            self.running.pop(run.name, None)
            self.ended += 1
            if is_finished(result):
                self.seconds.append(result["seconds"])
            else:
                self.failed += 1
            self._print(f"  {run.name}, {outcome(result)}\n{self.overall()}")

    def reused(self, runs: int) -> None:
        """Says that so many more runs have a result and need not be run."""
        with self._lock:
            self.ended += runs

    def tick(self) -> None:
        """Called about four times a second while runs are running."""

    def overall(self) -> str:
        """One line on all runs: how many have ended, how many failed, and the time left."""
        failed = f", {self.failed} failed" if self.failed else ""
        left = self.left()
        time_left = "" if self.ended == self.total or left is None else f", about {duration(left)} left"
        return f"{self.ended} of {self.total} runs{failed}{time_left}"

    def left(self) -> float | None:
        """Seconds that the runs without a result will take, or None while nothing says how long one takes."""
        if not self.seconds and self.estimate is None:
            return None
        each = sum(self.seconds) / len(self.seconds) if self.seconds else self.estimate
        now = time.monotonic()
        spent = sum(min(each, now - started) for _, _, started in self.running.values())
        return max(0.0, each * (self.total - self.ended) - spent) / self.jobs

    def _print(self, text: str) -> None:
        print(text, file=self.file, flush=True)


class LiveRunList(RunList):
    """On a terminal: the newest results, the running commands with their progress, and a bar over all runs."""

    def __init__(self, *arguments, console) -> None:
        from rich.live import Live

        super().__init__(*arguments)
        self.console = console
        self.lines: list[str] = []
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, redirect_stderr=False)

    def __enter__(self) -> LiveRunList:
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def end(self, run: Run, result: dict[str, Any]) -> None:
        with self._lock:
            self.lines.append(f"{run.name}, {outcome(result)}")
            super().end(run, result)

    def _print(self, text: str) -> None:
        pass

    def _render(self):
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        with self._lock:
            shown = [Text(line, overflow="ellipsis", no_wrap=True) for line in self.lines[-SHOWN_ENDED:]]
            for name, (command, follower, _) in self.running.items():
                shown.append(Text(name, "bold", overflow="ellipsis", no_wrap=True))
                shown.append(Text(f"  $ {shlex.join(command)}", "dim", overflow="ellipsis", no_wrap=True))
                about = f"  {follower.seconds:.0f} s  {state(follower)}" if follower else "  starts ..."
                shown.append(Text(about, "cyan", overflow="ellipsis", no_wrap=True))
            shown.append(ProgressBar(total=self.total, completed=self.ended, width=min(60, self.console.width)))
            shown.append(Text(self.overall()))
            return Group(*shown)


def run_list(total: int, ended: int, seconds: Sequence[float], estimate: float | None, jobs: int) -> RunList:
    """The progress of runs for wherever stdout goes; a context manager."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        if console.is_interactive:
            return LiveRunList(total, ended, seconds, estimate, jobs, console=console)
    return RunList(total, ended, seconds, estimate, jobs)


def state(follower: Follower) -> str:
    """What a running command tells of itself."""
    return str(follower.progress or (f"newest output: {follower.line}" if follower.line else "starts ..."))


def outcome(result: dict[str, Any]) -> str:
    """What came out of a run, in one line."""
    if not is_finished(result):
        return f"failed: {result['failed']}"
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result["metrics"].items())
    return f"{result['seconds']:.0f} s: {numbers}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
