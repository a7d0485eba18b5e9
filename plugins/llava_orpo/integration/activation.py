"""Activates the plugin for a recipe with `plugins: llava_orpo`: its keys, the version, registrations, swapped names."""

from __future__ import annotations

import importlib
import os
import sys

import llamafactory.data.converter as lf_converter
import llamafactory.data.mm_plugin as lf_mm_plugin
import llamafactory.data.template as lf_template
from llamafactory.extras import logging
from llamafactory.extras.env import VERSION
from transformers import HfArgumentParser

from .. import arguments as plugin_arguments
from .. import keys, loss_keys, precheck, upstream
from ..arguments import PluginArguments
from ..data.mm_plugin import LlavaOrpoPlugin
from ..data.rlaif_v import RlaifVConverter
from ..data.template import exact_templates
from ..errors import UserError
from .run import Run, start
from .swaps import API_MODULE, API_SWAPS, SWAPS

TESTED_LLAMAFACTORY = "0.9.5"
MM_PLUGIN = "llava_orpo"
logger = logging.get_logger("llamafactory." + __name__)


def take_arguments(parser: HfArgumentParser, args, allow_extra_keys: bool):
    """Takes the plugin's keys out of a recipe (a dict, or a command line), activates the plugin, returns the rest.

    Raises UserError for unknown keys (the nearest valid key is named), for values that are not allowed, and for
    a LLaMA-Factory version other than the tested one, and for `trust_remote_code: true`.
    """
    if isinstance(args, dict):
        ours, rest = plugin_arguments.split_keys(args)
        parsed = PluginArguments(**ours)
        if not allow_extra_keys:
            known = {name for dtype in parser.dataclass_types for name in dtype.__dataclass_fields__}
            plugin_arguments.refuse_unknown_keys(list(rest), known)
        project, remote_code = rest.get("project"), rest.get("trust_remote_code")
        checkpoint = rest.get("resume_from_checkpoint")
    else:
        ours = HfArgumentParser(PluginArguments, allow_abbrev=False)  # --dataset is not short for --dataset_filter
        parsed, rest = ours.parse_args_into_dataclasses(args=args, return_remaining_strings=True)
        following = dict(zip(rest, [*rest[1:], ""], strict=True))
        project, checkpoint = following.get("--project"), following.get("--resume_from_checkpoint")
        remote_code = following.get("--trust_remote_code", "false").lower() not in keys.TRUTH_WORDS[False]
        remote_code |= "--trust_remote_code=true" in map(str.lower, rest)
    if remote_code:  # the model's folder would run its code as soon as its config is read
        raise UserError(precheck.REMOTE_CODE)
    check_version(parsed)
    if other := upstream.other_versions():
        logger.warning_rank0(f"{other} requirements.txt has the versions that were run together.")
    rest = with_pref_loss(parsed, args, rest)
    run = activate(parsed)
    run.recipe = dict(args) if isinstance(args, dict) else None
    run.resumes_named = isinstance(checkpoint, str) and checkpoint.lower() != "true"
    if project:  # transformers' own `project` key reaches Trackio only
        run.set_default("WANDB_PROJECT", str(project))
    listen_locally(run)
    return rest


def with_pref_loss(parsed: PluginArguments, args, rest):
    """What is left of a recipe or a command line, with the pref_loss that stands for `preference_loss`.

    LLaMA-Factory prepares the reference model, or none, by its own key. Raises UserError for keys of the loss that
    contradict each other.
    """
    if isinstance(args, dict):
        given = {key: value for key, value in args.items() if key != "pref_loss" or value is not None}
        rest = {key: value for key, value in rest.items() if key in given}
    else:
        names = [word[2:].partition("=")[0].replace("-", "_") for word in args if word.startswith("--")]
        given = {name: getattr(parsed, name) for name in names if name in plugin_arguments.PLUGIN_KEYS}
        given |= {name: _flag(rest, name) for name in ("pref_loss", "stage", "finetuning_type") if name in names}
    if given.get("do_train", True) and (problems := loss_keys.problems(given)):
        raise UserError(*problems)
    if parsed.preference_loss is None:
        return rest
    pref_loss = loss_keys.PREF_LOSS[parsed.preference_loss]
    return {**rest, "pref_loss": pref_loss} if isinstance(args, dict) else [*rest, f"--pref_loss={pref_loss}"]


def _flag(words: list[str], name: str) -> str | None:
    """The value of a flag of a command line."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        if key.replace("-", "_") == f"__{name}":
            return value if equals else following
    return None


def listen_locally(run: Run) -> None:
    """Lets `api` serve 127.0.0.1 unless API_HOST says otherwise (stock 0.9.5: every network interface).

    `webchat` reads GRADIO_SERVER_NAME before its recipe, so the plugin can only warn when it is not set.
    """
    run.set_default("API_HOST", "127.0.0.1")
    if "llamafactory.webui.interface" in sys.modules and "GRADIO_SERVER_NAME" not in os.environ:
        logger.warning_rank0(
            "webchat is about to listen on every network interface, without a password. "
            "Start it with GRADIO_SERVER_NAME=127.0.0.1 to keep it to this machine."
        )


def check_version(parsed: PluginArguments) -> None:
    """Raises UserError when LLaMA-Factory is not the version this package was written for."""
    if VERSION != TESTED_LLAMAFACTORY:
        message = (
            f"llava_orpo was written for llamafactory {TESTED_LLAMAFACTORY}, but {VERSION} is installed. "
            f"Install llamafactory=={TESTED_LLAMAFACTORY} (see requirements.txt)"
        )
        if not parsed.allow_untested_llamafactory:
            raise UserError(message + ", or set `allow_untested_llamafactory: true` to try anyway.")
        logger.warning_rank0(message + "; continuing because of `allow_untested_llamafactory`.")


def activate(parsed: PluginArguments) -> Run:
    """Registers templates, converter and mm plugin (once per process), swaps the names of `SWAPS`; returns the run."""
    register()
    run = Run(parsed, shared_prefix=parsed.shared_prefix)
    start(run)
    for module_name, attribute, make in (*SWAPS, *(API_SWAPS if API_MODULE in sys.modules else ())):
        module = importlib.import_module(module_name)
        original = getattr(module, attribute)
        run.originals.append((module, attribute, original))
        setattr(module, attribute, make(original))
    return run


def register() -> None:
    """Uses the official extension points: register_mm_plugin, register_dataset_converter, register_template."""
    if MM_PLUGIN in lf_mm_plugin.PLUGINS:
        return
    lf_mm_plugin.register_mm_plugin(MM_PLUGIN, LlavaOrpoPlugin)
    lf_converter.register_dataset_converter("rlaif_v", RlaifVConverter)
    for name, template_class in exact_templates().items():
        lf_template.register_template(
            name=name,
            mm_plugin=lf_mm_plugin.get_mm_plugin(name=MM_PLUGIN, image_token="<image>"),
            template_class=template_class,
        )
