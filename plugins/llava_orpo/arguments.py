"""Every key the plugin adds to a recipe, in one place.

The values are checked where a recipe is read, by the types and ranges below; `schema.make` puts the same ones into
recipes/schema.json, and docs/keys.md is made from the help texts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, WithJsonSchema, field_validator
from pydantic.dataclasses import dataclass

from . import PLUGIN_NAME, keys
from .errors import UserError

# HfArgumentParser reads one type per key: the field is text, and `_read_recompute` takes numbers and checks both.
RECOMPUTE = {"anyOf": [{"type": "string", "enum": ["auto", "all", "none"]}, {"type": "integer", "minimum": 0}]}


def _refuse_in_sentences(arguments: type) -> type:
    """Makes the constructor raise UserError, one sentence per wrong key, in place of pydantic's ValidationError."""
    construct = arguments.__init__

    @functools.wraps(construct)
    def __init__(self, *args, **kwargs):
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            # Union members are reported one by one: one sentence per key is enough.
            found = {str(details["loc"][0]): details for details in reversed(error.errors())}
            raise UserError(*(_sentence(key, details) for key, details in reversed(found.items()))) from None

    arguments.__init__ = __init__
    return arguments


def _sentence(key: str, details: dict[str, Any]) -> str:
    if key not in PLUGIN_KEYS:
        return keys.unknown(key, PLUGIN_KEYS)
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    return keys.refusal(key, details["input"], key_schemas()[key])


