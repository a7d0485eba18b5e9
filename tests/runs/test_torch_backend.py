"""Which of torch's wheels setup.sh takes, by the driver that nvidia-smi tells of."""

from __future__ import annotations

import os
import subprocess

import pytest

from helpers.paths import ROOT

SHOW = 'source scripts/torch_backend.sh; choose_torch_backend || exit 1; echo "[${UV_TORCH_BACKEND:-}]"'


def chosen(folder, driver: str | None, **environment: str) -> subprocess.CompletedProcess:
    """What is chosen with an nvidia-smi that prints `driver`; None: there is no such command."""
    if driver is not None:
        tool = folder / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\nprintf '{driver}'\n")
        tool.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "UV_TORCH_BACKEND"}
    path = f"{folder}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", SHOW],
        cwd=ROOT,
        env={**variables, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "driver, backend",
    [
        (None, ""),
        ("", ""),
        ("No devices were found\\n", ""),
        ("580.159.04\\n", ""),
        ("590.1\\n590.1\\n", ""),
        ("575.57.08\\n", "cu128"),
        ("570.86.10\\n570.86.10\\n", "cu128"),
        ("565.57.01\\n", "cu126"),
        ("525.60.13\\n", "cu126"),
    ],
)
def test_the_drivers_wheels_are_chosen(tmp_path, driver, backend):
    found = chosen(tmp_path, driver)
    assert found.stdout.splitlines()[-1] == f"[{backend}]" and found.stderr == ""
    assert len(found.stdout.splitlines()) == (2 if backend else 1)


def test_a_driver_that_is_too_old_is_refused_in_one_line(tmp_path):
    found = chosen(tmp_path, "470.57.02\\n")
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.count("\n") == 1 and "driver 470.57.02 is too old" in found.stderr


def test_what_the_user_chose_stays(tmp_path):
    assert chosen(tmp_path, "470.57.02\\n", UV_TORCH_BACKEND="cpu").stdout == "[cpu]\n"
