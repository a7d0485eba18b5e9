"""early.py, precheck.py, errors.py: every wrong recipe ends in one line and exit code 2, within two seconds of CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from helpers.paths import ROOT
from llava_orpo import accelerator, autoload, early, errors, precheck
from llava_orpo.errors import UsageError, UserError

CLI = Path(sys.executable).parent / "llamafactory-cli"
CPU_SECONDS = 2.0


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    cpu: float


def run(words: list, folder: Path, **environment: str) -> Ended:
    """Runs `words` in `folder`, without a GPU; `cpu` is the user and system time of the process tree."""
    child = subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    out, err = child.stdout.read(), child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    child.stderr.close()
    return Ended(child.returncode, out, err, usage.ru_utime + usage.ru_stime)


RECIPE = {
    "plugins": "llava_orpo",
    "model_name_or_path": "./model",
    "stage": "dpo",
    "do_train": True,
    "pref_loss": "orpo",
    "dataset_dir": "data",
    "dataset": "rows",
    "eval_dataset": "heldout",
    "template": "llava_v16_mistral",
    "output_dir": "out",
    "learning_rate": 1e-5,
    "eval_strategy": "steps",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good recipe and what it names, and with bad recipes; nothing is a real model or data set."""
    folder = tmp_path_factory.mktemp("place")
    for name, content in {
        "good.yaml": yaml.safe_dump(RECIPE),
        "chat.yaml": yaml.safe_dump({"plugins": "llava_orpo", "model_name_or_path": "./model"}),
        "no_eval.yaml": yaml.safe_dump({**RECIPE, "eval_strategy": "no"}).replace("'no'", "no"),
        "plain.yaml": yaml.safe_dump({"model_name_or_path": "./nothing", "learning_rat": 1}),
        "forgotten.yaml": yaml.safe_dump(
            {key: RECIPE[key] for key in RECIPE if key != "plugins"} | {"shared_prefix": True}
        ),
        "plugin.yaml": "plugin: llava_orpo\n",
        "broken.yaml": "plugins: llava_orpo\nstage: dpo\n  do_train: [true\n",
        "twice.yaml": "plugins: llava_orpo\nseed: 1\nseed: 2\n",
        "list.yaml": "- plugins\n",
        "recipe.txt": "",
        "model/config.json": "{}",
        "adapter/adapter_config.json": "{}",
        "data/rows.json": "[]",
        "data/dataset_info.json": json.dumps(
            {"rows": {"file_name": "rows.json"}, "heldout": {"hf_hub_url": "x/y"}, "gone": {"file_name": "gone.json"}}
        ),
        "cut/dataset_info.json": '{"rows": ',
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "empty").mkdir()
    return folder


