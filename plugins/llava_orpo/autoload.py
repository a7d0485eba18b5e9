"""Lets `llamafactory-cli` see the `plugins:` key of a recipe.

LLaMA-Factory 0.9.5 has no plugin mechanism and refuses unknown keys. A one-line `.pth` file imports this
module in every interpreter of the environment (torchrun children and Ray workers included), which only
adds a `sys.meta_path` finder. When `llamafactory.hparams.parser` is loaded, its `_parse_args` is wrapped:
a recipe with `plugins: llava_orpo` is handed to `llava_orpo.integration`, any other recipe passes untouched.

Nothing heavy is imported here: without LLaMA-Factory the cost is well under 2 ms per interpreter.
"""

import importlib.abc
import importlib.util
import sys

PLUGIN_NAME = "llava_orpo"
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


class _ParserFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
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


def names_a_plugin(args) -> bool:
    """True when `args` (a mapping, or a command line as a list of strings) carries a `plugins` key."""
    if isinstance(args, dict):
        return args.get("plugins") is not None
    return any(arg == "--plugins" or arg.startswith("--plugins=") for arg in args)


def wrap_parser(parser_module) -> None:
    """Wraps `_parse_args`, the one place every LLaMA-Factory command reads its arguments through."""
    parse = parser_module._parse_args

    def parse_args(parser, args=None, allow_extra_keys=False):
        args = parser_module.read_args(args)
        if not names_a_plugin(args):
            run = sys.modules.get("llava_orpo.integration.run")
            if run is not None:
                run.deactivate()  # an earlier recipe of this process used the plugin, this one does not
            return parse(parser, args, allow_extra_keys=allow_extra_keys)

        from .integration import activation

        args = activation.take_arguments(parser, args, allow_extra_keys=allow_extra_keys)
        return parse(parser, args, allow_extra_keys=allow_extra_keys)

    parser_module._parse_args = parse_args


def install() -> None:
    """Adds the finder once; wraps the parser at once if LLaMA-Factory is loaded already."""
    if not any(isinstance(finder, _ParserFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ParserFinder())
        if PARSER_MODULE in sys.modules:
            wrap_parser(sys.modules[PARSER_MODULE])


install()
