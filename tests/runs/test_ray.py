"""Two workers of Ray train what one process does, and the driver ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from helpers.ranks import train
from helpers.recipes import CACHE
from helpers.same_training import ONE, TWO, assert_same, made, rows_of

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def ray_folder():
    """Ray in a folder of its own, so that the main environment stays as it is."""
    folder = CACHE / "ray-2.52.1"
    if not (folder / "ray" / "__init__.py").is_file():
        install = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([sys.executable, "-m", *install, "-r", str(ROOT / "requirements/ray.txt")], check=True)
    return folder


def test_two_workers_train_what_one_process_does(tmp_path, ray_folder):
    case = rows_of(tmp_path)["ragged"]
    train(made(tmp_path, "one", {**case, **ONE}))
    ray_keys = {
        "ray_num_workers": 2,
        "ray_init_kwargs": {"num_cpus": 2, "include_dashboard": False, "_node_ip_address": "127.0.0.1"},
        "master_addr": "127.0.0.1",  # else LLaMA-Factory asks Ray's dashboard
    }
    recipe = made(tmp_path, "two", {**case, **TWO, **ray_keys})
    del recipe["use_cpu"]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    paths = os.pathsep.join(filter(None, [str(ray_folder), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "USE_RAY": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.ray_driver", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    assert_same(tmp_path / "one", tmp_path / "two")
