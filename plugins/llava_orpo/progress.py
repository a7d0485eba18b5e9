"""Progress of long work: bars for our own loops, and other commands whose output tells their progress.

`bar` and `waiting` are for work of this process. `run` starts a command, writes its whole output to a file, and reads
its progress from that output and from LLaMA-Factory's trainer_log.jsonl; step_list.py shows it.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

LOG_SECONDS = 20.0  # between two lines of progress where there is no terminal
FILE_SECONDS = 10.0  # between two states of one bar in a step's file
FINISHED_SECONDS = 3.0  # how long a full bar is shown when nothing follows it
POLL_SECONDS = 0.25
STOP_SECONDS = 10.0  # how long a command may take to end by itself

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COUNT = r"\d+(?:\.\d+)?[kMGTPE]?"
_BAR = re.compile(
    rf"(?:(?P<label>.*?): +)?(?:\d+%\|.*?\| *)?(?P<done>{_COUNT})(?:/(?P<total>{_COUNT}))?(?P<tail>[^\[\]/]*?)"
    r" ?\[(?P<elapsed>[\d:]+)(?:<(?P<left>[\d:?]+))?, *(?P<rate>[^,\]]*)(?:, (?P<facts>.*))?\]\s*"
)
_RATE = re.compile(r"[\d.?]+[kMGTPE]? *(?:s/(?P<slow>.+)|(?P<unit>.+)/s)")


@dataclass(frozen=True)
class Progress:
    """The progress of some work. `done` and `total` are texts to show; `fraction` is None without a known total."""

    done: str
    total: str = ""
    unit: str = ""
    label: str = ""
    facts: str = ""  # such as "loss=0.123"
    left: str = ""  # time left, such as "1:05"
    fraction: float | None = None

    @property
    def count(self) -> str:
        """The count as it is shown, such as "212/400 pairs"."""
        plural = "" if self.unit.endswith(("s", "B")) else "es" if self.unit.endswith("ch") else "s"
        many = self.unit and f" {self.unit}{plural}"
        return f"{self.done}/{self.total}{many}" if self.total else f"{self.done}{many or ' done'}"

    def __str__(self) -> str:
        parts = (self.count, self.facts, self.left and f"{self.left} left")
        return (f"{self.label}: " if self.label else "") + ", ".join(part for part in parts if part)


def parse_bar(text: str) -> Progress | None:
    """The state of a tqdm bar as it is printed, with or without a total; None for any other text."""
    match = _BAR.fullmatch(text.strip())
    if match is None:
        return None
    rate = _RATE.fullmatch(match["rate"].strip())
    unit = ((rate and (rate["unit"] or rate["slow"])) or match["tail"] or "").strip()
    fraction = None
    if match["total"]:
        total = _number(match["total"])
        fraction = min(1.0, _number(match["done"]) / total) if total else 1.0
    left = match["left"] or ""
    return Progress(
        done=match["done"],
        total=match["total"] or "",
        unit="" if unit == "it" else unit,
        label=(match["label"] or "").strip(" :"),
        facts=(match["facts"] or "").strip(),
        left="" if "?" in left or fraction == 1.0 else left.removeprefix("0"),
        fraction=fraction,
    )


def _number(text: str) -> float:
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}.get(text[-1])
    return float(text[:-1]) * scale if scale else float(text)


def parse_trainer_log(line: str) -> Progress | None:
    """One line of LLaMA-Factory's trainer_log.jsonl as progress; None for a line that is cut or tells none."""
    try:
        entry = json.loads(line)
        done, total = int(entry["current_steps"]), int(entry["total_steps"])
    except (ValueError, KeyError, TypeError):
        return None
    loss = entry.get("loss")
    return Progress(
        done=str(done),
        total=str(total),
        unit="step",
        label="training",
        facts=f"loss={loss:.4g}" if isinstance(loss, (int, float)) else "",
        left=str(entry.get("remaining_time") or "").removeprefix("0:").removeprefix("0") if done < total else "",
        fraction=min(1.0, done / total) if total else 1.0,
    )


