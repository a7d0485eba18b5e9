"""LLaVA-ORPO: a thin LLaMA-Factory plugin for exact, cheap preference training of LLaVA-1.6 (LLaVA-NeXT).

Kept free of imports: `autoload` is imported by every interpreter of the environment (see its docstring).
"""

__version__ = "0.1.0"
PLUGIN_NAME = "llava_orpo"