REFUSED = [
    # the recipe itself
    ("train nothing.yaml", ["There is no recipe nothing.yaml."]),
    ("train goood.yaml", ["There is no recipe goood.yaml; did you mean good.yaml?"]),
    ("train recipe.txt", ["recipe.txt is not a recipe: its name must end in .yaml or .yml."]),
    ("train empty", ["empty is not a recipe: its name must end in .yaml or .yml."]),
    ("train broken.yaml", ["broken.yaml, line 3: mapping values are not allowed in this context."]),
    ("train twice.yaml", ["twice.yaml, line 3: found duplicate key seed."]),
    ("train list.yaml", ["list.yaml is not a recipe: it must be a mapping, one `key: value` per line."]),
    ("train", ["`train` needs a recipe: llamafactory-cli train recipe.yaml key=value …"]),
    ("train good.yaml seed={", ["seed={ cannot be read: the value is neither a word nor YAML; quote it."]),
    # keys
    ("train good.yaml learning_rat=1", ["Unknown key `learning_rat` (did you mean `learning_rate`?)."]),
    ("train good.yaml shared_prefx=true", ["Unknown key `shared_prefx` (did you mean `shared_prefix`?)."]),
    ("train good.yaml --learning_rate=1e-4", ["Unknown key `--learning_rate` (did you mean `learning_rate`?)."]),
    ("train good.yaml learning_rate", ["Overrides are written key=value; got learning_rate."]),
    (
        "train good.yaml plugins=lava_orpo",
        ["plugins: 'lava_orpo' is not allowed; did you mean `plugins: llava_orpo`? It must be llava_orpo."],
    ),
    ("train plugin.yaml", ["Unknown key `plugin` (did you mean `plugins`?)."]),
    ("train forgotten.yaml", ["`shared_prefix` is a key of the plugin: add `plugins: llava_orpo` to the recipe."]),
    (
        "chat chat.yaml learning_rate=1",
        ["`learning_rate` is a key of `llamafactory-cli train`; `chat` does not take it."],
    ),
    ("export chat.yaml", ["export_dir is missing."]),
    (
        "export chat.yaml export_dir=data",
        ["export_dir: data already holds files; name another folder, or set `overwrite_export_dir: true`."],
    ),
    # values
    ("train good.yaml grounding_eval=flase", ["grounding_eval: 'flase' is not allowed; it must be true or false."]),
    (
        "train good.yaml eval_examples=many",
        ["eval_examples: 'many' is not allowed; it must be a whole number, 0 or more."],
    ),
    (
        "train good.yaml max_pairs_per_image=2.5",
        ["max_pairs_per_image: 2.5 is not allowed; it must be a whole number, 1 or more."],
    ),
    (
        "train good.yaml eval_min_subset=-3",
        ["eval_min_subset: -3 is not allowed; it must be a whole number, 1 or more."],
    ),
    ("train good.yaml learning_rate=-1", ["learning_rate: -1 is not allowed; it must be a number, 0 or more."]),
    (
        "train good.yaml pref_loss=orpoo",
        [
            "pref_loss: 'orpoo' is not allowed; did you mean `pref_loss: orpo`? "
            "It must be sigmoid, hinge, ipo, kto_pair, orpo or simpo, or null."
        ],
    ),
    (
        "train good.yaml template=llava_v16_mistrl",
        ["template: 'llava_v16_mistrl' is not allowed; did you mean `template: llava_v16_mistral`?"],
    ),
    ("train good.yaml eval_strategy=yes", ["eval_strategy: true is not allowed; it must be no, steps or epoch."]),
    # datasets, files and folders
    ("train good.yaml dataset=row", ["dataset: row is not registered in data/dataset_info.json; did you mean `rows`?"]),
    (
        "train good.yaml eval_dataset=rows,xyz",
        ["eval_dataset: xyz is not registered in data/dataset_info.json; it names gone, heldout, rows."],
    ),
    (
        "train good.yaml dataset=gone",
        ["dataset: data/gone.json, the data of gone, does not exist (registered in data/dataset_info.json)."],
    ),
    (
        "train good.yaml dataset_dir=dat eval_dataset=null",
        ["dataset_dir: there is no dat/dataset_info.json, in which datasets are registered."],
    ),
    (
        "train good.yaml dataset_dir=cut eval_dataset=null",
        ["cut/dataset_info.json is not JSON: Expecting value: line 1 column 10 (char 9)."],
    ),
    ("chat chat.yaml model_name_or_path=outputs/merged", ["model_name_or_path: there is no folder outputs/merged."]),
    (
        "chat chat.yaml model_name_or_path=./empty",
        ["model_name_or_path: ./empty holds no config.json, so it is not a model folder."],
    ),
    (
        "chat chat.yaml model_name_or_path=adapter",
        [
            "model_name_or_path: adapter holds an adapter; name it with adapter_name_or_path and its base model with "
            "model_name_or_path."
        ],
    ),
    ("api chat.yaml adapter_name_or_path=outputs/orpo", ["adapter_name_or_path: there is no folder outputs/orpo."]),
    (
        "api chat.yaml adapter_name_or_path=./model",
        [
            "adapter_name_or_path: ./model holds no adapter_config.json, so it is not an adapter; name a whole model "
            "with model_name_or_path."
        ],
    ),
    ("train good.yaml deepspeed=zero9.json", ["deepspeed: there is no file zero9.json."]),
    (
        "train good.yaml resume_from_checkpoint=out/checkpoint-9",
        ["resume_from_checkpoint: there is no folder out/checkpoint-9."],
    ),
    ("train good.yaml media_dir=images", ["media_dir: there is no folder images."]),
    ("train good.yaml accelerator_config=no.json", ["accelerator_config: there is no file no.json."]),
    (
        "train good.yaml accelerator_config.dispatch_batches=true",
        ["accelerator_config: dispatch_batches: true can't send packed batches to other processes; leave it out."],
    ),
    # precision
    ("train good.yaml bf16=true", ["bf16: true needs a GPU, and this machine has none; set `bf16: false`."]),
    ("train good.yaml fp16=true", ["fp16: true needs a GPU, and this machine has none; set `fp16: false`."]),
    # keys of the loss that contradict each other
    (
        "train good.yaml preference_loss=mdpo image_preference=1",
        [
            "preference_loss: mdpo contradicts pref_loss: orpo; leave pref_loss out, or say pref_loss=null.",
            "image_preference does not go with preference_loss: mdpo, which has an image term of its own.",
        ],
    ),
    ("train good.yaml image_preference=a", ["image_preference: 'a' is not allowed; it must be a number, 0 or more."]),
    # all at once
    (
        "train good.yaml learning_rat=1 dataset=row seed=x",
        [
            "Unknown key `learning_rat` (did you mean `learning_rate`?).",
            "seed: 'x' is not allowed; it must be a whole number.",
            "dataset: row is not registered in data/dataset_info.json; did you mean `rows`?",
        ],
    ),
]


