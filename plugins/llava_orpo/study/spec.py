"""Study files: how they are read and checked, and the runs they ask for. Imports nothing heavy.

recipe: recipes/tiny/llava16_orpo_qlora.yaml
base: {num_train_epochs: 1}               # keys of every run
grid: {pref_beta: [0.3, 1.0]}             # keys to lists, crossed fully
variants: {rank8: {lora_rank: 8}}         # names to keys, crossed with the grid
search: {learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}}  # in place of grid and variants
trials: 20                                # of the search
metric: accuracy                          # that the search optimizes
direction: maximize
seeds: [0, 1, 2]
after: ["python evals/preference.py {recipe} {overrides} output_dir={output_dir}/all"]
metrics: {accuracy: "preference_eval.json:history.-1.metrics.preference_accuracy"}
seconds_per_run: 40                       # an estimate, used until the first run has finished
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import keys, precheck
from ..errors import UsageError
from ..recipe import as_meant, load

OUTPUTS, RESULTS = Path("outputs/studies"), Path("studies/results")
NEEDED = ("recipe", "metrics")
DEFAULTS: dict[str, Any] = {
    "recipe": None,
    "base": {},
    "grid": {},
    "variants": {},
    "search": {},
    "trials": 20,
    "metric": None,
    "direction": "maximize",
    "seeds": [0, 1, 2],
    "after": [],
    "metrics": None,
    "seconds_per_run": None,
}
# Keys of the recipe that the runner sets itself, and what to write in their place.
RESERVED = {
    "seed": "name the seeds under `seeds`",
    "output_dir": "every run gets a folder of its own",
    "overwrite_output_dir": "an interrupted run must resume",
    "resume_from_checkpoint": "an interrupted run resumes by itself",
}
PLACEHOLDERS = ("recipe", "output_dir", "seed", "run", "overrides")
VARIANT = "variant"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
LONGEST_VALUE = 32  # characters of a value in the name of a run


@dataclass(frozen=True)
class Metric:
    """A number in a JSON file of a run's folder. `path`: keys and list indices joined by dots, `history.-1.loss`."""

    name: str
    file: str
    path: str

    def __str__(self) -> str:
        return f"{self.file}:{self.path}"


@dataclass(frozen=True)
class Setting:
    """A row of the study's table, trained once per seed. `values`: what is varied; `overrides`: keys of the recipe."""

    name: str
    values: dict[str, Any]
    overrides: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: a setting with one seed.

    command, after  words of the training's command and of those that follow it, as a user would type them
    mark            a digest of the recipe with its overrides and of `after`: a finished run with it is not repeated
    """

    name: str
    setting: Setting
    seed: int
    output_dir: Path
    command: tuple[str, ...]
    after: tuple[tuple[str, ...], ...]
    mark: str


@dataclass(frozen=True)
class Study:
    """A study file that was checked. `name` is the file's stem; `keys` the recipe's own keys, without overrides."""

    name: str
    file: Path
    recipe: str
    keys: dict[str, Any]
    base: dict[str, Any]
    grid: dict[str, list[Any]]
    variants: dict[str, dict[str, Any]]
    search: dict[str, dict[str, Any]]
    trials: int
    metric: str | None
    direction: str
    seeds: tuple[int, ...]
    after: tuple[tuple[str, ...], ...]
    metrics: tuple[Metric, ...]
    seconds_per_run: float | None

    @property
    def outputs(self) -> Path:
        """Folder of the runs' own folders and logs."""
        return OUTPUTS / self.name

    @property
    def results(self) -> Path:
        """Folder of the runs' results, the table and the plot."""
        return RESULTS / self.name

    def settings(self) -> list[Setting]:
        """Variants crossed with the grid; [] for a search, whose settings Optuna chooses."""
        if self.search:
            return []
        names = list(self.grid)
        variants = self.variants or {None: {}}
        out = []
        for variant, overrides in variants.items():
            for values in itertools.product(*self.grid.values()):
                cell = dict(zip(names, values, strict=True))
                label = {} if variant is None else {VARIANT: variant}
                out.append(setting({**label, **cell}, {**overrides, **cell}))
        return out

    def runs(self, settings: Sequence[Setting] | None = None) -> list[Run]:
        """The runs of `settings` (default: all of them), in the order in which they are started."""
        settings = self.settings() if settings is None else settings
        return [self.run(one, seed) for one in settings for seed in self.seeds]

    def run(self, one: Setting, seed: int) -> Run:
        """The run of a setting with one seed."""
        name = f"{one.name}-seed{seed}" if one.name else f"seed{seed}"
        folder = self.outputs / name
        given = {**self.base, **one.overrides, "seed": seed, "output_dir": str(folder), "overwrite_output_dir": False}
        words = tuple(f"{key}={as_word(value)}" for key, value in given.items())
        filled = {"recipe": self.recipe, "output_dir": str(folder), "seed": str(seed), "run": name}
        after = tuple(tuple(_filled(command, filled, words)) for command in self.after)
        marked = json.dumps([{**self.keys, **given}, after], sort_keys=True)
        mark = hashlib.sha256(marked.encode()).hexdigest()[:16]
        return Run(name, one, seed, folder, ("llamafactory-cli", "train", self.recipe, *words), after, mark)

    def trial(self, number: int, values: Mapping[str, Any]) -> Setting:
        """The setting of a search's trial."""
        return Setting(f"trial-{number:03d}", dict(values), dict(values))


