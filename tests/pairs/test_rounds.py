"""scripts/rounds.py: which commands the rounds are, what is reused, and rounds on a random model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import make_pairs
import pytest
import rounds as command

import preference
from helpers.commands import exit_code, run_script
from helpers.paths import ROOT
from helpers.recipes import photo_rows, random_model, run_cli, write_recipe, write_rows
from helpers.serving import random_adapter
from llava_orpo.evaluation import generation
from llava_orpo.pairs import rounds, sampling
from llava_orpo.step_list import LogSteps


def planned(recipe: dict) -> list[dict[str, str]]:
    """The words key=value of every command, without the recipe's own."""
    found = rounds.steps(Path("r.yaml"), recipe, ["bf16=false"], Path("o"), Path("/repo"))
    for step in found:
        assert {"r.yaml", "bf16=false"} < set(step.command)
    return [dict(word.split("=", 1) for word in step.command if "=" in word) for step in found]


def test_previous_trains_on_and_compares_with_the_adapter_before():
    start, *rest = planned({"rounds": 3, "adapter_name_or_path": "a", "seed": 5, "make_pairs": {"answers": 4}})
    assert start["adapter_name_or_path"] == "a" and start["output_dir"] == "o/start/eval"
    pairs, train, evaluated = rest[0::3], rest[1::3], rest[2::3]
    models = [f"o/round_{r}/model" for r in (1, 2, 3)]
    assert [words["adapter_name_or_path"] for words in pairs] == ["a", *models[:2]]
    assert [words.get("reference", "base") for words in pairs] == ["base", "a", models[0]]
    assert [words["adapter_name_or_path"] for words in train] == ["a", *models[:2]]
    assert [words["output_dir"] for words in train] == models
    assert [words["adapter_name_or_path"] for words in evaluated] == models
    assert [words["dataset_dir"] for words in train] == [words["out"] for words in pairs]
    assert (
        [words["dataset"] for words in train] == [words["name"] for words in pairs] == ["round_1", "round_2", "round_3"]
    )
    assert {words["answers"] for words in pairs} == {"4"} and [words["seed"] for words in pairs] == ["6", "7", "8"]


def test_base_trains_anew_and_compares_with_the_base_model():
    recipe = {"rounds": 2, "round_reference": "base", "make_pairs": {"scoring": "objects"}}
    start, *rest = planned(recipe)
    assert start["adapter_name_or_path"] == "null"
    assert [words["adapter_name_or_path"] for words in rest[0::3]] == ["null", "o/round_1/model"]
    assert [words["adapter_name_or_path"] for words in rest[1::3]] == ["null", "null"]
    assert not any("reference" in words for words in rest)


def step(folder: Path, code: str, name: str = "one") -> rounds.Step:
    """A step that runs python code in which `here` is its folder."""
    text = f"from pathlib import Path\nhere = Path({str(folder / name)!r})\n{code}"
    return rounds.Step(name, (sys.executable, "-c", text), folder / name, "result")


class Quiet(LogSteps):
    def __init__(self, planned):
        super().__init__([step.title for step in planned], file=io.StringIO())


def run_all(planned, recipe):
    return rounds.run_all(planned, recipe, Quiet(planned))


COUNT = "(here / 'result').write_text((here / 'result').read_text() + 'x' if (here / 'result').exists() else 'x')"


def test_finished_steps_are_reused_until_something_before_them_changes(tmp_path):
    first, second = step(tmp_path, COUNT), step(tmp_path, COUNT, "two")
    for _ in range(2):
        run_all([first, second], {"a": 1, "rounds": 1})
    run_all([first, second], {"a": 1, "rounds": 2})  # more rounds: the first ones stay
    assert (tmp_path / "one/result").read_text() == (tmp_path / "two/result").read_text() == "x"
    (tmp_path / "one/old").touch()
    other = step(tmp_path, COUNT + "  # other")
    run_all([other, second], {"a": 1})
    assert (tmp_path / "two/result").read_text() == "x"  # anew, in an empty folder
    assert not (tmp_path / "one/old").exists()