@pytest.mark.parametrize("line, problems", REFUSED, ids=[line for line, _ in REFUSED])
def test_llamafactory_cli_refuses_in_two_seconds(place, line, problems):
    ended = run([CLI, *line.split()], place)
    assert ended.err.splitlines() == [f"error: {problem}" for problem in problems]
    assert ended.code == 2 and not ended.out
    assert ended.cpu < CPU_SECONDS


@pytest.mark.parametrize("command", sorted(early.PURPOSES))
def test_help_of_every_command_in_two_seconds(place, command):
    ended = run([CLI, command, "-h"], place)
    assert ended.code == 0 and not ended.err and ended.cpu < CPU_SECONDS
    assert f"llamafactory-cli {command} recipe.yaml" in ended.out and "docs/keys.md" in ended.out


@pytest.mark.parametrize("words", [["-m", "llava_orpo"], ["-m", "llamafactory.cli"]])
def test_the_other_ways_to_start_refuse_too(place, words):
    ended = run([sys.executable, *words, "train", "nothing.yaml"], place)
    assert (ended.code, ended.err) == (2, "error: There is no recipe nothing.yaml.\n") and ended.cpu < CPU_SECONDS


def test_debug_shows_the_traceback(place):
    ended = run([CLI, "train", "nothing.yaml"], place, LLAVA_ORPO_DEBUG="1")
    assert ended.code == 1 and "Traceback" in ended.err and "UsageError: There is no recipe nothing.yaml." in ended.err


# Commands of this repository: (words, exit code, text in the output). One row per command and kind of mistake.
TINY = "recipes/tiny/llava16_orpo_qlora.yaml"
WITH_RECIPE = [f"evals/{name}.py" for name in ("preference", "generate", "variants", "benchmarks")]
WITH_RECIPE += ["scripts/demo.py", "scripts/model_card.py"]
WITH_FILE = ["evals/judge.py", "evals/human.py", "evals/report.py"]
WITH_FLAGS = [
    f"scripts/{name}.py"
    for name in "make_schema make_demo_data make_photo_pairs make_random_llava make_tiny_llava ask quantize".split()
]
WITH_FLAGS += ["scripts/convert_llava_checkpoint.py", "evals/tasks/demo_objects/make_data.py"]
COMMANDS = [
    *(([name, "-h"], 0, f"python {name}") for name in WITH_RECIPE + WITH_FILE if name != "evals/benchmarks.py"),
    (["evals/benchmarks.py", "-h"], 0, "bash scripts/benchmarks.sh"),
    *(([name, "-h"], 0, Path(name).name) for name in WITH_FLAGS),
    *(([name], 2, "error: The first word must be the recipe: recipe.yaml") for name in WITH_RECIPE),
    *(([name, "nothing.yaml"], 2, "error: There is no recipe nothing.yaml.") for name in WITH_RECIPE),
    *(([name, TINY, "learning_rat=1"], 2, "error: Unknown key `learning_rat` (did you") for name in WITH_RECIPE),
    *(([name, TINY, "again"], 2, "error: Overrides are written key=value; got again.") for name in WITH_RECIPE),
    *(([name, "nothing", "a=1"], 2, "error: There is no nothing.") for name in WITH_FILE),
    *(([name, "README.md", "modle=x"], 2, "error: Unknown key `modle`") for name in WITH_FILE),
    *(([name, "--nope"], 2, "error: ") for name in WITH_FLAGS),
    (["evals/preference.py", TINY, "agianst=base"], 2, "error: Unknown key `agianst` (did you mean `against`?)."),
    (
        ["evals/preference.py", TINY, "model_name_or_path=./no"],
        2,
        "error: model_name_or_path: there is no folder ./no.",
    ),
    (["evals/preference.py", TINY, "eval_dataset=demo_heldot"], 2, "did you mean `demo_heldout`?"),
    (
        ["evals/generate.py", TINY, "max_prompts=many"],
        2,
        "error: max_prompts: 'many' is not allowed; it must be a whole",
    ),
    (["evals/judge.py", "README.md"], 2, "error: base_url= is missing"),
    (["scripts/demo.py", TINY], 2, "error: aligned= is missing"),
    (
        ["scripts/model_card.py", TINY, "folder=docs"],
        2,
        "error: docs holds neither a model (config.json) nor an adapter",
    ),
    (
        ["scripts/quantize.py", "--method", "gptq", "--model", "no", "--data", "x", "--out", "y"],
        2,
        "error: no is not a",
    ),
    (["scripts/convert_llava_checkpoint.py", "no", "out"], 2, "error: no is not a folder"),
    (["scripts/ask.py", "no"], 2, "error: give --question"),
]


