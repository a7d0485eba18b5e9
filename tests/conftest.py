"""Shared by all tests: no network, no W&B login, warnings only, the same hypothesis examples every time."""

import os

from hypothesis import settings

from helpers import drawn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

settings.load_profile("explore" if drawn.EXPLORING else "repeatable")
