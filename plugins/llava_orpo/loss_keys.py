"""The keys that choose a loss: what each loss is to LLaMA-Factory, what it runs, and which keys contradict each other.

Nothing heavy is imported here. A recipe is any mapping of its keys, parsed by LLaMA-Factory or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# LLaMA-Factory's pref_loss for each loss: it decides whether a reference model is prepared, and nothing else of ours.
PREF_LOSS = {
    "orpo": "orpo",
    "simpo": "simpo",
    "dpo": "sigmoid",
    "mdpo": "sigmoid",
    "dpo_context": "sigmoid",
    "pea": "simpo",
    "sft": "simpo",
}
SAME = ("orpo", "simpo", "dpo")  # that LLaMA-Factory has too
OF_PREF_LOSS = {PREF_LOSS[name]: name for name in SAME}
DEFAULT = "sigmoid"  # LLaMA-Factory's pref_loss where a recipe has none
PER_EPOCH = ("masked", "crop", "noise", "other")  # damages that are other ones in every epoch
ONLY_WITH_DAMAGE = ("damaged_image", "image_preference_loss", "image_margin")
ADAPTERS = ("lora", "oft")  # of LLaMA-Factory's finetuning_type: turned off, the reference model is there


def loss_of(recipe: Mapping[str, Any]) -> str:
    """The name of a recipe's loss: preference_loss, else what pref_loss is here; "" for one that we do not have."""
    return recipe.get("preference_loss") or OF_PREF_LOSS.get(recipe.get("pref_loss") or DEFAULT, "")


def runs_damaged(recipe: Mapping[str, Any]) -> bool:
    """Whether the chosen answers are also run under a damaged image while training."""
    return (recipe.get("image_preference") or 0) > 0 or recipe.get("preference_loss") == "mdpo"


def runs_rejected(recipe: Mapping[str, Any]) -> bool:
    """Whether the rejected answers are run while training."""
    return recipe.get("preference_loss") != "sft"


def needs_reference(recipe: Mapping[str, Any]) -> bool:
    """Whether the loss compares with a reference model."""
    name = recipe.get("preference_loss")
    return (PREF_LOSS[name] if name else recipe.get("pref_loss") or DEFAULT) not in ("orpo", "simpo")


def only_here(recipe: Mapping[str, Any]) -> str:
    """The key and value for which LLaMA-Factory's own step has no loss, or ""."""
    name = recipe.get("preference_loss")
    if name and name not in SAME:
        return f"preference_loss: {name}"
    if runs_damaged(recipe):
        return f"image_preference: {recipe['image_preference']:g}"
    return f"reference: {recipe['reference']}" if recipe.get("reference") == "cached" else ""


def problems(recipe: Mapping[str, Any]) -> list[str]:
    """One sentence per contradiction between the keys of a recipe, as they were given."""
    name, given = recipe.get("preference_loss"), recipe.get("pref_loss")
    chosen, weight = f"preference_loss: {name}", recipe.get("image_preference") or 0
    found = []
    if name is not None and name not in PREF_LOSS:
        return []  # the key's own check refuses it
    if name and given is not None and not (PREF_LOSS[name] == given and name in (*SAME, "mdpo", "dpo_context")):
        found.append(f"{chosen} contradicts pref_loss: {given}; leave pref_loss out, or say pref_loss=null.")
    if (name or weight) and (recipe.get("stage") or "dpo") != "dpo":
        key = chosen if name else f"image_preference: {weight:g}"
        found.append(f"{key} is for `stage: dpo`; this recipe has stage: {recipe['stage']}.")
    if name and recipe.get("pref_bco_weight"):
        found.append(f"{chosen} does not go with pref_bco_weight; leave one of them out.")
    if weight and name == "mdpo":
        found.append("image_preference does not go with preference_loss: mdpo, which has an image term of its own.")
    if not runs_damaged(recipe) and "image_preference" not in recipe:
        unused = (key for key in ONLY_WITH_DAMAGE if recipe.get(key) is not None)
        found += [
            f"{key} has no effect without image_preference or preference_loss: mdpo; leave it out." for key in unused
        ]
    if recipe.get("shared_prefix") is False and (needing := only_here(recipe)):
        found.append(f"{needing} needs the shared-prefix step; set `shared_prefix: true`.")
    if recipe.get("text_margin") is not None and name != "pea":
        found.append("text_margin is for preference_loss: pea; leave it out.")
    return found + _reference_problems(recipe)


def _reference_problems(recipe: Mapping[str, Any]) -> list[str]:
    wanted = recipe.get("reference")
    if wanted is None:
        return []
    if not needs_reference(recipe):
        name = loss_of(recipe)
        return [f"reference: {wanted} has no effect with {name}, which has no reference model; leave it out."]
    kind = recipe.get("finetuning_type") or "lora"
    if kind not in ADAPTERS:
        return [f"reference: {wanted} needs `finetuning_type: lora`: the reference is the model without its adapter."]
    if recipe.get("ref_model"):
        return [f"reference: {wanted} contradicts ref_model; leave one of them out."]
    if wanted == "cached" and recipe.get("preference_loss") == "mdpo":
        damage = recipe.get("damaged_image") or PER_EPOCH[0]
        if damage in PER_EPOCH:
            return [
                f"reference: cached does not go with damaged_image: {damage}, which is another one in every epoch; "
                "set `damaged_image: grey` or `reference: adapter_off`."
            ]
    return []
