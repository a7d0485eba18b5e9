"""A list of steps with the progress of the running one: live on a terminal, a line every 20 s anywhere else.

rich is imported for the live list alone: environments without it show the lines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from .progress import LOG_SECONDS, Follower

LIST_WIDTH = 100  # columns, on a wider terminal too
MARKS = {"waits": " ", "runs": "▸", "done": "✓", "failed": "✗"}
PLAIN_MARKS = {"waits": " ", "runs": ">", "done": "+", "failed": "x"}  # where the terminal is not UTF-8


@dataclass
class Step:
    """A line of the list: its title, the command that does it and how it went."""

    title: str
    command: str = ""
    state: str = "waits"  # waits, runs, done, failed
    seconds: float = 0.0
    note: str = ""


class LogSteps:
    """Steps where there is no terminal: each with its command as it begins, then with its progress every 20 s."""

    def __init__(self, titles: Sequence[str], file: IO[str] | None = None) -> None:
        self.file = file or sys.stdout
        self.steps = [Step(title) for title in titles]
        self.running: Step | None = None
        self._next = LOG_SECONDS

    def __enter__(self) -> LogSteps:
        return self

    def __exit__(self, *_) -> None:
        pass

    def begin(self, title: str, command: str) -> None:
        """Says that the next step, one of the titles, starts now."""
        self.running = next(step for step in self.steps if step.title == title)
        self.running.command, self.running.state = command, "runs"
        self._next = LOG_SECONDS
        self._print(f"\n[{title}]\n$ {command}")

    def show(self, follower: Follower) -> None:
        """Shows the progress of the running command (see `progress.run`)."""
        if follower.seconds >= self._next:
            self._next = follower.seconds + LOG_SECONDS
            self._print(f"  {follower.seconds:.0f} s  {_state(follower)}")

    def end(self, seconds: float, result: str, reused: bool = False) -> None:
        """Says that the running step is done."""
        self.running.state, self.running.seconds = "done", seconds
        self.running.note = "done before" if reused else ""
        self._print(f"  done before, in {seconds:.0f} s: {result}" if reused else f"  {seconds:.0f} s: {result}")

    def fail(self) -> None:
        """Says that the running step failed or was stopped."""
        self.running.state = "failed"

    def _print(self, text: str) -> None:
        print(text, file=self.file, flush=True)


class LiveSteps(LogSteps):
    """Steps on a terminal: the whole list stays in place, the running step with its command and a bar."""

    def __init__(self, titles: Sequence[str], console) -> None:
        from rich.live import Live

        super().__init__(titles)
        self.console = console
        self.follower: Follower | None = None
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, redirect_stderr=False)

    def __enter__(self) -> LiveSteps:
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self.follower = None
        self._live.stop()

    def begin(self, title: str, command: str) -> None:
        self.follower = None
        super().begin(title, command)

    def show(self, follower: Follower) -> None:
        self.follower = follower

    def _print(self, text: str) -> None:
        pass

    def _render(self):
        from rich.console import Group

        shown = []
        for step in self.steps:
            shown.append(self._heading(step))
            if step.state == "runs" and self.follower:
                shown += self._details(step, self.follower)
        return Group(*shown)

    def _heading(self, step: Step):
        from rich.table import Table
        from rich.text import Text

        marks = MARKS if self.console.encoding.lower().startswith("utf") else PLAIN_MARKS
        style = {"waits": "dim", "runs": "bold", "done": "", "failed": "bold red"}[step.state]
        seconds = f"{step.seconds:.0f} s" if step.state == "done" else ""
        if step.state == "runs" and self.follower:
            seconds = f"{self.follower.seconds:.0f} s"
        line = Table.grid(padding=(0, 1))
        line.width = min(self.console.width, LIST_WIDTH)
        line.add_column(width=1, style="green" if step.state == "done" else style)
        line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        line.add_column(justify="right", no_wrap=True, style="dim")
        line.add_row(marks[step.state], Text(step.title, style), ", ".join(filter(None, (step.note, seconds))))
        return line

    def _details(self, step: Step, follower: Follower) -> list:
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        command = Padding(Text(f"$ {step.command}", "dim", overflow="fold"), (0, 1, 0, 2))
        progress = follower.progress
        line = Table.grid(padding=(0, 1))
        line.width = min(self.console.width, LIST_WIDTH)
        line.add_column(width=1)
        if progress is None or progress.fraction is None:
            line.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            line.add_row("", Text(_state(follower), "cyan" if progress else "dim"))
            return [command, line]
        about = ", ".join(part for part in (progress.count, progress.facts) if part)
        for more in ({"max_width": 24}, {"ratio": 1}, {}, {"justify": "right"}):
            line.add_column(no_wrap=True, overflow="ellipsis", **more)
        done = ProgressBar(total=1.0, completed=progress.fraction)
        left = progress.left and f"{progress.left} left"
        line.add_row("", Text(progress.label, "cyan"), done, Text(about), left)
        return [command, line]


def _state(follower: Follower) -> str:
    return str(follower.progress or (f"newest output: {follower.line}" if follower.line else "starts ..."))


def step_list(titles: Sequence[str]) -> LogSteps:
    """The list of steps for wherever stdout goes: live on a terminal, lines anywhere else. A context manager."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        if console.is_interactive:
            return LiveSteps(titles, console)
    return LogSteps(titles)
