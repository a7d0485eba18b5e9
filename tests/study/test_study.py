"""Studies: what a file may say, what is run and what not, and the table; `llamafactory-cli` is a small program here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import study as command
from helpers import recipes
from helpers.commands import exit_code
from helpers.paths import ROOT
from llava_orpo import recipe
from llava_orpo.errors import UsageError, UserError
from llava_orpo.study import chart, results, running, search, spec

ACCURACY = "preference_eval.json:history.-1.metrics.preference_accuracy"
# Says what it was asked for in calls.jsonl, then does as behaviour.json says of its setting and seed.
PROGRAM = """\
#!{python} -S
import json, os, sys, time
words = sys.argv[1:]
keys = dict(word.split("=", 1) for word in words[2:])
out = keys["output_dir"]
found = sorted(os.listdir(out)) if os.path.isdir(out) else None
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([words, found, os.environ.get("OMP_NUM_THREADS")]) + "\\n")
behaviour = json.load(open("behaviour.json")) if os.path.exists("behaviour.json") else {{}}
name = os.path.basename(out)
os.makedirs(out, exist_ok=True)
if name in behaviour.get("meet", ()):
    open(name + ".here", "w").close()
    end = time.time() + 20
    while not all(os.path.exists(other + ".here") for other in behaviour["meet"]):
        if time.time() > end:
            sys.exit("nobody came")
        time.sleep(0.01)
if behaviour.get("hang") == name:
    os.makedirs(out + "/checkpoint-1", exist_ok=True)
    open("hangs", "w").write(str(os.getpid()))
    time.sleep(60)
if name in behaviour.get("fail", ()):
    print("Traceback\\nerror: no such thing")
    sys.exit(3)
