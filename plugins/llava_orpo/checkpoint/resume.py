"""Full and freeze tuning: whole models saved by the trainer in the published names, and read back to resume."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import UserError
from .files import resolve_model_dir
from .published import LM_HEAD, check_folder, published_name, published_names, save_published


def save_into(model, folder: str | Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes a LlavaNextForConditionalGeneration (or its gathered state_dict) into a folder that may hold other files.

    Published tensor names in the dtype of the base checkpoint's config; the base's own processor files. The weights
    are written beside and moved in at the end. Raises CheckpointError (see `published.save_published`).
    """
    folder = Path(folder)
    base = resolve_model_dir(model.config._name_or_path)
    source = model if state_dict is None else state_dict
    staged = folder / ".weights"
    if staged.exists():
        shutil.rmtree(staged)  # left by an interrupted save
    save_published(source, staged, base, dtype=_base_dtype(model))
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    for file in sorted(staged.iterdir()):
        target = folder / file.name
        if target.is_dir():
            shutil.rmtree(target)
        file.replace(target)
    staged.rmdir()


def _base_dtype(model) -> torch.dtype:
    """The dtype the base checkpoint is stored in: training keeps some weights in fp32 that need not be saved so."""
    dtype = getattr(model.config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@torch.no_grad()
def load_into(model, folder: str | Path) -> None:
    """Reads a folder in published names (or transformers' own) into a model in memory, every tensor or an error."""
    table = check_folder(folder)
    own = model.state_dict()
    names = published_names(own)
    missing = set(names)
    for file in sorted({entry[2] for entry in table.values()}):
        with safe_open(Path(folder) / file, "pt") as weights:
            for name in weights.keys():
                published = published_name(name)
                own[names[published]].copy_(weights.get_tensor(name))
                missing.discard(published)
    missing.discard(LM_HEAD if model.config.tie_word_embeddings else "")
    if missing:
        raise UserError(f"{folder} lacks {sorted(missing)[:5]}: not a whole checkpoint of this model.")
