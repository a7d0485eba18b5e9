"""The first two seconds of `llamafactory-cli`: help and refusals before LLaMA-Factory is imported.

Only what would end in an error later is refused, and keys and values are checked only in a recipe that says
`plugins: llava_orpo`. Whatever passes here is read again by LLaMA-Factory as usual.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from . import PLUGIN_NAME, keys, launcher, precheck, recipe
from .errors import UsageError, hide_tracebacks_of_foreseen_errors, stop

PURPOSES = {
    "train": "train a model",
    "export": "merge an adapter into its model and write a checkpoint",
    "chat": "talk to a model in the terminal",
    "webchat": "talk to a model in the browser",
    "api": "serve a model through an OpenAI-compatible API",
}
PLUGIN_KEYS = "PluginArguments"  # the class of the plugin's keys in the schema
JSON_SUFFIX = ".json"  # LLaMA-Factory reads such recipes too; they are not checked here


def before_llamafactory(words: Sequence[str]) -> None:
    """Answers -h and refuses a recipe with problems, given the words behind `llamafactory-cli`.

    Raises SystemExit with code 0 after the help and with code 2 after the problems; UsageError in its place under
    LLAVA_ORPO_DEBUG. Otherwise returns, and the tracebacks of later foreseen errors are hidden if the plugin is used.
    """
    if not words or words[0] not in PURPOSES:
        return
    command, rest = words[0], words[1:]
    if any(word in recipe.HELP for word in rest):
        print(usage(command))
        raise SystemExit(0)
    try:
        uses_plugin = check(command, rest)
    except UsageError as error:
        stop(error)
    if uses_plugin:
        hide_tracebacks_of_foreseen_errors()
        if command == "train":
            launcher.prepare()


def check(command: str, words: Sequence[str]) -> bool:
    """Whether the command line uses the plugin. Raises UsageError with one sentence per problem."""
    if not words:
        raise UsageError(f"`{command}` needs a recipe: llamafactory-cli {command} recipe.yaml key=value …")
    first, overrides = words[0], words[1:]
    if first.startswith("-"):
        return keys.names_a_plugin(list(words))
    if not first.endswith(recipe.SUFFIXES):
        if first.endswith(JSON_SUFFIX):
            return False
        raise UsageError(f"{first} is not a recipe: its name must end in {' or '.join(recipe.SUFFIXES)}.")
    keys_given = recipe.load(first, overrides)
    if not keys.names_a_plugin(keys_given):
        _refuse_a_forgotten_plugin(keys_given)
        return False
    meant = recipe.as_meant(keys_given)
    problems = recipe.check_overrides(overrides)
    words_alone = {word for word in overrides if "=" not in word}  # read as keys without a value
    problems += precheck.problems({key: value for key, value in meant.items() if key not in words_alone}, command)
    if problems:
        raise UsageError(*problems)
    return True


def usage(command: str) -> str:
    """The help of one command, on one page."""
    ours = ", ".join(key for key, schema in keys.known().items() if schema["$comment"] == PLUGIN_KEYS)
    ours = textwrap.fill(f"With `plugins: {PLUGIN_NAME}` in the recipe it may also hold: {ours}.", 100)
    return f"""usage: llamafactory-cli {command} recipe.yaml [key=value …]

To {PURPOSES[command]}. Every key of the recipe can be given or changed behind it: learning_rate=1e-5

{ours}
docs/keys.md explains these; every key, LLaMA-Factory's included, is described with its type and default in
{keys.place()}
The recipes in recipes/ say what they need, what they write and what comes next.

LLAVA_ORPO_DEBUG=1 shows the traceback of every error."""


def _refuse_a_forgotten_plugin(given: dict) -> None:
    """Refuses what LLaMA-Factory would refuse later: `plugins` misspelt, or forgotten beside the plugin's keys."""
    if precheck.extra_keys_are_allowed():
        return
    for key, value in given.items():
        if value == PLUGIN_NAME and key not in keys.known():
            raise UsageError(f"Unknown key `{key}` (did you mean `plugins`?).")
        if keys.known().get(key, {}).get("$comment") == PLUGIN_KEYS and key != "plugins":
            raise UsageError(f"`{key}` is a key of the plugin: add `plugins: {PLUGIN_NAME}` to the recipe.")
