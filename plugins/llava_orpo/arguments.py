"""Every key the plugin adds to a recipe, in one place."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from .autoload import PLUGIN_NAME


@dataclass
class PluginArguments:
    """Keys a recipe may hold beside LLaMA-Factory's own once it says `plugins: llava_orpo`."""

    plugins: str = field(default=PLUGIN_NAME, metadata={"help": "Plugin to load: llava_orpo."})
    allow_untested_llamafactory: bool = field(
        default=False,
        metadata={"help": "Run on a LLaMA-Factory version other than the one this plugin was tested with."},
    )

    # data
    # A mapping in YAML; JSON text on a plain command line (argparse knows no mappings).
    dataset_filter: str | None = field(
        default=None,
        metadata={
            "help": "Rows to keep: a mapping from a column, or from a field inside origin_split, to one value "
            "or a list of values, e.g. {origin_dataset: [COCO, VQA v2], origin_split: {type: detailed "
            "description}}. Compared without regard to case and punctuation; all conditions must hold."
        },
    )
    heldout_fraction: float = field(
        default=0.02,
        metadata={
            "help": "Share of images (not rows) in the held-out part of a dataset registered with a `part`. "
            "Chosen by a hash of the image's bytes: deterministic, and no image is in both parts."
        },
    )
    verify_images: str = field(
        default="header",
        metadata={
            "help": "header: read every image's header and end marker before training (fast; finds truncated "
            "files); full: decode every image once (slow, finds all damage). Bad images are skipped and listed."
        },
    )
    allow_text_only: bool = field(
        default=False, metadata={"help": "Keep rows without an image as text-only pairs instead of skipping them."}
    )
    max_skipped_fraction: float = field(
        default=0.05,
        metadata={"help": "Stop before training when more than this share of the pairs would be skipped."},
    )

    # model
    anyres_max_tiles: int | None = field(
        default=None,
        metadata={
            "help": "Most anyres tiles an image may be cut into, the overview tile not counted (LLaVA-1.6: up to "
            "4). Fewer tiles mean fewer tokens and less detail. Must be the same in training and in use."
        },
    )
    quantize_vision: bool = field(
        default=False,
        metadata={"help": "Also quantize the vision tower and the projector (they stay in 16 bit otherwise)."},
    )

    overwrite_export_dir: bool = field(
        default=False, metadata={"help": "Let `llamafactory-cli export` replace an export_dir that holds files."}
    )

    # training step
    shared_prefix: bool = field(
        default=True,
        metadata={"help": "Run image and prompt once per pair. False: LLaMA-Factory's own two-sequence step."},
    )
    attention_backend: str = field(
        default="auto", metadata={"help": "Attention under shared_prefix: auto, sdpa or flex."}
    )
    group_pairs_by_image: bool = field(
        default=False,
        metadata={"help": "Put pairs of one image into the same batch and run the image once for all of them."},
    )
    max_pairs_per_image: int = field(
        default=4, metadata={"help": "Most pairs of one image in a row under group_pairs_by_image."}
    )

    # evaluation
    preference_eval: bool = field(
        default=True,
        metadata={"help": "Score every held-out pair exactly at each evaluation and write preference_eval.json."},
    )
    grounding_eval: bool = field(
        default=False,
        metadata={"help": "Also score with a grey image and with another row's image (three times the cost)."},
    )
    eval_min_subset: int = field(
        default=20, metadata={"help": "Fewest pairs for which a subset gets numbers of its own."}
    )
    eval_examples: int = field(
        default=48, metadata={"help": "Held-out pairs kept with their image for the report and the W&B table."}
    )

    def __post_init__(self):
        if self.plugins != PLUGIN_NAME:
            raise ValueError(f"plugins: {self.plugins!r} is not known; did you mean `plugins: {PLUGIN_NAME}`?")
        if isinstance(self.dataset_filter, str):
            try:
                self.dataset_filter = json.loads(self.dataset_filter)
            except json.JSONDecodeError as err:
                raise ValueError(
                    f"dataset_filter: {self.dataset_filter!r} is neither a YAML mapping nor JSON ({err})."
                ) from None
        if self.dataset_filter is not None and not isinstance(self.dataset_filter, dict):
            raise ValueError("dataset_filter must map columns to values, e.g. {origin_dataset: COCO}.")
        _check(0.0 < self.heldout_fraction < 1.0, "heldout_fraction", self.heldout_fraction, "between 0 and 1")
        _check(self.verify_images in ("header", "full"), "verify_images", self.verify_images, "header or full")
        _check(0.0 <= self.max_skipped_fraction <= 1.0, "max_skipped_fraction", self.max_skipped_fraction, "0 to 1")
        _check(
            self.attention_backend in ("auto", "sdpa", "flex"),
            "attention_backend", self.attention_backend, "auto, sdpa or flex",
        )  # fmt: skip
        _check(self.max_pairs_per_image >= 1, "max_pairs_per_image", self.max_pairs_per_image, "1 or more")
        _check(
            self.anyres_max_tiles is None or self.anyres_max_tiles >= 1,
            "anyres_max_tiles", self.anyres_max_tiles, "1 or more, or left out",
        )  # fmt: skip


def _check(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}: {value!r} is not allowed; it must be {allowed}.")


PLUGIN_KEYS = tuple(f.name for f in dataclasses.fields(PluginArguments))


def split_keys(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a recipe into (the plugin's keys, everything else)."""
    ours = {key: value for key, value in args.items() if key in PLUGIN_KEYS}
    return ours, {key: value for key, value in args.items() if key not in ours}


def refuse_unknown_keys(keys: list[str], known: set[str]) -> None:
    """Raises ValueError for keys that nobody knows, naming the nearest valid key of each."""
    known = known | set(PLUGIN_KEYS)
    complaints = []
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
        complaints.append(f"`{key}`" + (f" (did you mean `{near[0]}`?)" if near else ""))
    if complaints:
        raise ValueError("Unknown key in the recipe: " + ", ".join(complaints) + ".")