@_refuse_in_sentences
@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class PluginArguments:
    """Keys a recipe may hold beside LLaMA-Factory's own once it says `plugins: llava_orpo`.

    Raises UserError with one sentence per key whose value is not allowed.
    """

    plugins: Literal[PLUGIN_NAME] = field(default=PLUGIN_NAME, metadata={"help": "Plugin to load: llava_orpo."})

    allow_untested_llamafactory: bool = field(
        default=False,
        metadata={"help": "Run on a LLaMA-Factory version other than the one this plugin was tested with."},
    )

    # data
    # A mapping in YAML; JSON text on a plain command line, because argparse knows no mappings.
    dataset_filter: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Rows to keep: a mapping from a column, or from a field inside origin_split, to one value "
            "or a list of values, e.g. {origin_dataset: [COCO, VQA v2], origin_split: {type: detailed "
            "description}}. Compared without regard to case and punctuation; all conditions must hold."
        },
    )
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = field(
        default=0.02,
        metadata={
            "help": "Share of images (not rows) in the held-out part of a dataset registered with a `part`. "
            "Chosen by a hash of the image's bytes: deterministic, and no image is in both parts."
        },
    )
    image_storage: Literal["arrow", "parquet"] = field(
        default="arrow",
        metadata={
            "help": "Where the images of datasets with `formatting: rlaif_v` are read from. arrow: from the Arrow copy "
            "that `datasets` makes of any kind of file; parquet: from the parquet files themselves, so that only the "
            "texts are copied. The pairs, their order and their tokens are the same."
        },
    )
    verify_images: Literal["header", "full"] = field(
        default="header",
        metadata={
            "help": "header: read every image's header and end marker before training (fast; finds truncated "
            "files); full: decode every image once (slow, finds all damage). Bad images are skipped and listed."
        },
    )
    allow_text_only: bool = field(
        default=False, metadata={"help": "Keep rows without an image as text-only pairs instead of skipping them."}
    )
    bad_rows: Literal["skip", "error"] = field(
        default="skip",
        metadata={
            "help": "skip: leave bad rows out and list them; error: stop at the first bad row, whether reading, "
            "tokenizing or decoding its image shows that it is bad."
        },
    )
    max_skipped_fraction: Annotated[float, Field(ge=0, le=1)] = field(
        default=0.05,
        metadata={"help": "Stop before training when more than this share of the pairs would be skipped."},
    )

    # model
    anyres_max_tiles: Annotated[int, Field(ge=1)] | None = field(
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

    # loss
    preference_loss: Literal["orpo", "simpo", "dpo", "mdpo", "dpo_context", "pea", "sft"] | None = field(
        default=None,
        metadata={
            "help": "orpo, simpo and dpo as LLaMA-Factory's pref_loss; mdpo: DPO with a damaged image (arXiv "
            "2406.11839); dpo_context: DPO behind a clean context, the data's column `context` (arXiv 2507.12455); "
            "pea: a hinge of mean log-probs (arXiv 2608.19598); sft: the chosen answer alone. null: as pref_loss says."
        },
    )
    text_margin: Annotated[float, Field(ge=0)] = field(
        default=1.5,
        metadata={"help": "Margin of preference_loss: pea, in nats per token between chosen and rejected answer."},
    )
    image_preference: Annotated[float, Field(ge=0)] = field(
        default=0.0,
        metadata={
            "help": "Weight of the image term, which is added to any loss but mdpo's own: the chosen answer under the "
            "true image against the same answer under a damaged one. 0: none, and no damaged image is run."
        },
    )
    image_preference_loss: Literal["odds_ratio", "hinge"] = field(
        default="odds_ratio",
        metadata={
            "help": "odds_ratio: ORPO's own term between the two images; hinge: relu(image_margin - margin) of the "
            "mean log-probs (mPEA-DPO, arXiv 2608.19598)."
        },
    )
    image_margin: Annotated[float, Field(ge=0)] = field(
        default=4.5,
        metadata={"help": "Margin of image_preference_loss: hinge, in nats per token between true and damaged image."},
    )
    damaged_image: Literal["masked", "crop", "grey", "noise", "other"] = field(
        default="masked",
        metadata={
            "help": "The damaged image. masked: three quarters of its patches are grey; crop: a random part of 1 to "
            "20 % of its area; grey: all of it; noise: random pixels; other: another row's image. Its size stays the "
            "true image's, and but for grey every epoch has another one."
        },
    )
    reference: Literal["adapter_off", "cached"] | None = field(
        default=None,
        metadata={
            "help": "The reference model of losses that have one. adapter_off: the model without its adapter, one more "
            "forward in each step; cached: its log-probs are computed once before training and kept in output_dir. "
            "null: adapter_off with LoRA, else a second model."
        },
    )

    # training step
    shared_prefix: bool = field(
        default=True,
        metadata={"help": "Run image and prompt once per pair. False: LLaMA-Factory's own two-sequence step."},
    )
    attention_backend: Literal["auto", "sdpa", "flex"] = field(
        default="auto", metadata={"help": "Attention under shared_prefix: auto, sdpa or flex."}
    )
    cudnn_attention: bool = field(
        default=False,
        metadata={
            "help": "Keep cuDNN's attention on H100, H200 and B200 under shared_prefix. It plans anew for every new "
            "shape, and nearly every batch has new shapes."
        },
    )
    group_pairs_by_image: bool = field(
        default=False,
        metadata={"help": "Put pairs of one image into the same batch and run the image once for all of them."},
    )
    max_pairs_per_image: Annotated[int, Field(ge=1)] = field(
        default=4, metadata={"help": "Most pairs of one image in a row under group_pairs_by_image."}
    )
    max_tokens_per_step: Annotated[int, Field(ge=1)] | None = field(
        default=None,
        metadata={
            "help": "Most tokens of one forward under shared_prefix. A micro-batch of more is cut between images, then "
            "between the pairs of an image, and its parts run one after the other with the same gradients. null: no "
            "limit but what `recompute: auto` finds on a GPU."
        },
    )

    recompute: Annotated[str, WithJsonSchema(RECOMPUTE)] = field(
        default="auto",
        metadata={
            "help": "Decoder layers that run their forward again in the backward pass instead of keeping their "
            "activations: all (least memory), none (fastest; the same as disable_gradient_checkpointing: true), or the "
            "first N. auto: as few as the GPU's memory allows, computed for the longest batch and tried before the "
            "first step; all without a GPU and under shared_prefix: false. Losses and gradients are the same."
        },
    )

    max_anomalies: Annotated[int, Field(ge=1)] = field(
        default=5,
        metadata={
            "help": "Stop after so many optimizer steps in a row with a non-finite loss or gradient. Each of them is "
            "skipped, and its pairs are listed in anomalies.jsonl."
        },
    )

    image_check: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, score the first batch as it is and with its images made grey, and up to "
            "four of its pairs by a plain forward with their own image; stop if the images do not reach the model, or "
            "reach other pairs. It costs these forwards, without gradients."
        },
    )
    # rounds of self-made pairs (scripts/rounds.py alone reads these)
    rounds: Annotated[int, Field(ge=1)] = field(
        default=2, metadata={"help": "How often scripts/rounds.py samples, pairs, trains and evaluates."}
    )
    round_reference: Literal["previous", "base"] = field(
        default="previous",
        metadata={
            "help": "Where a round of scripts/rounds.py trains from, and what its self-reward compares with. previous: "
            "training goes on with the last round's adapter, and the reward compares that adapter with the one before "
            "it. base: every round trains anew from where the recipe starts, on pairs of the last round's model, and "
            "the reward compares that model with the base model."
        },
    )
    make_pairs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keys of scripts/make_pairs.py for every round of scripts/rounds.py: {answers: 8, …}."},
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
    eval_min_subset: Annotated[int, Field(ge=1)] = field(
        default=20, metadata={"help": "Fewest pairs for which a subset gets numbers of its own."}
    )
    eval_examples: Annotated[int, Field(ge=0)] = field(
        default=48, metadata={"help": "Held-out pairs kept with their image for the report and the W&B table."}
    )

    @field_validator("dataset_filter", mode="before")
    @classmethod
    def _read_filter(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as err:
                raise ValueError(f"dataset_filter: {value!r} is neither a YAML mapping nor JSON ({err}).") from None
        if value is not None and not isinstance(value, dict):
            raise ValueError("dataset_filter must map columns to values, e.g. {origin_dataset: COCO}.")
        return value

    @field_validator("make_pairs", mode="before")
    @classmethod
    def _read_make_pairs(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as err:
                raise ValueError(f"make_pairs: {value!r} is neither a YAML mapping nor JSON ({err}).") from None
        if value is not None and not isinstance(value, dict):
            raise ValueError("make_pairs must map keys of scripts/make_pairs.py to values, e.g. {answers: 8}.")
        return value

    @field_validator("recompute", mode="before")
    @classmethod
    def _read_recompute(cls, value: Any) -> str:
        number = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if value not in ("auto", "all", "none") and not number.isdecimal():
            raise ValueError(keys.refusal("recompute", value, key_schemas()["recompute"]))
        return number


PLUGIN_KEYS = tuple(f.name for f in dataclasses.fields(PluginArguments))


@functools.cache
def key_schemas() -> dict[str, dict[str, Any]]:
    """{key: JSON Schema of its values} of the plugin's keys, without description and default."""
    made = TypeAdapter(PluginArguments).json_schema()["properties"]
    return {key: keys.simplified(schema) for key, schema in made.items()}


def split_keys(args: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a recipe into (the plugin's keys, everything else)."""
    ours = {key: value for key, value in args.items() if key in PLUGIN_KEYS}
    return ours, {key: value for key, value in args.items() if key not in ours}


def refuse_unknown_keys(names: list[str], known: set[str]) -> None:
    """Raises UserError for the unknown keys among `names`, naming the nearest valid key of each."""
    known = known | set(PLUGIN_KEYS)
    if complaints := [keys.unknown(name, known) for name in names if name not in known]:
        raise UserError(*complaints)
