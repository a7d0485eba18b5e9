"""The README's first command, whole: eight minutes when nothing is there yet, a second when everything is."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml

from helpers.paths import ROOT


@pytest.mark.heavy
@pytest.mark.xdist_group("quickstart")
def test_quickstart_reaches_its_targets_and_reuses_what_is_done():
    for _ in range(2):
        done = subprocess.run(["bash", "scripts/quickstart.sh"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("done before") == done.stdout.count("$ ") == 7
    summary = json.loads((ROOT / "outputs/quickstart/summary.json").read_text())
    assert summary["n_pairs"] >= 300
    assert summary["accuracy_after"] >= max(0.9, summary["accuracy_before"] + 0.15)
    assert summary["accuracy_after_grey_image"] <= 0.6
    assert (ROOT / summary["merged_dir"] / "model.safetensors").exists()
    assert (ROOT / summary["adapter_dir"] / "adapter_model.safetensors").exists()
    assert (ROOT / "outputs/quickstart/report.html").stat().st_size > 100_000


@pytest.mark.parametrize("name", ["orpo_qlora", "merge", "chat"])
def test_tiny_recipes_have_the_keys_of_the_real_ones(name):
    real, tiny = (yaml.safe_load((ROOT / f"recipes/{folder}llava16_{name}.yaml").read_text()) for folder in ("", "tiny/"))
    assert set(real) == set(tiny)