def setting(values: dict[str, Any], overrides: dict[str, Any]) -> Setting:
    """A setting named after its values: `orpo-max_samples-100`."""
    parts = [value if key == VARIANT else f"{key}-{_slug(text(key, value))}" for key, value in values.items()]
    return Setting("-".join(parts), values, overrides)


def as_word(value: Any) -> str:
    """`value` so that `key=value` on a command line gives it back."""
    from omegaconf import OmegaConf

    if isinstance(value, str):
        try:
            if value and OmegaConf.to_container(OmegaConf.from_cli([f"x={value}"])) == {"x": value}:
                return value
        except Exception:  # a text that is no YAML
            pass
    return json.dumps(value, ensure_ascii=False)


def text(key: str, value: Any) -> str:
    """A value as tables, plots and folders show it."""
    return "all" if key == "max_samples" and value is None else as_word(value)


def read(file: Path, content: Mapping[str, Any]) -> Study:
    """The study in `content`, which was read from `file`.

    Raises UsageError with one sentence per problem, each naming the file and the key.
    """
    problems = [keys.unknown(str(key), DEFAULTS) for key in content if key not in DEFAULTS]
    problems += [f"{key} is missing." for key in NEEDED if not content.get(key)]
    given = {**DEFAULTS, **{key: value for key, value in content.items() if value is not None}}
    problems += _shape_problems(given)
    if _NAME.fullmatch(file.stem) is None:
        problems.append(f"the file's name {file.stem!r} becomes a folder: letters, digits and . _ + - alone, please.")
    _refuse(file, problems)
    try:
        recipe = load(given["recipe"])
    except UsageError as error:
        raise UsageError(*(f"{file}: recipe: {problem}" for problem in error.args)) from None
    study = Study(
        name=file.stem,
        file=file,
        recipe=str(given["recipe"]),
        keys=as_meant(recipe),
        base=as_meant(given["base"]),
        grid={key: [as_meant({key: value})[key] for value in values] for key, values in given["grid"].items()},
        variants={str(name): as_meant(overrides or {}) for name, overrides in given["variants"].items()},
        search=given["search"],
        trials=given["trials"],
        metric=given["metric"],
        direction=given["direction"],
        seeds=tuple(given["seeds"]),
        after=tuple(tuple(shlex.split(command)) for command in given["after"]),
        metrics=tuple(Metric(name, *_split(text)) for name, text in given["metrics"].items()),
        seconds_per_run=given["seconds_per_run"],
    )
    _refuse(file, list(dict.fromkeys(_key_problems(study) + _name_problems(study))))
    _refuse(file, _recipe_problems(study))
    return study