def test_a_failed_step_shows_its_error_keeps_its_folder_and_is_run_again(tmp_path):
    failing = (
        "import sys\n(here / 'part').touch()\nif not (here / 'mended').exists():\n    sys.exit('error: no room')\n"
        + COUNT
    )
    with pytest.raises(rounds.UserError) as failed:
        run_all([step(tmp_path, failing)], {})
    assert failed.value.args[0].startswith("one: the command ended with code 1; its output is in ")
    assert failed.value.args[1] == "no room"
    (tmp_path / "one/mended").touch()
    run_all([step(tmp_path, failing)], {})
    assert (tmp_path / "one/part").exists() and (tmp_path / "one/result").read_text() == "x"


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"make_pairs": {"answer": 4}}, "did you mean `answers`?"),
        ({"make_pairs": {"answers": "many"}}, "answers"),
        ({"make_pairs": {"scoring": "judge"}}, "needs judge_url="),
        ({"make_pairs": {"out": "x"}}, "set by scripts/rounds.py itself"),
        ({"make_pairs": {"base_url": "http://127.0.0.1:1/v1"}}, "leave it out"),
        ({}, "name the adapter"),
        ({"round_reference": "first"}, "round_reference"),
        ({"rounds": 0}, "rounds"),
        ({"eval_dataset": None, "make_pairs": {"scoring": "objects"}}, "eval_dataset is missing"),
    ],
)
def test_contradictions_are_refused_before_anything_runs(tmp_path, capsys, keys, said):
    write_rows(tmp_path, photo_rows(1, 1))
    file = write_recipe(tmp_path, {"eval_dataset": "rows", **keys})
    assert exit_code(command.main, file, f"out={tmp_path / 'out'}") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def in_this_process(words, log, show, trainer_log=None):
    """Runs a step's command without a new interpreter."""
    log.write_text("")
    if words[1] == "train":
        return run_cli(*words[1:]).returncode
    return exit_code({"make_pairs.py": make_pairs, "preference.py": preference}[Path(words[1]).name].main, *words[2:])


@pytest.mark.slow
def test_two_rounds_on_a_random_model(tmp_path, monkeypatch, capsys):
    write_rows(tmp_path, photo_rows(3, 2))
    keys = {
        "eval_dataset": "rows",
        "adapter_name_or_path": str(random_adapter(random_model(), tmp_path / "adapter")),
        "finetuning_type": "lora",
        "group_pairs_by_image": True,
        "save_steps": 100,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "make_pairs": {"answers": 4, "max_new_tokens": 8, "temperature": 1.0, "length_ratio": 8.0},
    }
    file = write_recipe(tmp_path, keys)
    monkeypatch.setattr(rounds, "run", in_this_process)
    for module in (generation, sampling):  # a random model seldom ends an answer
        monkeypatch.setattr(module, "end_tokens", lambda conversation, tokenizer: [2, *range(40, 32000, 4)])
    assert exit_code(command.main, file, f"out={tmp_path / 'out'}") == 0
    entries = json.loads((tmp_path / "out/rounds.json").read_text())["rounds"]
    assert [entry["round"] for entry in entries] == [0, 1, 2] and {entry["n"] for entry in entries} == {6}
    assert all(entry["made"]["pairs"] > 0 for entry in entries[1:])
    assert len({entry["logps/margin"] for entry in entries}) == 3  # every round changed the model
    assert capsys.readouterr().out.rstrip().splitlines()[-1].endswith("rounds.json")
    monkeypatch.setattr(rounds, "run", None)  # everything is there
    assert exit_code(command.main, file, f"out={tmp_path / 'out'}") == 0


@pytest.mark.heavy
@pytest.mark.xdist_group("quickstart")
def test_the_tiny_rounds():
    """The recipe as it is, after bash scripts/quickstart.sh."""
    said = run_script(sys.executable, "scripts/rounds.py", "recipes/tiny/llava16_rounds.yaml")
    entries = json.loads((ROOT / "outputs/rounds/llava16_rounds/rounds.json").read_text())["rounds"]
    assert len(entries) == 3 and all(entry["n"] == 400 for entry in entries) and "round" in said
    assert all(entry["made"]["pairs"] >= 100 for entry in entries[1:])
    assert entries[2]["preference_accuracy"] >= entries[0]["preference_accuracy"] - 0.05
