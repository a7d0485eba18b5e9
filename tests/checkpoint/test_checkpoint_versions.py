"""A folder written here loads completely in another transformers version, and the other way round.

transformers 5.6.0 is installed once, without its dependencies, into outputs/test-cache/ and put in front of
the environment's own in a child process.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers

from helpers.checkpoints import logits, write_base
from helpers.llava import tiny_llava
from helpers.paths import ROOT
from llava_orpo.checkpoint.published import CheckpointError, load_checked, save_published

OTHER = "5.6.0"
CHILD = """
import sys, torch, transformers
from helpers.checkpoints import logits
from llava_orpo.checkpoint.published import load_checked, save_published
ours, theirs, own, answer = sys.argv[1:]
model = load_checked(ours)
torch.save(logits(model), answer)
save_published(model, theirs, ours)
type(model)(model.config).save_pretrained(own)
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def other_transformers():
    """Folder to put on PYTHONPATH so that transformers is version OTHER."""
    folder = ROOT / "outputs" / "test-cache" / f"transformers-{OTHER}"
    if not (folder / f"transformers-{OTHER}.dist-info" / "RECORD").is_file():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*install, f"transformers=={OTHER}"], check=True)
    return folder


@pytest.mark.slow
def test_between_transformers_versions(tmp_path, other_transformers):
    assert transformers.__version__ != OTHER
    model = tiny_llava(seed=4)
    ours = save_published(model, tmp_path / "ours", write_base(tmp_path / "base", model), max_shard_gb=0.0004)
    theirs, own, answer = tmp_path / "theirs", tmp_path / "own", tmp_path / "logits.pt"

    path = os.pathsep.join(map(str, (other_transformers, ROOT / "plugins", ROOT / "tests")))
    child = [sys.executable, "-c", CHILD, str(ours), str(theirs), str(own), str(answer)]
    run = subprocess.run(child, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == OTHER

    want = logits(model)
    torch.testing.assert_close(torch.load(answer, weights_only=True), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(load_checked(theirs)), want)
    with pytest.raises(CheckpointError, match="did not load completely"):  # what OTHER writes by itself
        load_checked(own)
