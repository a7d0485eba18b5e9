"""The README's first command, whole: eight minutes when nothing is there yet, a second when everything is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

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


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The command's module, writing into a folder of its own."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUT", tmp_path)
    monkeypatch.chdir(ROOT)
    return module


def python(words: str) -> str:
    return f'{sys.executable} -c "{words}"'


def test_a_failing_step_shows_the_end_of_its_output(quickstart, monkeypatch, capsys, tmp_path):
    command = python("[print('line', i) for i in range(100)]; raise SystemExit(3)")
    monkeypatch.setattr(quickstart, "run_steps", lambda steps: steps.run("train", command, str(tmp_path / "nothing")))
    assert quickstart.main([]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("\n[ORPO + QLoRA, and preference accuracy after]\n$ ")
    assert err.splitlines() == [
        *(f"line {i}" for i in range(60, 100)),
        "",
        f"The step failed (exit code 3); its whole output is in {tmp_path / 'train.log'}.",
    ]
    assert len((tmp_path / "train.log").read_text().splitlines()) == 101  # the command stands first
    assert not (tmp_path / "train.done").exists()


def test_a_stopped_step_is_not_done_and_says_how_to_go_on(quickstart, monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "made").touch()
    (tmp_path / "train.done").write_text('{"mark": "of other inputs", "seconds": 3}')
    monkeypatch.setattr(quickstart, "run", interrupted)
    monkeypatch.setattr(quickstart, "run_steps", lambda steps: steps.run("train", python("1"), str(tmp_path / "made")))
    assert quickstart.main([]) == 130
    assert capsys.readouterr().err == "\nStopped. To resume at the unfinished step: bash scripts/quickstart.sh\n"
    assert not (tmp_path / "train.done").exists()


def test_a_step_is_run_once(quickstart, monkeypatch, capsys, tmp_path):
    result = tmp_path / "made"
    command = python(f"open('{result}', 'a').write('x')")
    monkeypatch.setattr(quickstart, "run_steps", lambda steps: steps.run("train", command, str(result)))
    monkeypatch.setattr(quickstart, "print_summary", lambda seconds: print("all done"))
    assert [quickstart.main([]), quickstart.main([]), result.read_text()] == [0, 0, "x"]
    out = capsys.readouterr().out
    assert (out.count("done before"), out.count("all done")) == (1, 2)


@pytest.mark.parametrize("name", ["orpo_qlora", "merge", "chat"])
def test_tiny_recipes_have_the_keys_of_the_real_ones(name):
    files = (ROOT / f"recipes/{folder}llava16_{name}.yaml" for folder in ("", "tiny/"))
    real, tiny = (yaml.safe_load(file.read_text()) for file in files)
    assert set(real) == set(tiny)