accuracy = 0.5 + float(keys.get("pref_beta", 0.1)) / 10 + int(keys["seed"]) / 100
content = {{"history": [{{"metrics": {{"preference_accuracy": one}}}} for one in (0.1, accuracy)]}}
if name not in behaviour.get("silent", ()):
    json.dump(content, open(out + "/preference_eval.json", "w"))
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty working folder with a recipe, and `llamafactory-cli` replaced by PROGRAM."""
    program = tmp_path / "fake-cli"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    programs = {"llamafactory-cli": str(program), "python": sys.executable}
    monkeypatch.setattr(running, "own_programs", lambda: programs)
    return tmp_path


def write_recipe(folder: Path, comment: str = "", **more) -> None:
    keys = {
        "plugins": "llava_orpo",
        "model_name_or_path": "someone/some-llava",
        "stage": "dpo",
        "do_train": True,
        "dataset_dir": str(ROOT / "data_registry"),
        "dataset": "rlaif_v",
        "template": "llava_v16_mistral",
        "output_dir": "outputs/x",
        "use_cpu": True,
        **more,
    }
    (folder / "recipe.yaml").write_text(comment + yaml.safe_dump(keys))


def write_study(**more: object) -> Path:
    content = {
        "recipe": "recipe.yaml",
        "grid": {"pref_beta": [0.1, 1.0]},
        "seeds": [0, 1],
        "metrics": {"accuracy": ACCURACY},
        **more,
    }
    Path("studies").mkdir(exist_ok=True)
    path = Path("studies/small.yaml")
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def run(*words: str, code: int = 0) -> None:
    assert exit_code(command.main, "studies/small.yaml", *words) == code


def calls() -> list[list]:
    path = Path("calls.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def made() -> dict[str, bytes]:
    folder = Path("studies/results/small")
    return {name: (folder / name).read_bytes() for name in ("table.json", "table.md", "plot.svg")}


def test_every_setting_is_trained_once_per_seed_and_gets_a_row(place, capsys):
    write_study()
    run()
    assert [words for words, _, _ in calls()] == [
        ["train", "recipe.yaml", f"pref_beta={beta}", f"seed={seed}"]
        + [f"output_dir=outputs/studies/small/pref_beta-{beta}-seed{seed}", "overwrite_output_dir=false"]
        for beta in (0.1, 1.0)
        for seed in (0, 1)
    ]
    printed = capsys.readouterr().out
    assert "4 runs (2 settings x 2 seeds), 0 finished; the time is known once one has finished" in printed
    assert "3 of 4 runs, about" in printed and "4 of 4 runs\n" in printed
    stored = json.loads(Path("studies/results/small/pref_beta-1.0-seed1.json").read_text())
    assert stored["metrics"] == {"accuracy": 0.61} and stored["values"] == {"pref_beta": 1.0} and stored["seed"] == 1
    assert stored["command"] == ["llamafactory-cli", *calls()[3][0]]
    rows = json.loads(made()["table.json"])["rows"]
    assert [row["metrics"]["accuracy"]["values"] for row in rows] == [{"0": 0.51, "1": 0.52}, {"0": 0.6, "1": 0.61}]
    assert "| 1.0 | 0.6050 [0.6000, 0.6100] | 2 |" in made()["table.md"].decode()


def test_finished_runs_are_not_repeated_while_recipe_and_command_are_the_same(place, capsys):
    write_study()
    run()
    before = made()
    write_recipe(place, comment="# said differently\n")
    run()
    assert len(calls()) == 4 and made() == before
    assert "4 finished; nothing is left to run" in capsys.readouterr().out
    run("seeds=[0,1,2]")
    assert [words[3] for words, _, _ in calls()[4:]] == ["seed=2", "seed=2"]
    write_recipe(place, learning_rate=1e-3)
    run()
    assert len(calls()) == 10 and calls()[-1][1] is None  # in a new folder, not over the old run


def test_the_table_is_made_of_the_stored_results_alone(place, capsys):
    write_study()
    run()
    before = made()
    shutil.rmtree("outputs")
    for name in before:
        Path("studies/results/small", name).unlink()
    capsys.readouterr()
    run("--table")
    assert made() == before and len(calls()) == 4
    Path("studies/results/small/pref_beta-0.1-seed0.json").unlink()
    run("table=true")
    assert "1 of 2" in capsys.readouterr().out
    write_recipe(place, learning_rate=1e-3)  # results of another recipe are no rows of this one
    run("--table", code=1)
    assert "holds no result of this study" in capsys.readouterr().err


def test_a_failure_is_listed_and_tried_again_by_the_next_command(place, capsys):
    write_study()
    Path("behaviour.json").write_text(json.dumps({"fail": ["pref_beta-0.1-seed1"], "silent": ["pref_beta-1.0-seed0"]}))
    run(code=1)
    printed = capsys.readouterr().out
    assert "4 of 4 runs, 2 failed" in printed
    assert (
        "- pref_beta-0.1: exit code 3: error: no such thing (outputs/studies/small/pref_beta-0.1-seed1.log)" in printed
    )
    assert "- pref_beta-1.0: metrics.accuracy: there is no outputs/studies/small/pref_beta-1.0-seed0/pref" in printed
    assert "| 0.1 | 0.5100 | 1 of 2 |" in made()["table.md"].decode()
    Path("behaviour.json").unlink()
    run(code=1)
    assert [words[4].rpartition("/")[2] for words, _, _ in calls()[4:]] == ["pref_beta-0.1-seed1"]
    assert "pref_beta-0.1: exit" not in made()["table.md"].decode()


def test_a_metric_named_anew_is_read_from_the_folders_that_are_there(place, capsys):
    write_study(metrics={"accuracy": "preference_eval.json:history.accuracy"})
    run(code=1)
    write_study()
    run()
    write_study(metrics={"accuracy": "preference_eval.json:history.0.metrics.preference_accuracy"})
    capsys.readouterr()
    run()
    assert "4 of 4 runs\n" in capsys.readouterr().out
    assert len(calls()) == 4 and "| 1.0 | 0.1000 [0.1000, 0.1000] | 2 |" in made()["table.md"].decode()
    shutil.rmtree("outputs")
    write_study()
    run()  # what a fresh clone has: no number under another meaning, and no training either
    assert len(calls()) == 4 and "| 1.0 |  | 2 |" in made()["table.md"].decode()


def test_commands_after_a_training_are_tried_again_without_it(place):
    tool = place / "tool.py"
    tool.write_text("import json, sys; json.dump({'loss': [3, 4]}, open(sys.argv[1] + '/' + sys.argv[2], 'w'))\n")
    after = ["python tool.py {output_dir} more{seed}.json", "python absent.py {recipe} {overrides} x={run}"]
    write_study(seeds=[7], grid={"pref_beta": [0.1]}, after=after, metrics={"last": "more7.json:loss.1"})
    run(code=1)
    assert "can't open file" in made()["table.md"].decode()
    Path("absent.py").write_text("import sys; open('words', 'w').write(' '.join(sys.argv[1:]))\n")
    run()
    assert len(calls()) == 1 and "4.0000" in made()["table.md"].decode()
    folder = "outputs/studies/small/pref_beta-0.1-seed7"
    keys = f"pref_beta=0.1 seed=7 output_dir={folder} overwrite_output_dir=false"
    assert Path("words").read_text() == f"recipe.yaml {keys} x=pref_beta-0.1-seed7"


def test_an_interrupted_run_goes_on_from_its_checkpoint(place):
    write_study()
    Path("behaviour.json").write_text(json.dumps({"hang": "pref_beta-0.1-seed1"}))
    code = (
        "import study, sys; from llava_orpo.study import running; from llava_orpo import recipe\n"
        f"running.own_programs = lambda: {running.own_programs()!r}\nrecipe.run(study.main)"
    )
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "plugins")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, "studies/small.yaml"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 30
    while not (Path("hangs").exists() and Path("hangs").read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    second = subprocess.run([sys.executable, "-c", code, "studies/small.yaml"], env={**os.environ, "PYTHONPATH": path})
    assert second.returncode == 1  # two of them would write into one folder
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Stopped at 1 of 4 runs" in errors, errors
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("hangs").read_text()), 0)
    Path("behaviour.json").unlink()
    run()
    assert [(words[3], found) for words, found, _ in calls()[2:]] == [
        ("seed=1", ["checkpoint-1"]),
        ("seed=0", None),
        ("seed=1", None),
    ]


def test_a_run_without_a_checkpoint_starts_again_in_an_empty_folder(place):
    write_study(grid={"pref_beta": [0.1]}, seeds=[0])
    Path("behaviour.json").write_text(json.dumps({"fail": ["pref_beta-0.1-seed0"]}))
    run(code=1)
    Path("outputs/studies/small/pref_beta-0.1-seed0/adapter_model.safetensors").touch()  # refused by LLaMA-Factory
    Path("behaviour.json").unlink()
    run()
    assert calls()[1][1] is None


def test_a_folder_that_the_study_did_not_make_is_left_alone(place, capsys):
    write_study()
    precious = Path("outputs/studies/small/pref_beta-0.1-seed0/precious")
    precious.parent.mkdir(parents=True)
    precious.touch()
    run(code=1)
    assert precious.exists() and "was not made by this study" in capsys.readouterr().err


def test_two_jobs_run_at_once(place):
    write_study(seeds=[0])
    Path("behaviour.json").write_text(json.dumps({"meet": ["pref_beta-0.1-seed0", "pref_beta-1.0-seed0"]}))
    run("jobs=2")
    assert [threads for _, _, threads in calls()] == ["1", "1"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"sedes": [1]}, "Unknown key `sedes` (did you mean `seeds`?)."),
        ({"recipe": None}, "recipe is missing."),
        ({"recipe": "recipes.yaml"}, "recipe: There is no recipe recipes.yaml; did you mean recipe.yaml?"),
        ({"metrics": None}, "metrics is missing."),
        ({"grid": {"pref_bta": [1]}}, "grid.pref_bta: Unknown key `pref_bta` (did you mean `pref_beta`?)."),
        ({"grid": {"lora_rank": [8, "x"]}}, "grid.lora_rank: lora_rank: 'x' is not allowed; it must be a whole number"),
        ({"grid": {"lora_rank": []}}, "grid.lora_rank: [] must be a list of at least one value."),
        ({"grid": {"lora_rank": [8, 8]}}, "grid.lora_rank: 8 is there twice."),
        ({"grid": {"seed": [1]}}, "grid.seed: the runner sets `seed`; name the seeds under `seeds`."),
        ({"base": {"output_dir": "x"}}, "base.output_dir: the runner sets `output_dir`"),
        ({"base": {"hf_hub_token": "abc"}}, "base.hf_hub_token: a secret would be written into every result"),
        ({"seeds": [0, 0]}, "seeds: [0, 0] names one twice."),
        ({"seeds": []}, "seeds: [] must be a list of whole numbers"),
        ({"variants": {"a b": {}}}, "variants.a b: a name becomes a folder"),
        ({"variants": {"a": {}, "b": {}}}, "a-pref_beta-0.1 and b-pref_beta-0.1 are the same run."),
        ({"variants": {"a": {"pref_beta": 2.0}}}, "grid.pref_beta and variants.a both set it."),
        ({"variants": {"a": 3}}, "variants.a: 3 must be a mapping"),
        ({"after": ["python x.py {outputdir}"]}, "after: {outputdir} in `python x.py {outputdir}` is none of"),
        ({"after": ["python 'x.py"]}, "after: `python 'x.py` cannot be read"),
        ({"metrics": {"accuracy": "no_path.json"}}, "metrics.accuracy: 'no_path.json' must be `file.json:key.key`."),
        ({"base": {"dataset": "rlaif_w"}}, "pref_beta-0.1: dataset: rlaif_w is not registered"),
        ({"search": {"lora_rank": {"low": 1, "high": 9}}}, "grid and search exclude each other."),
        ({"search": {"lora_rank": {"low": 9, "high": 1}}, "grid": {}}, "low must be less than high."),
        (
            {"search": {"pref_beta": {"low": 0, "high": 1, "log": True}}, "grid": {}},
            "with log, low must be more than 0",
        ),
        ({"search": {"lora_rank": {"low": 1, "high": 9}}, "grid": {}}, "metric: null must be one of the metrics"),
        ({"search": {"lora_rnk": {"choices": [1]}}, "grid": {}, "metric": "accuracy"}, "Unknown key `lora_rnk`"),
        ({"seconds_per_run": 0}, "seconds_per_run: 0 must be a number of seconds."),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(place, capsys, more, sentence):
    write_study(**more)
    run(code=2)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: studies/small.yaml: ") for line in lines)
    assert any(sentence in line for line in lines), lines
    assert not calls()


def test_a_name_twice_is_refused_with_its_line(place, capsys):
    write_study()
    with open("studies/small.yaml", "a") as file:
        file.write("variants:\n  a: {lora_rank: 8}\n  a: {lora_rank: 16}\n")
    run(code=2)
    assert "found duplicate key a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "path", "sentence"),
    [
        ('{"a": [1]}', "a.b", "has no a.b (stopped at `b`)"),
        ('{"a": [1]}', "a.3", "stopped at `3`"),
        ('{"a": "x"}', "a", "a of"),
        ('{"a": NaN}', "a", "not a number"),
        ("{", "a", "is not JSON"),
    ],
)
def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path, content, path, sentence):
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(UserError, match="metrics.m: ") as error:
        results.read_metrics([spec.Metric("m", "m.json", path)], tmp_path)
    assert sentence in str(error.value)


def test_the_interval_is_students():
    # t(0.975, 2) = 4.302653 (any table of the t distribution); 0.5, 0.6, 0.7 have the standard deviation 0.1
    found = results.summary([0.5, 0.7, 0.6])
    half = 4.302653 * 0.1 / 3**0.5
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([0.6, 0.6 - half, 0.6 + half], abs=1e-7)
    assert results.summary([0.5, 0.9]) == {"mean": 0.7, "low": 0.5, "high": 0.9}


@pytest.mark.parametrize("value", [1, 1e-5, True, None, "no", "1e-3", "a,b", "a: b", "", {"a": ["b c"]}, "a}b"])
def test_a_value_on_a_command_line_is_the_value(value):
    assert recipe._read_overrides([f"k={spec.as_word(value)}"]) == {"k": value}


def test_the_plot_has_an_axis_where_a_line_means_something():
    rows = [{"name": "", "values": {"variant": v, "n": n}} for v in ("a", "b") for n in (1, 2, None)]
    assert chart.x_axis(rows) == "n"
    assert chart.x_axis([{"name": "", "values": {"variant": v}} for v in "ab"]) is None
    searched = [{"name": "", "values": {"n": n, "rate": n / 3}} for n in range(3)]
    assert chart.x_axis(searched) is None


def test_a_search_without_optuna_is_refused_in_one_line(place, monkeypatch, capsys):
    write_study(grid={}, search={"pref_beta": {"low": 0.1, "high": 1.0}}, metric="accuracy", trials=3)
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    run(code=1)
    assert capsys.readouterr().err == f"error: {search.INSTALL}\n" and not calls()


def test_a_search_goes_on_where_it_stopped(place, capsys):
    pytest.importorskip("optuna")
    space = {"pref_beta": {"low": 0.1, "high": 1.0, "log": True}, "lora_rank": {"choices": [8, 16]}}
    write_study(grid={}, search=space, metric="accuracy", trials=6)
    run("trials=3")
    first = calls()
    run()
    assert "12 of 12 runs\n" in capsys.readouterr().out
    assert len(first) == 6 and len(calls()) == 12 and calls()[:6] == first
    table = json.loads(made()["table.json"])
    means = {row["name"]: row["metrics"]["accuracy"]["mean"] for row in table["rows"]}
    assert len(means) == 6 and table["best"]["name"] == max(means, key=means.get)
    before = made()
    shutil.rmtree("studies/results")
    shutil.rmtree("outputs")
    run()
    assert [row["values"] for row in json.loads(made()["table.json"])["rows"]] == [r["values"] for r in table["rows"]]
    assert set(before) == set(made())


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_are_here_are_good(path, monkeypatch):
    content = yaml.safe_load(path.read_text())
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(spec, "_recipe_problems", lambda study: [])  # models and data need not have been made
    found = spec.read(path.relative_to(ROOT), content)
    assert found.runs() or found.search
    stored = [results.stored(found, one) for one in found.runs() if results.result_file(found, one).exists()]
    assert all(stored), "a result is of another recipe or command: run the study again"


@pytest.mark.heavy
def test_a_study_through_the_real_program(tmp_path, monkeypatch):
    """One run on a random model by llamafactory-cli itself; the short version is everything above."""
    monkeypatch.chdir(tmp_path)
    recipes.write_rows(tmp_path, recipes.photo_rows(8, 1))
    recipes.write_recipe(tmp_path, {"max_steps": 2, "eval_dataset": "rows", "finetuning_type": "lora"})
    write_study(grid={"learning_rate": [1e-4]}, seeds=[0])
    run()
    assert json.loads(made()["table.json"])["rows"][0]["metrics"]["accuracy"]["mean"] <= 1
    with pytest.raises(UsageError):
        spec.read(Path("studies/small.yaml"), {"recipe": "recipe.yaml", "metrics": {"a": ACCURACY}, "grid": {"x": [1]}})
