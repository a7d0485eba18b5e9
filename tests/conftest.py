"""Shared by all tests: no network, no W&B login, warnings only."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