@pytest.mark.parametrize("words, code, text", COMMANDS, ids=[" ".join(words) for words, _, _ in COMMANDS])
def test_commands_answer_in_two_seconds(words, code, text):
    ended = run([sys.executable, *words], ROOT)
    assert ended.code == code and text in (ended.err if code else ended.out) and ended.cpu < CPU_SECONDS
    assert "Traceback" not in ended.err and (code == 0 or ended.err.startswith("error: "))


@pytest.mark.parametrize(
    "command, words",
    [
        ("train", ["good.yaml"]),
        ("train", ["good.yaml", "eval_strategy=no", "save_strategy=no", "anyres_max_tiles='2'", "seed=3.0"]),
        ("train", ["no_eval.yaml", "dataset=[rows,heldout]", "model_name_or_path=llava-hf/llava-v1.6-mistral-7b-hf"]),
        ("train", ["good.yaml", "bf16=true", "use_cpu=true", "resume_from_checkpoint=true", "deepspeed={a: 1}"]),
        ("train", ["good.yaml", "dataset_dir=ONLINE", "dataset=a/b", "eval_dataset=c/d"]),
        ("chat", ["chat.yaml", "adapter_name_or_path=adapter", "temperature=0.5"]),
    ],
)
def test_a_good_recipe_passes(place, monkeypatch, command, words):
    monkeypatch.chdir(place)
    assert early.check(command, words)


@pytest.mark.parametrize("words", [["plain.yaml"], ["plain.yaml", "what", "ever=1"], ["--stage", "dpo"], ["x.json"]])
def test_what_has_no_plugin_is_left_to_llamafactory(place, monkeypatch, words):
    monkeypatch.chdir(place)
    hook = sys.excepthook
    early.before_llamafactory(["train", *words])
    assert sys.excepthook is hook


