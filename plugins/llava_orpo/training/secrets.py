"""Secrets of a recipe, taken out of the objects that a training saves and logs."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

from .. import keys
from ..errors import UserError

if TYPE_CHECKING:
    from ..integration.run import Run

HUB_VARIABLE = "HF_TOKEN"


def put_away(run: Run, training_args, finetuning_args) -> None:
    """Blanks the secrets in the parsed arguments, once whoever needs them has read them.

    The Trainer pickles `training_args` into training_args.bin of every checkpoint, `hub_token` included: an upload gets
    the token from HF_TOKEN instead, for as long as the recipe runs. LLaMA-Factory gives W&B and Trackio all of
    `finetuning_args` except an api_key; SwanLab's callback, which needs its secrets, exists already.

    Raises UserError if HF_TOKEN is set to another token.
    """
    token = training_args.hub_token
    if token:
        if os.environ.get(HUB_VARIABLE, token) != token:
            raise UserError(f"hub_token and the variable {HUB_VARIABLE} differ: leave hub_token out of the recipe.")
        run.set_default(HUB_VARIABLE, token)
        training_args.hub_token = None
    for field in dataclasses.fields(finetuning_args):
        if keys.is_secret(field.name):
            setattr(finetuning_args, field.name, None)
