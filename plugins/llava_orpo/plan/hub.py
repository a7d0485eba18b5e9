"""Where a repository of the Hugging Face Hub can be had from: one quick question, nothing large downloaded."""

from __future__ import annotations

import os

CACHED, ONLINE, ABSENT, UNREACHED = "cached", "online", "absent", "unreached"
TIMEOUT = 5.0  # seconds


def find(repository: str, kind: str = "model") -> str:
    """CACHED (in this machine's Hub cache), ONLINE, ABSENT (the Hub says so, or it is gated) or UNREACHED.

    kind: model or dataset. A cached model is one whose config.json is here; a cached dataset one with any file.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if kind == "model" and isinstance(try_to_load_from_cache(repository, "config.json"), str):
            return CACHED
        folder = os.path.join(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "snapshots")
        if kind == "dataset" and os.path.isdir(folder) and any(files for _, _, files in os.walk(folder)):
            return CACHED
        if constants.HF_HUB_OFFLINE:
            return UNREACHED
        HfApi().repo_info(repository, repo_type=kind, timeout=TIMEOUT)
        return ONLINE
    except (RepositoryNotFoundError, HFValidationError):
        return ABSENT
    except Exception:  # no network, a proxy's page, a server error: whatever it is, the Hub gave no answer
        return UNREACHED