def test_unknown_keys_pass_where_llamafactory_takes_them(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert early.check("train", ["good.yaml", "learning_rat=1"])
    assert not early.check("train", ["forgotten.yaml"])


@pytest.mark.parametrize(
    "argv, rank, runs",
    [
        (["/bin/llamafactory-cli", "train"], None, True),
        (["/bin/lmf", "train"], None, True),
        (["C:\\Scripts\\llamafactory-cli.exe".replace("\\", "/"), "train"], None, True),
        (["/bin/llamafactory-cli", "train"], "1", False),  # a process of torchrun: its parent has printed
        (["/site-packages/llamafactory/launcher.py", "train"], None, False),
        (["/bin/pytest"], None, False),
        ([], None, False),
    ],
)
def test_only_the_command_itself_checks_early(monkeypatch, argv, rank, runs):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(sys, "argv", argv)
    assert autoload.runs_the_command() is runs


@pytest.mark.parametrize(
    "capabilities, key, line",
    [
        ([(9, 0)], "bf16", None),
        (
            [(9, 0), (7, 5)],
            "bf16",
            "bf16: true needs a GPU of compute capability 8.0, this one has 7.5; set `bf16: false` and `fp16: true`.",
        ),
        (
            [(7, 5)],
            "pure_bf16",
            "pure_bf16: true needs a GPU of compute capability 8.0, this one has 7.5; set `pure_bf16: false`.",
        ),
        ([(7, 5)], "fp16", None),
        ([], "fp16", "fp16: true needs a GPU, and this machine has none; set `fp16: false`."),
        (None, "bf16", None),  # the driver does not say
    ],
)
def test_precision_is_that_of_the_gpu(monkeypatch, capabilities, key, line):
    monkeypatch.setattr(accelerator, "only_nvidia", lambda: True)
    monkeypatch.setattr(accelerator, "compute_capabilities", lambda: capabilities)
    assert precheck.problems({"model_name_or_path": "a/b", key: True}) == ([line] if line else [])


def test_other_accelerators_are_not_judged(monkeypatch):
    monkeypatch.setattr(accelerator, "compute_capabilities", lambda: [])
    monkeypatch.setattr(accelerator.importlib.metadata, "version", lambda name: "2.11.0+rocm6.4")
    assert precheck.problems({"model_name_or_path": "a/b", "bf16": True}) == []


class FakeNvml:
    """Three GPUs, of compute capability 7.5, 8.0 and 9.0."""

    def nvmlInit_v2(self):
        return 0

    def nvmlShutdown(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, device, major, minor):
        major._obj.value, minor._obj.value = [(7, 5), (8, 0), (9, 0)][device.value - 1]
        return 0


@pytest.mark.parametrize(
    "visible, found",
    [
        (None, [(7, 5), (8, 0), (9, 0)]),
        ("", []),
        ("-1", []),
        ("2,0", [(9, 0), (7, 5)]),
        ("7", []),
        ("GPU-8a3f", [(7, 5), (8, 0), (9, 0)]),
    ],
)
def test_visible_gpus(monkeypatch, visible, found):
    monkeypatch.setattr(accelerator, "_library", lambda names: FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert accelerator.compute_capabilities() == found


def test_no_nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(accelerator, "_library", lambda names: None)
    assert accelerator.compute_capabilities() == []
    monkeypatch.setattr(accelerator, "_library", lambda names: object() if names == accelerator.CUDA else None)
    assert accelerator.compute_capabilities() is None


@pytest.mark.parametrize(
    "name, local",
    [
        ("llava-hf/llava-v1.6-mistral-7b-hf", False),
        ("gpt2", False),
        ("/models/llava", True),
        ("./model", True),
        ("../model", True),
        ("a/b/c", True),
        ("outputs/merged", True),
        ("tests/model", True),
    ],
)
def test_hub_ids_and_folders_are_told_apart(monkeypatch, name, local):
    monkeypatch.chdir(ROOT)
    assert precheck.looks_local(name) is local


HOOK = """
import sys
from llava_orpo import errors
errors.hide_tracebacks_of_foreseen_errors()
exec(compile({code!r}, "x.py", "exec"), {{"__name__": {module!r}, "errors": errors}})
"""


@pytest.mark.parametrize(
    "code, module, lines",
    [
        ("raise errors.UserError('one', 'two')", "any", ["error: one", "error: two"]),
        ("raise ValueError('bad')", "llamafactory.hparams.parser", ["error: bad"]),
        ("raise ValueError('bad')", "llamafactory.train", None),
        ("raise KeyError('bad')", "llamafactory.hparams.parser", None),
    ],
)
def test_later_errors(tmp_path, code, module, lines):
    script = HOOK.format(code=code, module=module)
    ended = run([sys.executable, "-c", script], tmp_path)
    assert ended.code == 1
    assert ended.err.splitlines() == lines if lines else "Traceback" in ended.err
    assert "Traceback" in run([sys.executable, "-c", script], tmp_path, LLAVA_ORPO_DEBUG="1").err


def test_an_error_is_a_value_error_with_its_exit_code():
    assert issubclass(UsageError, UserError) and issubclass(UserError, ValueError)
    assert (UsageError.exit_code, UserError.exit_code) == (2, 1) and str(UserError("a", "b")) == "a\nb"
    with pytest.raises(SystemExit) as stopped:
        errors.stop(UsageError("x"))
    assert stopped.value.code == 2


@pytest.mark.slow
def test_llamafactorys_own_refusal_is_one_line(place):
    """`val_size` beside `eval_dataset` passes the early check and is refused by DataArguments itself."""
    ended = run([CLI, "train", "good.yaml", "val_size=0.1", "use_cpu=true"], place, DISABLE_VERSION_CHECK="1")
    assert ended.code == 1 and "Traceback" not in ended.err
    assert ended.err.splitlines()[-1] == "error: Cannot specify `val_size` if `eval_dataset` is not None."