class TrainerLog:
    """Follows a trainer_log.jsonl, which may not exist yet, or which a new run may be about to remove."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0  # lines of an earlier run say nothing
        self.newest: Progress | None = None

    def read(self) -> bool:
        """Reads what was added. Returns True if `newest` is new."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self.position:
                    self.position = 0
                file.seek(self.position)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            self.position = 0
            return False
        self.position += len(whole) + len(newline)
        found = [parse_trainer_log(line) for line in whole.decode(errors="replace").splitlines()]
        steps = [progress for progress in found if progress is not None]
        if steps:
            with_loss = [progress.facts for progress in steps if progress.facts]
            facts = with_loss[-1] if with_loss else self.newest.facts if self.newest else ""
            self.newest = replace(steps[-1], facts=facts)
        return bool(steps)


class Output:
    """A command's output as it comes: written to a file, with the newest bar and the newest line at hand.

    A bar is redrawn many times per second. The file gets its state every 10 s, its last state before any other line,
    and every full bar. Everything else is written as it is, without the escapes that move a cursor.
    """

    def __init__(self, file: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.file, self.clock = file, clock
        self.bar: Progress | None = None
        self.bar_time = 0.0
        self.line = ""
        self._row = ""
        self._redraws = False  # the next text takes the place of the row
        self._held = ""  # a bar's state that is not in the file yet
        self._written: Progress | None = None  # the last state in the file
        self._written_time = -FILE_SECONDS
        self._lock = threading.Lock()
        self._closed = False

    def feed(self, text: str) -> None:
        """Takes the next piece of output, cut anywhere. What comes after `close` is dropped."""
        with self._lock:
            if self._closed:
                return
            for piece in re.split(r"([\r\n])", text):
                if piece == "\n":
                    self._end_row(newline=True)
                elif piece == "\r":
                    self._redraws = True
                elif piece:
                    if self._redraws:
                        self._end_row(newline=False)
                    self._row += piece
                    self._look()
            self.file.flush()

    def close(self) -> None:
        """Writes the rest, which no line end followed."""
        with self._lock:
            if self._row.strip():
                self._end_row(newline=True)
            self._write_held()
            self.file.flush()
            self._closed = True

    def _look(self) -> None:
        text = _ESCAPE.sub("", self._row).strip()
        progress = parse_bar(text) if text.endswith("]") else None
        if progress is not None:
            self.bar, self.bar_time = progress, self.clock()

    def _end_row(self, newline: bool) -> None:
        text = _ESCAPE.sub("", self._row).rstrip()
        self._row, self._redraws = "", False
        progress = parse_bar(text)
        if progress is not None:
            self._held = text
            if progress.fraction == 1.0 or self.clock() - self._written_time >= FILE_SECONDS:
                self._write_held()
        elif newline or text:
            self._write_held()
            self.file.write(text + "\n")
            if text:
                self.line = text.strip()
                if self.bar is not None and self.bar.fraction == 1.0:
                    self.bar = None

    def _write_held(self) -> None:
        progress = parse_bar(self._held)
        if progress is not None and progress != self._written:
            self.file.write(self._held + "\n")
            self._written, self._written_time = progress, self.clock()
        self._held = ""


class Follower:
    """What a running command tells of itself: `progress` (None if it tells none), its newest `line`, `seconds`."""

    def __init__(self, output: Output, trainer_log: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.output, self.clock = output, clock
        self.trainer_log = trainer_log and TrainerLog(trainer_log)
        self.trainer_time = 0.0
        self.started = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the command was started."""
        return self.clock() - self.started

    @property
    def line(self) -> str:
        """The newest line of output that is not a bar."""
        return self.output.line

    @property
    def progress(self) -> Progress | None:
        """The newest of the output's bar and the trainer's log, or one for both where they count the same steps."""
        bar, when = self.output.bar, self.output.bar_time
        if self.trainer_log:
            if self.trainer_log.read():
                self.trainer_time = self.clock()
            logged = self.trainer_log.newest
            if logged and bar and bar.total == logged.total and not bar.label:
                bar = replace(logged, done=bar.done, left=bar.left, fraction=bar.fraction)
            elif logged and (bar is None or self.trainer_time > when):
                bar, when = logged, self.trainer_time
        if bar is not None and bar.fraction == 1.0 and self.clock() - when > FINISHED_SECONDS:
            return None  # the command is doing something else, which has no bar
        return bar


def run(
    command: Sequence[str],
    log: Path,
    show: Callable[[Follower], None],
    trainer_log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs a command to its end and returns its exit code; its whole output goes to `log`, behind the command itself.

    show: called about four times a second. Raises KeyboardInterrupt on Ctrl-C (SIGTERM and SIGHUP count as one), after
    the command and what it started have ended; OSError if it cannot be started.
    """
    bars = {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": str(POLL_SECONDS)}
    environment = {**(os.environ if env is None else env), **bars}
    environment.pop("COLUMNS", None)  # a bar that was cut to a window's width cannot be read
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        output = Output(file)
        follower = Follower(output, trainer_log)
        with Interrupts() as interrupts:
            # A group of its own: it and its children can be stopped together, and Ctrl-C reaches them once.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )
            reader = threading.Thread(target=_read, args=(process.stdout, output), daemon=True)
            reader.start()
            try:
                return _watch(process, interrupts, lambda: show(follower))
            except BaseException:
                _stop(process, interrupts)
                raise
            finally:
                reader.join(STOP_SECONDS / 2)  # what still holds the pipe is no longer read
                output.close()


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP in the block, where that is possible (in the main thread).

    The signals raise nothing: an exception in the middle of Popen.wait would leave its lock taken.
    """

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        self.count += 1


def _watch(process: subprocess.Popen, interrupts: Interrupts, show: Callable[[], None]) -> int:
    code = None
    while code is None and not interrupts.count:
        show()
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(POLL_SECONDS)
    if interrupts.count:
        raise KeyboardInterrupt
    return code


def _read(pipe: IO[bytes], output: Output) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while block := os.read(pipe.fileno(), 1 << 16):
        output.feed(decoder.decode(block))


def _stop(process: subprocess.Popen, interrupts: Interrupts) -> None:
    """Ends a command and what is left of its group: asks first, kills after 10 s or at a second Ctrl-C."""
    for request in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, request)
        asked = time.monotonic()
        while process.poll() is None and time.monotonic() - asked < STOP_SECONDS / 2 and interrupts.count < 2:
            time.sleep(0.02)
        if process.poll() is not None:
            break
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def bar(total: float | None, what: str, unit: str = "it", **more) -> tqdm:
    """A tqdm bar on stderr: live on a terminal, a line every 20 s in a log. `more` goes to tqdm.

    Under `run` it tells its progress more often, because it is shown there.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True, **more)
    seconds = float(os.environ.get("TQDM_MININTERVAL", LOG_SECONDS))
    return _LineBar(total=total, desc=what, unit=unit, mininterval=seconds, maxinterval=seconds, **more)


class _LineBar(tqdm):
    """Ends its states with a line end."""

    @staticmethod
    def status_printer(file):
        def write(state: str) -> None:
            if state.strip():
                file.write(state.strip() + "\n")
                file.flush()

        return write

    def close(self) -> None:
        if not self.disable and self.sp is not None:
            self.refresh()
            self.sp = None  # tells tqdm that nothing is to be cleared or ended
        super().close()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows `what` and the seconds around work that cannot tell its progress: live on a terminal, every 20 s in a log.

    Work that ends within two seconds (in a log: within 20) shows nothing.
    """
    terminal = sys.stderr.isatty()
    over, started = threading.Event(), time.monotonic()

    def show() -> None:
        pause = 2.0 if terminal else LOG_SECONDS
        while not over.wait(pause):
            text = f"{what} ... {time.monotonic() - started:.0f} s"
            sys.stderr.write(f"\r\x1b[K{text}" if terminal else text + "\n")
            sys.stderr.flush()
            pause = 1.0 if terminal else LOG_SECONDS
        if terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
