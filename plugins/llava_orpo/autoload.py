"""Lets `llamafactory-cli` see the `plugins:` key of a recipe.

LLaMA-Factory 0.9.5 has no plugin mechanism and refuses unknown keys. A one-line `.pth` file imports this module in
every interpreter of the environment (torchrun children and Ray workers included). The import only adds a
`sys.meta_path` finder, and no other module of the package adds one. The finder acts twice:

- before the package `llamafactory` is imported by its own command, `llava_orpo.early` reads the recipe, because
  importing the package alone takes seconds (it imports torch and transformers);
- when `llamafactory.hparams.parser` is loaded, its `_parse_args` is wrapped: a recipe with `plugins: llava_orpo` is
  handed to `llava_orpo.integration.activation`; any other recipe passes unchanged.

Nothing heavy is imported here: without LLaMA-Factory the cost is well under 2 ms per interpreter.
"""

import importlib.abc
import importlib.util
import os
import sys

PACKAGE = "llamafactory"
COMMANDS = ("llamafactory-cli", "lmf")
COMMAND_MODULE = "llamafactory.cli"
PARSER_MODULE = "llamafactory.hparams.parser"


class _WrappingLoader(importlib.abc.Loader):
    """Runs the real loader, then wraps `_parse_args` of the loaded module."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        wrap_parser(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self.checked = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname == PACKAGE and not self.checked and runs_the_command():
            self.checked = True
            from . import early

            early.before_llamafactory(sys.argv[1:])
        if fullname != PARSER_MODULE:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _WrappingLoader(spec.loader)
        return spec


def runs_the_command() -> bool:
    """Whether this process is LLaMA-Factory's command, started by a user (and not by torchrun)."""
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    as_module = name == "-m" and sys.orig_argv[-len(sys.argv)] == COMMAND_MODULE
    return (os.path.splitext(name)[0] in COMMANDS or as_module) and "LOCAL_RANK" not in os.environ


def wrap_parser(parser_module) -> None:
    """Wraps `_parse_args`, through which every command of LLaMA-Factory reads its arguments."""
    parse = parser_module._parse_args

    def parse_args(parser, args=None, allow_extra_keys=False):
        from . import keys

        args = parser_module.read_args(args)
        if not keys.names_a_plugin(args):
            run = sys.modules.get("llava_orpo.integration.run")
            if run is not None:
                run.deactivate()  # an earlier recipe of this process used the plugin, this one does not
            return parse(parser, args, allow_extra_keys=allow_extra_keys)

        from . import recipe
        from .integration import activation

        if isinstance(args, dict):
            args = recipe.as_meant(args)
        args = activation.take_arguments(parser, args, allow_extra_keys=allow_extra_keys)
        return parse(parser, args, allow_extra_keys=allow_extra_keys)

    parser_module._parse_args = parse_args


def install() -> None:
    """Adds the finder once; wraps the parser immediately if LLaMA-Factory is loaded already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        if PARSER_MODULE in sys.modules:
            wrap_parser(sys.modules[PARSER_MODULE])


install()
