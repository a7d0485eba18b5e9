"""recipe.py: how a command reads `recipe.yaml key=value`, or another file with its own keys, and how it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_orpo import recipe
from llava_orpo.errors import UsageError

DOC = """Measures something.

    python measure.py recipe.yaml against=base

Own keys:

    against   what to compare with
"""
OWN = {"against": str, "restart": False, "max_prompts": int, "temperature": 0.0, "request": {}}
RECIPE = """
model_name_or_path: ./model
dataset_dir: data
eval_dataset: rows
dataset: nowhere           # not read by an evaluation
eval_strategy: no
output_dir: out
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for name, content in {
        "r.yaml": RECIPE,
        "model/config.json": "{}",
        "adapter/adapter_config.json": "{}",
        "data/dataset_info.json": '{"rows": {"hf_hub_url": "x/y"}}',
        "g.jsonl": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(line: str, **settings) -> recipe.Command:
    return recipe.read_command(DOC, line.split(), OWN, **settings)


def test_recipe_own_keys_and_what_was_given():
    command = read("r.yaml against=base cutoff_len=512 request.max_tokens=9")
    assert command.file == Path("r.yaml")
    assert command.own == {
        "against": "base",
        "restart": False,
        "max_prompts": None,
        "temperature": 0.0,
        "request": {"max_tokens": 9},
    }
    assert command.recipe == {
        "model_name_or_path": "./model",
        "dataset_dir": "data",
        "eval_dataset": "rows",
        "dataset": "nowhere",
        "eval_strategy": "no",
        "output_dir": "out",
        "cutoff_len": 512,
    }
    assert command.given("against") and command.given("cutoff_len") and command.given("request")
    assert not command.given("output_dir") and not command.given("restart")


@pytest.mark.parametrize(
    "line, own",
    [
        ("r.yaml against=7", ("against", "7")),
        ("r.yaml max_prompts=3.0", ("max_prompts", 3)),
        ("r.yaml restart=yes", ("restart", True)),
        ("r.yaml temperature=1", ("temperature", 1)),
        ("r.yaml against=null", ("against", None)),
    ],
)
def test_own_keys_have_the_type_of_their_default(line, own):
    assert read(line).own[own[0]] == own[1]


@pytest.mark.parametrize(
    "line, problems",
    [
        ("", ["The first word must be the recipe: recipe.yaml key=value … (-h shows the help)."]),
        ("against=base", ["The first word must be the recipe: recipe.yaml key=value … (-h shows the help)."]),
        ("nothing.yaml", ["There is no recipe nothing.yaml."]),
        ("data", ["data is a folder; name the recipe in it."]),
        ("r.yaml agianst=base", ["Unknown key `agianst` (did you mean `against`?)."]),
        ("r.yaml learning_rat=1", ["Unknown key `learning_rat` (did you mean `learning_rate`?)."]),
        ("r.yaml against", ["Overrides are written key=value; got against."]),
        (
            "r.yaml --against base",
            ["Overrides are written key=value; got --against.", "Overrides are written key=value; got base."],
        ),
        ("r.yaml restart=maybe", ["restart: 'maybe' is not allowed; it must be true or false."]),
        ("r.yaml max_prompts=2.5", ["max_prompts: 2.5 is not allowed; it must be a whole number, or null."]),
        ("r.yaml request=5", ["request: 5 is not allowed; it must be a mapping."]),
        (
            "r.yaml eval_dataset=row",
            ["eval_dataset: row is not registered in data/dataset_info.json; did you mean `rows`?"],
        ),
        ("r.yaml adapter_name_or_path=outputs/x", ["adapter_name_or_path: there is no folder outputs/x."]),
        (
            "r.yaml grounding_eval=flase seed=x",
            [
                "grounding_eval: 'flase' is not allowed; it must be true or false.",
                "seed: 'x' is not allowed; it must be a whole number.",
            ],
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line_each(line, problems):
    with pytest.raises(UsageError) as refused:
        read(line)
    assert list(refused.value.args) == problems


def test_paths():
    own_keys = {"out": Path("report.html"), "examples": Path}
    assert recipe.read_command(DOC, ["r.yaml"], own_keys).own == {"out": Path("report.html"), "examples": None}
    command = recipe.read_command(DOC, ["r.yaml", "examples=a.parquet", "out=7"], own_keys)
    assert command.own == {"out": Path("7"), "examples": Path("a.parquet")}


def test_only_the_files_a_command_reads_must_exist():
    read("r.yaml")
    with pytest.raises(UsageError, match="dataset: nowhere is not registered"):
        read("r.yaml", uses=("dataset",))
    assert read("r.yaml eval_dataset=row model_name_or_path=outputs/none", uses=()).recipe["eval_dataset"] == "row"


def test_required_keys():
    with pytest.raises(UsageError, match="^against= is missing"):
        read("r.yaml", required=("against",))
    assert read("r.yaml against=base", required=("against",)).own["against"] == "base"


def test_another_file_in_the_place_of_the_recipe():
    command = read("g.jsonl against=a restart=true", file="generations.jsonl")
    assert command.recipe == {} and command.own["against"] == "a" and command.file == Path("g.jsonl")
    for line, problem in {
        "": "The first word must be the input: generations.jsonl",
        "h.jsonl": "There is no h.jsonl.",
        "g.jsonl learning_rate=1": "Unknown key `learning_rate`.",
        "g.jsonl restrat=true": r"Unknown key `restrat` \(did you mean `restart`\?\).",
        "g.jsonl restart": "Overrides are written key=value; got restart.",
    }.items():
        with pytest.raises(UsageError, match=problem):
            read(line, file="generations.jsonl")


OLD = {"--against": "against", "--restart": "restart", "--recipe": recipe.THE_FILE, recipe.A_WORD: "against"}


@pytest.mark.parametrize(
    "line, modern",
    [
        ("r.yaml --against adapter --restart", "r.yaml against=adapter restart=true"),
        ("--against=adapter r.yaml cutoff_len=512", "r.yaml cutoff_len=512 against=adapter"),
        ("--restart r.yaml", "r.yaml restart=true"),
        ("adapter --recipe r.yaml --restart", "r.yaml restart=true against=adapter"),
    ],
)
def test_old_spellings_work_with_one_note(capsys, line, modern):
    command = read(line, old=OLD)
    assert command == read(modern)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("This spelling is deprecated; write: ") and note.endswith(modern)


def test_new_spellings_get_no_note(capsys):
    read("r.yaml against=base", old=OLD)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("line", ["-h", "r.yaml --help", "nothing -h"])
def test_help_is_the_whole_docstring(capsys, line):
    with pytest.raises(SystemExit) as stopped:
        read(line)
    assert stopped.value.code == 0 and capsys.readouterr().out == DOC


def test_flags_print_the_docstring_and_refuse_in_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe.flags(DOC).parse_args(["-h"])
    assert stopped.value.code == 0 and DOC in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        recipe.flags(DOC).parse_args(["--nope"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --nope (-h shows the help)\n"


SCRIPT = '''"""Measures something."""
import sys
from llava_orpo import recipe
from llava_orpo.errors import UserError

def main(argv):
    command = recipe.read_command(__doc__, argv, {"fail": "", "code": 0})
    assert not {"torch", "transformers"} & set(sys.modules)
    if command.own["fail"] == "user":
        raise UserError("No pair could be scored.")
    if command.own["fail"] == "file":
        open("not/there.json")
    if command.own["fail"] == "bug":
        raise ValueError("a bug")
    return command.own["code"]

if __name__ == "__main__":
    recipe.run(main)
'''


@pytest.mark.parametrize(
    "line, code, text",
    [
        ("-h", 0, "Measures something.\n"),
        ("r.yaml", 0, ""),
        ("r.yaml code=3", 3, ""),
        ("r.yaml cod=3", 2, "error: Unknown key `cod` (did you mean `code`?).\n"),
        ("r.yaml fail=user", 1, "error: No pair could be scored.\n"),
        ("r.yaml fail=file", 1, "error: No such file or directory: not/there.json\n"),
        ("r.yaml fail=bug", 1, "Traceback"),
    ],
)
def test_a_command_ends_with_a_code_and_a_line(place, line, code, text):
    (place / "measure.py").write_text(SCRIPT)
    words = [sys.executable, "measure.py", *line.split()]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    printed = ended.stdout + ended.stderr
    assert text in printed if text == "Traceback" else printed == text
    if code and "fail=bug" not in line and "code=" not in line:
        environment = {**os.environ, "LLAVA_ORPO_DEBUG": "1"}
        debug = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        assert "Traceback" in debug.stderr


@pytest.mark.parametrize(
    "keys, label",
    [
        ({"model_name_or_path": "a/llava/"}, "llava"),
        ({"model_name_or_path": "a/b", "adapter_name_or_path": "x/one, y/two/"}, "b+one+two"),
        ({"model_name_or_path": "b", "adapter_name_or_path": ["x/one"], "quantization_bit": 4}, "b+one-4bit"),
    ],
)
def test_model_label(keys, label):
    assert recipe.model_label(keys) == label


def test_with_model():
    keys = {"model_name_or_path": "base", "adapter_name_or_path": "old", "seed": 1}
    assert recipe.with_model(keys, "base") == {"model_name_or_path": "base", "seed": 1}
    assert recipe.with_model(keys, "adapter") == {
        "model_name_or_path": "base",
        "adapter_name_or_path": "adapter",
        "finetuning_type": "lora",
        "seed": 1,
    }
    assert recipe.with_model(keys, "org/other") == {"model_name_or_path": "org/other", "seed": 1}
