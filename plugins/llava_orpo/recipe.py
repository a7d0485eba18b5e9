"""Recipes: how they are read, and how a command takes one.

Whatever takes a recipe is written like llamafactory-cli, `command recipe.yaml key=value …`, and reads its command line
with `read_command`; a command that takes none has flags (`flags`). `run` starts both, so that an error the user can
fix ends in one line. Nothing here imports torch, transformers or LLaMA-Factory.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from . import keys
from .errors import UsageError, UserError, debugging, show

RECIPE = "recipe.yaml"
SUFFIXES = (".yaml", ".yml")
HELP = ("-h", "--help")
# The keys of a recipe that an evaluation reads files of; a training reads those of every key.
MODEL = ("model_name_or_path", "adapter_name_or_path", "bf16", "fp16")
MODEL_AND_PAIRS = (*MODEL, "eval_dataset")
FILE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
THE_FILE = ""  # in a table of old spellings: the value is the command's recipe or file
A_WORD = "word"  # in a table of old spellings: the key for a word without a key
_JSON_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    Path: "string",
    list: "array",
    dict: "object",
}


@dataclass(frozen=True)
class Command:
    """What a command was asked for: the keys of the `recipe`, the command's `own` keys, and its first word, `file`."""

    recipe: dict[str, Any]
    own: dict[str, Any]
    file: Path
    given_keys: frozenset[str]

    def given(self, key: str) -> bool:
        """Whether `key` was written on the command line (and not in the recipe, nor left at its default)."""
        return key in self.given_keys


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe with `key=value` overrides, read as LLaMA-Factory reads them.

    Raises UsageError, in one line, if there is no such file, if it is not YAML or not a mapping of keys, and for an
    override that cannot be read.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    _refuse_missing(path)
    try:
        read = OmegaConf.load(path)
        if not isinstance(read, DictConfig):
            raise UsageError(f"{path} is not a recipe: it must be a mapping, one `key: value` per line.")
        return OmegaConf.to_container(OmegaConf.merge(read, _read_overrides(overrides)))
    except YAMLError as error:
        raise UsageError(_yaml_problem(path, error)) from None
    except (OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a recipe: {_first_line(error)}.") from None


def as_meant(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with every value in the type its key takes (see `keys.as_meant`); unknown keys stay as they are."""
    known = keys.known()
    return {key: keys.as_meant(value, known[key]) if key in known else value for key, value in recipe.items()}


def check_overrides(words: Sequence[str], secrets: Collection[str] = ()) -> list[str]:
    """One sentence for each of `words` that is not written `key=value`, or that gives away a secret.

    secrets: keys that may give one away.
    """
    found = [f"Overrides are written key=value; got {word}." for word in words if not word.partition("=")[1]]
    for key, _, value in (word.partition("=") for word in words):
        if keys.is_secret(key) and value and key not in secrets:
            found.append(
                f"{key}: a secret on a command line is seen by every user of this machine, and W&B keeps the command; "
                "set it as a variable (HF_TOKEN, WANDB_API_KEY) or in a recipe that only you can read."
            )
    return found


def model_label(recipe: dict[str, Any]) -> str:
    """A short name for the model a recipe loads, usable as a folder name."""
    name = Path(str(recipe["model_name_or_path"]).rstrip("/")).name
    if recipe.get("adapter_name_or_path"):
        adapters = recipe["adapter_name_or_path"]
        adapters = adapters.split(",") if isinstance(adapters, str) else adapters
        name += "+" + "+".join(Path(str(adapter).rstrip("/")).name for adapter in adapters)
    return name + (f"-{recipe['quantization_bit']}bit" if recipe.get("quantization_bit") else "")


def with_model(recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """The recipe with another model: `base` (no adapter), an adapter folder, or a model folder or Hub id."""
    recipe = dict(recipe)
    recipe.pop("adapter_name_or_path", None)
    if model == "base":
        return recipe
    if (Path(model) / "adapter_config.json").is_file():
        return {**recipe, "adapter_name_or_path": model, "finetuning_type": "lora"}
    return {**recipe, "model_name_or_path": model}


def read_command(
    doc: str,
    argv: Sequence[str],
    own_keys: Mapping[str, Any],
    *,
    file: str = RECIPE,
    required: Collection[str] = (),
    uses: Collection[str] = MODEL_AND_PAIRS,
    old: Mapping[str, str] | None = None,
    refuse: bool = True,
    must_exist: bool = True,
    secrets: Collection[str] = (),
) -> Command:
    """The command line `recipe.yaml key=value …` of a command, checked.

    doc: the command's help, printed whole for -h. own_keys: its keys with their defaults, whose types the values must
    have; a type in place of a default means "not given" is None. required: own keys that must be given. uses: the
    recipe keys whose files and datasets must exist. file: what the first word names; if that is another file than a
    recipe, or a folder, `recipe` is empty and only own keys are taken. old: spellings that still work, with one note on
    stderr: {"--aligned": "aligned"}, {"--recipe": THE_FILE, A_WORD: "folder"}. refuse: False leaves the recipe's own
    problems to the caller. must_exist: False for a first word that may be a Hub id. secrets: own keys that may be given
    although every user of the machine sees a command line.

    Raises SystemExit after the help, and UsageError with one sentence per problem for anything that is wrong.
    """
    if any(word in HELP for word in argv):
        print(doc.strip())
        raise SystemExit(0)
    schemas = {key: own_schema(default) for key, default in own_keys.items()}
    words = _modern(list(argv), old or {}, schemas)
    takes_recipe = file.endswith(SUFFIXES)
    if not words or "=" in words[0] or words[0].startswith("-"):
        raise UsageError(
            f"The first word must be {'the recipe' if takes_recipe else 'the input'}: {file} key=value … "
            "(-h shows the help)."
        )
    path, overrides = Path(words[0]), words[1:]
    if wrong := check_overrides(overrides, secrets):
        raise UsageError(*wrong)
    given = load(path, overrides) if takes_recipe else _load_own(path, overrides, must_exist)
    names = frozenset(word.partition("=")[0].partition(".")[0] for word in overrides)
    # A key of the plugin (`reference`) that is a command's own too is the command's where it stands behind the recipe.
    ours = {key for key in own_keys if key in given and (key in names or key not in keys.of_plugin())}
    own = {
        key: keys.as_meant(given.pop(key), schemas[key]) if key in ours else _default(value)
        for key, value in own_keys.items()
    }
    recipe = as_meant(given)
    problems = [sentence for key, value in own.items() if (sentence := keys.problem(key, value, schemas[key]))]
    problems += [f"{key}= is missing (-h shows the help)." for key in required if own[key] is None]
    if takes_recipe and refuse:
        from . import precheck

        problems += precheck.problems(recipe, uses=uses, also_known=own_keys)
    elif not takes_recipe:
        problems += [keys.unknown(key, own_keys) for key in recipe]
    if problems:
        raise UsageError(*problems)
    own = {key: _as_path(value, own_keys[key]) for key, value in own.items()}
    return Command(recipe if takes_recipe else {}, own, path, names)


class _Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (-h shows the help)\n")


def flags(doc: str) -> argparse.ArgumentParser:
    """A parser of flags for a command that takes no recipe: -h prints the whole `doc`, an error takes one line."""
    return _Flags(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command's `main` on this process's arguments and exits with its code.

    A UserError, or a file that cannot be opened, ends in one line per problem; LLAVA_ORPO_DEBUG=1 shows tracebacks.
    """
    try:
        code = main(sys.argv[1:])
    except (UserError, *FILE_ERRORS) as error:
        if debugging():
            raise
        show(UserError(f"{error.strerror}: {error.filename}") if getattr(error, "filename", None) else error)
        code = getattr(error, "exit_code", 1)
    raise SystemExit(code)


def _refuse_missing(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name the recipe in it.")
    others = {other.stem: other for other in path.parent.glob("*") if other.suffix in SUFFIXES}
    near = keys.nearest(path.stem, others)
    raise UsageError(f"There is no recipe {path}" + (f"; did you mean {others[near]}?" if near else "."))


def _yaml_problem(path: Path, error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or _first_line(error)
    return f"{path}, line {mark.line + 1}: {what}." if mark else f"{path} is not YAML: {what}."


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _read_overrides(words: Sequence[str]) -> Any:
    """The OmegaConf mapping of `key=value` words. Raises UsageError naming each word that cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    unreadable = []
    for word in words:
        try:
            OmegaConf.from_cli([word])
        except (OmegaConfBaseException, YAMLError):
            unreadable.append(f"{word} cannot be read: the value is neither a word nor YAML; quote it.")
    if unreadable:
        raise UsageError(*unreadable)
    return OmegaConf.from_cli(list(words))


def _load_own(path: Path, overrides: list[str], must_exist: bool) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if must_exist and not path.exists():
        raise UsageError(f"There is no {path}.")
    return OmegaConf.to_container(_read_overrides(overrides))


def own_schema(default: Any) -> dict[str, Any]:
    """The JSON Schema of an own key's values: those of its default's type; a key without a default also takes null."""
    if isinstance(default, type):
        return {"type": [_JSON_TYPES[default], "null"]}
    kind = Path if isinstance(default, Path) else type(default)
    return {} if default is None else {"type": [_JSON_TYPES[kind]]}


def _default(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, type) else value


def _as_path(value: Any, default: Any) -> Any:
    return Path(value) if value is not None and (default is Path or isinstance(default, Path)) else value


def _modern(words: list[str], old: Mapping[str, str], schemas: Mapping[str, dict]) -> list[str]:
    """`words` with old spellings written as key=value; one note on stderr names what to write instead."""
    file, rest, changed = [], [], []
    waiting = iter(words)
    for word in waiting:
        name, equals, value = word.partition("=")
        if name not in old:
            rest.append(word)
            continue
        if not equals:
            is_flag = schemas.get(old[name], {}).get("type") == ["boolean"]
            value = "true" if is_flag else next(waiting, "")
        (file if old[name] == THE_FILE else changed).append(value if old[name] == THE_FILE else f"{old[name]}={value}")
    if not file and not changed:
        return words
    loose = [word for word in rest if "=" not in word]
    if file and A_WORD in old:
        changed += [f"{old[A_WORD]}={word}" for word in loose]
    else:
        file += loose
    words = [*file, *(word for word in rest if "=" in word), *changed]
    print(f"This spelling is deprecated; write: {shlex.join([Path(sys.argv[0]).name, *words])}", file=sys.stderr)
    return words
