"""What is minimized: a recipe's preference loss and its image term, from the log-probs of one forward.

The losses themselves are in `step.orpo` and `step.losses`; those that only LLaMA-Factory has come from its trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import loss_keys
from ..step import losses, orpo
from ..step.model import PackedLogps

Terms = dict[str, torch.Tensor]
GROUNDING = {  # terms of an image term, and the names under which a training logs them
    "image_loss": "image_loss",
    "grounding_margin": "grounding/margin",
    "grounding_accuracy": "grounding/accuracy",
    "has_damaged": "grounding/share",
}


def log_probs(scored: PackedLogps) -> Terms:
    """Log-probs by the kind of response, (n,) each: `{chosen,rejected,damaged}_sum`, and `_mean` per token.

    has_damaged is 1.0 for a pair whose chosen answer was run under a damaged image. The others hold their chosen
    answer's own log-prob there, so that what is compared with it is 0, and so is the gradient. The two of the rejected
    answers are missing where none was run.
    """
    n, rejected = scored.packed.n_pairs, scored.packed.n_rejected
    places, means = scored.packed.damaged_pairs, scored.sums / scored.lengths
    out = {"has_damaged": torch.zeros_like(means[:n], requires_grad=False).index_fill(0, places, 1.0)}
    for name, values in (("sum", scored.sums), ("mean", means)):
        out[f"chosen_{name}"] = values[:n]
        if rejected:
            out[f"rejected_{name}"] = values[n : n + rejected]
        out[f"damaged_{name}"] = values[:n].index_copy(0, places, values[n + rejected :])
    return out


@dataclass(frozen=True)
class Objective:
    """A loss and its constants.

    name      of `loss_keys.PREF_LOSS`; "" for what `other` computes, LLaMA-Factory's `compute_preference_loss`
    beta, gamma, label_smoothing   pref_beta, simpo_gamma and dpo_label_smoothing
    means     whether `other` takes means per token (LLaMA-Factory's ipo), or sums
    The rest are the recipe's keys of the same name.
    """

    name: str
    beta: float
    gamma: float = 0.5
    label_smoothing: float = 0.0
    text_margin: float = 1.5
    image_preference: float = 0.0
    image_preference_loss: str = "odds_ratio"
    image_margin: float = 4.5
    means: bool = False
    other: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    @classmethod
    def of(cls, plugin: Any, finetuning: Any, other: Callable | None = None) -> Objective:
        """That of a recipe's `PluginArguments` and LLaMA-Factory's `FinetuningArguments`."""
        name = loss_keys.loss_of({**vars(plugin), "pref_loss": finetuning.pref_loss})
        return cls(
            name="" if finetuning.pref_bco_weight >= 1e-6 else name,
            beta=finetuning.pref_beta,
            gamma=finetuning.simpo_gamma,
            label_smoothing=finetuning.dpo_label_smoothing,
            text_margin=plugin.text_margin,
            image_preference=plugin.image_preference,
            image_preference_loss=plugin.image_preference_loss,
            image_margin=plugin.image_margin,
            means=finetuning.pref_loss in ("ipo", "orpo", "simpo"),
            other=other,
        )

    @property
    def runs_damaged(self) -> bool:
        """Whether there is an image term."""
        return self.image_preference > 0 or self.name == "mdpo"

    def terms(self, logps: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor] | None = None) -> Terms:
        """Terms per pair, (n,) each, of `log_probs` under the policy and, where the loss needs it, the reference.

        loss, sft_loss; chosen_rewards and rejected_rewards where rejected answers were run; odds_ratio_loss and
        log_odds of ORPO; and where there is an image term: image_loss (without its weight), grounding_margin (mean
        log-prob under the true image less that under the damaged one) and grounding_accuracy (1.0 above zero), all
        three 0 for a pair without a damaged image, and has_damaged.
        """
        out = self._preference(logps, reference)
        out["sft_loss"] = orpo.sft_loss(logps["chosen_mean"])
        if not self.runs_damaged:
            return out
        has, chosen, damaged = logps["has_damaged"], logps["chosen_mean"], logps["damaged_mean"]
        if self.name == "mdpo":
            image = losses.dpo(
                logps["chosen_sum"], logps["damaged_sum"], reference["chosen_sum"], reference["damaged_sum"], self.beta
            )
            out["loss"] = out["loss"] - (1.0 - has) * image  # a constant, in the loss of mDPO so far
        else:
            if self.image_preference_loss == "hinge":
                image = losses.image_hinge(chosen, damaged, self.image_margin)
            else:
                image = losses.image_odds_ratio(chosen, damaged)
            out["loss"] = out["loss"] + self.image_preference * (has * image)
        margin = (chosen - damaged).detach()
        out["image_loss"] = has * image.detach()
        out["grounding_margin"], out["grounding_accuracy"] = has * margin, (margin > 0).float()
        out["has_damaged"] = has
        return out

    def _preference(self, logps: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor] | None) -> Terms:
        """loss and rewards of the answers; for mDPO all three of its terms."""
        mean, summed = ((logps[f"chosen_{kind}"], logps.get(f"rejected_{kind}")) for kind in ("mean", "sum"))
        if self.name == "sft":
            return {"loss": orpo.sft_loss(mean[0]), **_rewards(mean)}
        if self.name == "orpo":
            terms = orpo.orpo_loss(*mean, self.beta)
            odds = {"odds_ratio_loss": terms.odds_ratio.detach(), "log_odds": terms.log_odds.detach()}
            return {"loss": terms.loss, **_rewards(mean, self.beta), **odds}
        if self.name == "simpo":
            return {"loss": losses.simpo(*mean, self.beta, self.gamma), **_rewards(mean, self.beta)}
        if self.name == "pea":
            return {"loss": losses.pea(*mean, self.text_margin), **_rewards(mean)}
        kind = "mean" if self.means else "sum"
        answers = mean if self.means else summed
        theirs = tuple(reference[f"{which}_{kind}"] for which in ("chosen", "rejected")) if reference else (None, None)
        if not self.name:
            loss, chosen, rejected = self.other(*answers, *theirs)
            return {"loss": loss, "chosen_rewards": chosen, "rejected_rewards": rejected}
        rewards = _rewards([own - other for own, other in zip(summed, theirs, strict=True)], self.beta)
        if self.name == "mdpo":
            damaged = logps["damaged_sum"], reference["damaged_sum"]
            return {"loss": losses.mdpo(*summed, damaged[0], *theirs, damaged[1], self.beta), **rewards}
        return {"loss": losses.dpo(*summed, *theirs, self.beta, self.label_smoothing), **rewards}


def over_damaged(logged: Mapping[str, float]) -> dict[str, float]:
    """Means over all pairs, with those of `GROUNDING` turned into means over the pairs with a damaged image.

    `grounding/share` stays the share of these; where it is 0 there is nothing to say of them.
    """
    share = logged.get(GROUNDING["has_damaged"])
    if share is None:
        return dict(logged)
    ours = [name for key, name in GROUNDING.items() if key != "has_damaged"]
    rest = {name: value for name, value in logged.items() if name not in ours}
    return rest | ({name: logged[name] / share for name in ours} if share else {})


def _rewards(answers, beta: float = 1.0) -> Terms:
    chosen, rejected = answers
    if rejected is None:
        return {}
    return {"chosen_rewards": beta * chosen.detach(), "rejected_rewards": beta * rejected.detach()}
