"""A folder written here loads completely in another transformers version, and the other way round.

transformers 5.6.0 is installed once, without its dependencies, into outputs/test-cache/ and put in front of
the environment's own in a child process. The newest gets an environment of its own there (heavy).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from helpers.checkpoints import logits, write_base
from helpers.llava import tiny_llava
from helpers.paths import ROOT
from helpers.recipes import random_model, run_cli
from helpers.serving import picture, random_adapter
from llava_orpo.checkpoint.published import CheckpointError, load_checked, save_published

OTHER = "5.6.0"
NEWEST = "5.24.0"
NEWEST_WITH = ("torch==2.11.0", "torchvision==0.26.0", "accelerate==1.11.0", "pillow==11.3.0")  # as in requirements.txt
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


# What any user of plain transformers does with the folder, without this package.
PLAIN = """
import json, sys, torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image, answer = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}])
inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
facts = {"version": transformers.__version__, "dtype": str(model.dtype)}
facts["not loaded"] = {key: sorted(map(str, names)) for key, names in info.items() if names and key.endswith("_keys")}
torch.save({"facts": json.dumps(facts), **inputs, "logits": logits, "generated": generated}, answer)
"""


def ask_plainly(python: str | Path, folder: Path, image: Path, answer: Path) -> dict:
    run = subprocess.run(
        [python, "-c", PLAIN, folder, image, answer], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found = torch.load(answer, weights_only=True)
    return {**found, "facts": json.loads(found["facts"])}


@pytest.fixture(scope="module")
def newest_python():
    """The interpreter of an environment with transformers NEWEST, made at the first use."""
    folder = ROOT / "outputs" / "test-cache" / f"venv-transformers-{NEWEST}"
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--clear", "-q", "--python", sys.executable, folder], check=True)
        packages = [f"transformers=={NEWEST}", *NEWEST_WITH]
        subprocess.run([*uv, "pip", "install", "-q", "--python", python, *packages], check=True)
        (folder / "made").touch()
    return python


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_folder_in_the_newest_transformers(tmp_path, newest_python, dtype):
    """Prompt ids, pixels and greedy answer are those of this environment; logits within the kernels' rounding."""
    adapter = random_adapter(random_model(), tmp_path / "adapter")
    keys = [f"model_name_or_path={random_model()}", f"adapter_name_or_path={adapter}", f"infer_dtype={dtype}"]
    run_cli("export", "recipes/tiny/llava16_merge.yaml", *keys, f"export_dir={tmp_path / 'merged'}")
    picture(300, 200).save(tmp_path / "image.png")
    ours, theirs = (
        ask_plainly(python, tmp_path / "merged", tmp_path / "image.png", tmp_path / f"{number}.pt")
        for number, python in enumerate((sys.executable, newest_python))
    )
    for found, version in ((ours, transformers.__version__), (theirs, NEWEST)):
        assert found["facts"] == {"version": version, "dtype": f"torch.{dtype}", "not loaded": {}}
    for name in ("input_ids", "image_sizes", "generated"):
        assert torch.equal(theirs[name], ours[name]), name
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"], rtol=0, atol=1e-6)
    close = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(theirs["logits"], ours["logits"], rtol=close, atol=close)
