"""Several recipes in one group of processes: `torchrun … ranks.py recipes.json` trains each of them, in order.

LLaMA-Factory's own `run_exp` ends its process group after a training; starting the interpreters once for all recipes
saves most of a test's time.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT


def train(recipe: dict) -> None:
    """Trains a recipe in this process, as one of the group that torchrun started or alone."""
    from llamafactory.hparams import get_train_args

    from llava_orpo.integration.run import current
    from llava_orpo.training import workflow

    *arguments, _ = get_train_args(recipe)
    workflow.run_dpo(current(), *arguments)


def train_on_processes(
    folder: Path, recipes: list[dict], processes: int, timeout: int = 600, module: str = "helpers.ranks", **env: str
) -> str:
    """Trains every recipe on so many processes; returns what they printed. Raises AssertionError if one failed."""
    path = folder / f"recipes-{processes}.json"
    path.write_text(json.dumps(recipes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command += ["--master_addr=127.0.0.1", "--module", module, str(path)]  # as a file it would shadow modules
    paths = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-8000:]}"
    return done.stdout + done.stderr


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        train(one)
    import torch

    if torch.distributed.is_initialized():  # its threads may abort a process that just ends
        torch.distributed.destroy_process_group()