def _refuse(file: Path, problems: Sequence[str]) -> None:
    if problems:
        raise UsageError(*(f"{file}: {problem}" for problem in problems))


def _shape_problems(given: Mapping[str, Any]) -> list[str]:
    """What is not the mapping, list, number or word that it should be, before anything is looked up."""
    found = []
    for key, kind, words in (
        ("recipe", str, "the path of a recipe"),
        ("base", dict, "a mapping of a recipe's keys to values"),
        ("grid", dict, "a mapping of a recipe's keys to lists"),
        ("variants", dict, "a mapping of names to mappings of a recipe's keys"),
        ("search", dict, "a mapping of a recipe's keys to {low, high, log} or {choices}"),
        ("seeds", list, "a list of whole numbers"),
        ("after", list, "a list of commands"),
        ("metrics", dict, "a mapping of names to `file.json:key.key`"),
    ):
        if given[key] is not None and not isinstance(given[key], kind):
            found.append(f"{key}: {keys.shown(given[key])} must be {words}.")
    if found:
        return found
    for key, values in given["grid"].items():
        if not isinstance(values, list) or not values:
            found.append(f"grid.{key}: {keys.shown(values)} must be a list of at least one value.")
        else:
            texts = [json.dumps(value, sort_keys=True) for value in values]
            found += [
                f"grid.{key}: {text} is there twice." for text in sorted({t for t in texts if texts.count(t) > 1})
            ]
    for name, overrides in given["variants"].items():
        if overrides is not None and not isinstance(overrides, dict):
            found.append(f"variants.{name}: {keys.shown(overrides)} must be a mapping of a recipe's keys.")
        if _NAME.fullmatch(str(name)) is None:
            found.append(f"variants.{name}: a name becomes a folder: letters, digits and . _ + - alone, please.")
    seeds = given["seeds"]
    if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds):
        found.append(f"seeds: {keys.shown(seeds)} must be a list of whole numbers, 0 or more.")
    elif len(set(seeds)) < len(seeds):
        found.append(f"seeds: {keys.shown(seeds)} names one twice.")
    for command in given["after"]:
        found += _command_problems(command)
    for name, text in (given["metrics"] or {}).items():
        if not isinstance(text, str) or not all(_split(text)):
            found.append(f"metrics.{name}: {keys.shown(text)} must be `file.json:key.key`.")
    estimate = given["seconds_per_run"]
    if estimate is not None and (isinstance(estimate, bool) or not isinstance(estimate, int | float) or estimate <= 0):
        found.append(f"seconds_per_run: {keys.shown(estimate)} must be a number of seconds.")
    return found + (_search_problems(given) if given["search"] else [])


def _command_problems(command: Any) -> list[str]:
    if not isinstance(command, str) or not command.strip():
        return [f"after: {keys.shown(command)} must be a command."]
    try:
        shlex.split(command)
    except ValueError as error:
        return [f"after: `{command}` cannot be read ({error})."]
    return [
        f"after: {{{name}}} in `{command}` is none of {', '.join(f'{{{one}}}' for one in PLACEHOLDERS)}."
        for name in _PLACEHOLDER.findall(command)
        if name not in PLACEHOLDERS
    ]


