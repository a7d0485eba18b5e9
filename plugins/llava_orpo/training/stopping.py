"""SIGTERM and Ctrl-C during a training: a checkpoint is saved at the end of the running step, then the command ends.

The exit code is 128 + the signal's number (143 for SIGTERM, 130 for Ctrl-C). A second signal ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from ..errors import end_by_signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_SECONDS = 2.0  # a terminal's Ctrl-C reaches a process directly, and once more through torchrun


class EvaluationStopped(Exception):
    """Leaves an evaluation between two batches."""


class StopRequest:
    """Counts the signals inside its `with` block.

    number  the signal that asked to stop, None so far
    phase   when a signal that finds nothing to save ends the process, and what comes next; the end of a sentence
    saving  whether a training runs whose state can be saved; otherwise a signal ends the process at once
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.saving = False
        self.phase = "before the training began. The same command starts again"
        self.shown = int(os.environ.get("LOCAL_RANK", 0)) == 0
        self._at = 0.0
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number or signal.SIGTERM).name

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def end(self, sentence: str) -> None:
        """Ends the process with `sentence` as its one line."""
        end_by_signal(self.number or signal.SIGTERM, sentence if self.shown else "")

    def _note(self, number: int, frame) -> None:
        if os.getpid() != self._process:  # a worker that was forked: Ctrl-C is its parent's business
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self.number is None:
            self.number, self._at = number, now
            if not self.saving:
                self.end(f"Stopped by {self.name} {self.phase}.")
            self._write(f"{self.name}: a checkpoint is saved at the end of this step; once more stops at once.")
        elif now - self._at > ONE_REQUEST_SECONDS:
            self._write(f"Stopped at once by {self.name}. The same command goes on from the last checkpoint.")
            os._exit(128 + number)

    def _write(self, sentence: str) -> None:
        if self.shown:
            os.write(2, f"\n{sentence}\n".encode())  # print may have been interrupted in the middle of a line
