"""The process of `llamafactory-cli train` while torchrun runs below it: signals are handed on, failures get one line.

LLaMA-Factory 0.9.5 waits for torchrun without either: a SIGTERM ended the waiting process alone, and Ctrl-C killed
torchrun before its processes could save.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading

from .errors import debugging, end_by_signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_stopped_by: list[int] = []


def prepare() -> None:
    """Makes this process hand SIGTERM and Ctrl-C on to the training processes. A training itself replaces this.

    Also lets torchrun's restarts (RDZV_ID, MAX_RESTARTS) connect: with the store that torch 2.11 shares between
    torchrun and its processes, those of a second attempt find the keys of the first one (pytorch issue 135712).
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _hand_on)
    atexit.register(_give_code)  # the first to be registered runs last
    previous = sys.excepthook

    def excepthook(kind, error, traceback) -> None:
        if not is_torchrun_failure(error) or debugging():
            previous(kind, error, traceback)
        elif not _stopped_by:
            print(
                "error: A training process ended; the reason is above. If it was lost with its machine or killed, the "
                "same command goes on from the last whole checkpoint in output_dir.",
                file=sys.stderr,
            )

    sys.excepthook = excepthook


def is_torchrun_failure(error: BaseException) -> bool:
    """Whether LLaMA-Factory raised `error` because torchrun ended with a code other than 0."""
    command = error.cmd if isinstance(error, subprocess.CalledProcessError) else ()
    return isinstance(command, (list, tuple)) and bool(command) and os.path.basename(command[0]) == "torchrun"


def _hand_on(number: int, frame) -> None:
    import psutil

    children = psutil.Process().children()
    torchruns = [child for child in children if any("torchrun" in word for word in child.cmdline()[:3])]
    if not torchruns:
        end_by_signal(number, f"Stopped by {_name(number)} before the training began. The same command starts again.")
    _stopped_by.append(number)
    for torchrun in torchruns:
        processes = torchrun.children()
        for process in processes or [torchrun]:
            process.send_signal(number)
        if processes and os.environ.get("MAX_RESTARTS", "0") != "0":
            threading.Thread(target=_end_after, args=(processes, torchrun), daemon=True).start()


def _end_after(processes: list, torchrun) -> None:
    """Ends torchrun once its processes have saved; it would start them again."""
    import psutil

    psutil.wait_procs(processes)
    with contextlib.suppress(psutil.NoSuchProcess):
        torchrun.terminate()


def _give_code() -> None:
    if _stopped_by:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + _stopped_by[0])


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