def _search_problems(given: Mapping[str, Any]) -> list[str]:
    found = [f"{key} and search exclude each other." for key in ("grid", "variants") if given[key]]
    if isinstance(given["trials"], bool) or not isinstance(given["trials"], int) or given["trials"] < 1:
        found.append(f"trials: {keys.shown(given['trials'])} must be a whole number, 1 or more.")
    if given["direction"] not in ("maximize", "minimize"):
        found.append(f"direction: {keys.shown(given['direction'])} must be maximize or minimize.")
    if given["metric"] not in (given["metrics"] or {}):
        found.append(f"metric: {keys.shown(given['metric'])} must be one of the metrics, which the search optimizes.")
    for key, space in given["search"].items():
        where = f"search.{key}: {keys.shown(space)}"
        if not isinstance(space, dict) or not set(space) <= {"low", "high", "log", "choices"}:
            found.append(f"{where} must be {{low, high, log}} or {{choices}}.")
        elif "choices" in space:
            if not isinstance(space["choices"], list) or not space["choices"] or len(space) > 1:
                found.append(f"{where}: choices must be a list, and stand alone.")
        elif not all(isinstance(space.get(end), int | float) for end in ("low", "high")):
            found.append(f"{where}: low and high must be numbers (1.0e-4, with a dot).")
        elif space["low"] >= space["high"]:
            found.append(f"{where}: low must be less than high.")
        elif space.get("log") and space["low"] <= 0:
            found.append(f"{where}: with log, low must be more than 0.")
    return found


def _key_problems(study: Study) -> list[str]:
    """Keys that a recipe does not know, values that they do not take, and keys that the runner sets itself."""
    found = []
    for where, key, value in _named_values(study):
        if key in RESERVED:
            found.append(f"{where}: the runner sets `{key}`; {RESERVED[key]}.")
        elif keys.is_secret(key) and value:
            found.append(f"{where}: a secret would be written into every result; set it as a variable.")
        elif key not in keys.known():
            if not precheck.extra_keys_are_allowed():
                found.append(f"{where}: {keys.unknown(key, keys.known())}")
        elif wrong := keys.problem(key, value, keys.known()[key]):
            found.append(f"{where}: {wrong}")
    for key in study.grid:
        found += [
            f"grid.{key} and variants.{name} both set it." for name in study.variants if key in study.variants[name]
        ]
    return found


def _named_values(study: Study) -> Iterator[tuple[str, str, Any]]:
    for key, value in study.base.items():
        yield f"base.{key}", key, value
    for key, values in study.grid.items():
        for value in values:
            yield f"grid.{key}", key, value
    for name, overrides in study.variants.items():
        for key, value in overrides.items():
            yield f"variants.{name}.{key}", key, value
    for key, space in study.search.items():
        for value in space.get("choices", [space.get("low"), space.get("high")]):
            yield f"search.{key}", key, value


def _name_problems(study: Study) -> list[str]:
    """Two settings with the same keys, or with the same name."""
    found, by_keys, by_name = [], {}, {}
    for one in study.settings():
        same = by_keys.setdefault(json.dumps(one.overrides, sort_keys=True), one)
        if same is not one:
            found.append(f"{same.name} and {one.name} are the same run.")
        elif by_name.setdefault(one.name, one) is not one:
            found.append(f"two settings are named {one.name}; name them as variants.")
    return found


def _recipe_problems(study: Study) -> list[str]:
    """What `llamafactory-cli train` would refuse of each setting before it starts, named once."""
    found: dict[str, str] = {}
    for one in study.settings() or [Setting("", {}, {})]:
        folder = str(study.outputs / "run")
        whole = as_meant({**study.keys, **study.base, **one.overrides, "output_dir": folder})
        for problem in precheck.problems(whole):
            found.setdefault(problem, one.name)
    return [f"{name}: {problem}" if name else problem for problem, name in found.items()]


def _split(text: str) -> tuple[str, str]:
    file, _, path = text.partition(":")
    return file.strip(), path.strip()


def _filled(command: Sequence[str], values: Mapping[str, str], overrides: Sequence[str]) -> list[str]:
    whole = {**values, "overrides": shlex.join(overrides)}
    words = [
        overrides if word == "{overrides}" else [_PLACEHOLDER.sub(lambda match: whole[match[1]], word)]
        for word in command
    ]
    return list(itertools.chain(*words))


def _slug(text: str) -> str:
    """The text of a value as part of a folder's name; what does not fit ends in a digest of the whole."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")
    if plain == text and len(text) <= LONGEST_VALUE:
        return text
    return f"{plain[:LONGEST_VALUE]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
