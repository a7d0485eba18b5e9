"""`llamafactory-cli` in processes forked from one that has imported everything: a third of a test's time is imports.

The command still gets a process, a command line, an environment and output of its own. What tests a start itself
(early refusals, torchrun, plain LLaMA-Factory) takes the real program.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT

IMPORTED = ("llamafactory.cli", "llamafactory.train.tuner", "llava_orpo.training.workflow", "transformers.trainer")


def run(words: list[str], env: dict[str, str], output: Path, timeout: float) -> subprocess.CompletedProcess:
    """Runs `llamafactory-cli …`. output: a folder for stdout and stderr.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `timeout` seconds and was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    files = [output / "stdout", output / "stderr"]
    process = context.Process(target=_run, args=(words, env, *map(str, files)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise subprocess.TimeoutExpired(words, timeout)
    return subprocess.CompletedProcess(words, process.exitcode, *(file.read_text(errors="replace") for file in files))


def _run(words: list[str], env: dict[str, str], stdout: str, stderr: str) -> None:
    for number, name in ((1, stdout), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = words
    from llamafactory.cli import main
    from llamafactory.extras import logging
    from transformers.utils import logging as transformers_logging

    from llava_orpo import early

    code: object = 0
    try:
        for one in (logging, transformers_logging):  # of this environment
            one._get_library_root_logger().setLevel(one._get_default_logging_level())
        early.before_llamafactory(words[1:])  # as autoload does when a new program imports the package
        code = main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # multiprocessing would print in its own way
        code = 1
    atexit._run_exitfuncs()  # a forked process ends without them
    sys.exit(code)
