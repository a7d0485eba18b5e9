"""A name of what was scored, so that saved scores are taken for the same model on the same pairs alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import scoring

FROM_RECIPE = (
    "model_name_or_path",
    "adapter_name_or_path",
    "quantization_bit",
    "eval_dataset",
    "cutoff_len",
    "dataset_filter",
    "heldout_fraction",
    "anyres_max_tiles",
    "template",
    "max_samples",
    "bf16",
    "fp16",
    "quantize_vision",
    "quantization_type",
    "quantization_method",
    "double_quantization",
    "infer_dtype",
)
ROW_KEYS = ("image_hash", "num_image_tokens", "prompt_ids", "chosen_ids", "rejected_ids")  # what a score depends on


def fingerprint(recipe: Mapping[str, Any], rows) -> str:
    """A name of model, adapter files, tokenized pairs and every key that changes a score."""
    parts: dict[str, Any] = {key: recipe.get(key) for key in FROM_RECIPE}
    for key in ("model_name_or_path", "adapter_name_or_path"):
        root = Path(str(parts[key]))
        if root.is_dir():
            weights = sorted(root.glob("*.safetensors"))
            parts[key + "/files"] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights]
    parts["rows"] = rows_digest(rows)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rows_digest(rows) -> str:
    """A name of tokenized pairs: everything of them that an answer or a score depends on."""
    found = hashlib.sha256()
    for row, name in zip(rows.select_columns(list(ROW_KEYS)), scoring.unique_ids(rows), strict=True):
        found.update(json.dumps([name, *row.values()]).encode())
    return found.hexdigest()
