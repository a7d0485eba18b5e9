"""The rules of the house: commands hold commands, the package imports without circles, nobody edits sys.path."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

THIS = Path(__file__).resolve()  # reads sys.path, to hand it on
PACKAGE = ROOT / "plugins" / "llava_orpo"
TRACKED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True
)
FILES = [ROOT / name for name in TRACKED.stdout.split() if (ROOT / name).exists()]
COMMANDS = [file for file in FILES if file.relative_to(ROOT).parts[0] in ("evals", "scripts")]
PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
PURE = (
    "errors",
    "files",
    "keys",
    "recipe",
    "precheck",
    "loss_keys",
    "arguments",
    "step.packing",
    "step.orpo",
    "step.losses",
    "data.anyres",
    "data.images",
    "data.damaged",
    "data.media",
    "data.rows",
    "data.conversation",
    "preference.records",
    "preference.metrics",
)


def trees(files) -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def imported(module: str, tree: ast.AST, names: set[str], is_package: bool) -> set[str]:
    """Modules of `names` that a module imports anywhere, except for type checking alone."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return (found & names) - {module}


def test_nobody_edits_sys_path():
    for file, tree in trees(FILES).items():
        for node in ast.walk(tree):
            touches = isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" and file != THIS
            assert not touches, f"{file}:{node.lineno} uses sys.path: install the package, or pytest's pythonpath"


def test_commands_are_imported_by_no_other_file_of_theirs():
    siblings = {file.stem for file in COMMANDS}
    for file, tree in trees(COMMANDS).items():
        found = imported(file.stem, tree, siblings, is_package=False)
        assert not found, f"{file} imports {found}: what is imported lives in the package"


def test_the_package_imports_no_command():
    commands = {file.stem for file in COMMANDS}
    for file, tree in trees(PACKAGE.rglob("*.py")).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & commands, file


def dangerous(node: ast.AST) -> str:
    """What of a syntax node would run code that comes from outside, or ""."""
    if isinstance(node, ast.Import) and any(a.name.split(".")[0] in PICKLES for a in node.names):
        return "imports pickle"
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
        return "imports pickle"
    if not isinstance(node, ast.Call):
        return ""
    name = ast.unparse(node.func)
    given = {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "joblib.load"):
        return f"calls {name}"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        return f"calls {name} with allow_pickle"
    if given.get("shell", "False") != "False":
        return "starts a shell"
    return "trusts remote code" if given.get("trust_remote_code", "False") != "False" else ""


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "eval(x)",
        "exec(x)",
    ]
    + ["run(x, shell=True)", "yaml.load(f)", "os.system(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)"],
)
def test_what_runs_foreign_code_is_seen(line):
    assert any(dangerous(node) for node in ast.walk(ast.parse(line)))


def test_nothing_runs_code_from_data_or_checkpoints():
    for file, tree in trees(FILES).items():
        found = [f"{file}:{node.lineno} {what}" for node in ast.walk(tree) if (what := dangerous(node))]
        assert not found, found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every way back to a module that the depth-first walk is still in."""
    found, state = [], {}

    def walk(name: str, path: list[str]) -> None:
        state[name] = "open"
        for other in sorted(graph[name]):
            if state.get(other) == "open":
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                walk(other, [*path, other])
        state[name] = "done"

    for name in sorted(graph):
        if name not in state:
            walk(name, [name])
    return found


def test_no_import_circle():
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {
        name: imported(name, ast.parse(file.read_text(encoding="utf-8")), set(names), file.name == "__init__.py")
        for name, file in names.items()
    }
    assert sum(map(len, graph.values())) > 100  # the arrows were found at all
    assert circles(graph) == []
    planted = {**graph, "llava_orpo.step.orpo": graph["llava_orpo.step.orpo"] | {"llava_orpo.training.trainer"}}
    planted["llava_orpo.training.trainer"] = graph["llava_orpo.training.trainer"] | {"llava_orpo.step.orpo"}
    assert circles(planted)  # and a circle would be


def test_only_the_command_layer_ends_the_process():
    allowed = {PACKAGE / name for name in ("errors.py", "recipe.py", "early.py")}
    for file, tree in trees(set(PACKAGE.rglob("*.py")) - allowed).items():
        for node in ast.walk(tree):
            ends = isinstance(node, ast.Name) and node.id == "SystemExit"
            assert not ends, f"{file}:{node.lineno} raises SystemExit: raise UserError"


@pytest.mark.parametrize("module", PURE)
def test_importing_a_pure_module_changes_nothing(module):
    code = (
        "import os, sys; finders, variables = list(sys.meta_path), dict(os.environ)\n"
        f"import llava_orpo.{module}\n"
        "assert sys.meta_path == finders and dict(os.environ) == variables\n"
        "assert 'llamafactory' not in sys.modules and 'transformers' not in sys.modules"
    )
    # -S: without the .pth line of the environment; -c: nothing else is imported before
    path = os.pathsep.join([str(ROOT / "plugins"), *[entry for entry in sys.path if "site-packages" in entry]])
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


def test_the_licence_that_the_package_names_is_here():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:2] == ["Apache", "License"] and "Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
