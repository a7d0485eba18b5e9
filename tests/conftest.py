"""Shared by all tests: no network, no W&B login, warnings only, the same hypothesis examples every time."""

import os

from hypothesis import settings

from helpers import drawn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

settings.load_profile("explore" if drawn.EXPLORING else "repeatable")


def pytest_collection_modifyitems(items):
    """Long tests first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
