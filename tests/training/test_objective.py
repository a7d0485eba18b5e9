"""training/objective.py and loss_keys.py: which loss a recipe means, its terms by hand, and what contradicts itself."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava_orpo import loss_keys, precheck
from llava_orpo.arguments import PluginArguments
from llava_orpo.training.objective import Objective, log_probs

LENGTHS = torch.tensor([3, 2, 4, 5, 1, 2, 2, 4])  # three pairs, and the damaged images of the second and the third


def scored(seed: int, rejected: bool = True):
    """A forward over three pairs, of which the last two have a damaged image; sums that need gradients."""
    torch.manual_seed(seed)
    kept = torch.arange(8) if rejected else torch.tensor([0, 1, 2, 6, 7])
    sums = (-3.0 * torch.rand(8) * LENGTHS)[kept].requires_grad_()
    packed = SimpleNamespace(n_pairs=3, n_rejected=3 * rejected, damaged_pairs=torch.tensor([1, 2]))
    return sums, log_probs(SimpleNamespace(packed=packed, sums=sums, lengths=LENGTHS[kept]))


def objective(**keys) -> Objective:
    finetuning = dict(pref_loss="orpo", pref_beta=0.3, simpo_gamma=0.5, dpo_label_smoothing=0.0, pref_bco_weight=0.0)
    finetuning |= {key: keys.pop(key) for key in list(keys) if key in finetuning}
    if "preference_loss" in keys:
        finetuning["pref_loss"] = loss_keys.PREF_LOSS[keys["preference_loss"]]
    return Objective.of(PluginArguments(**keys), SimpleNamespace(**finetuning))


def by_hand(name: str, sums, reference, image: float, image_loss: str) -> torch.Tensor:
    """The loss of each pair, written out pair by pair."""
    means, beta, out = sums / LENGTHS, 0.3, []
    for i in range(3):
        w, lost = means[i], means[3 + i]
        reward_w, reward_l = (beta * (sums[k] - reference[k]) for k in (i, 3 + i))
        odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (w.item(), lost.item())]
        loss = {
            "orpo": -w - 0.3 * F.logsigmoid(torch.tensor(odds[0] - odds[1])),
            "simpo": -F.logsigmoid(beta * (w - lost) - 0.5),
            "sft": -w,
            "pea": torch.clamp(1.5 - (w - lost), min=0),
            "dpo": -F.logsigmoid(reward_w - reward_l),
            "mdpo": -F.logsigmoid(reward_w - reward_l) - F.logsigmoid(reward_w),
        }[name]
        if i > 0:
            under = 5 + i  # the sums of the second's and of the third's damaged image are the seventh and the eighth
            margin = w - means[under]
            if name == "mdpo":
                loss = loss - F.logsigmoid(reward_w - beta * (sums[under] - reference[under]))
            elif image_loss == "hinge":
                loss = loss + image * torch.clamp(4.5 - margin, min=0)
            else:
                other = math.log(math.exp(means[under].item()) / (1 - math.exp(means[under].item())))
                loss = loss - image * F.logsigmoid(torch.tensor(odds[0] - other))
        out.append(loss)
    return torch.stack(out)


@pytest.mark.parametrize(
    "name, weight, kind",
    [
        ("mdpo", 0.0, "odds_ratio"),
        *itertools.product(["orpo", "simpo", "sft", "pea", "dpo"], [0.0, 0.7], ["odds_ratio", "hinge"]),
    ],
)
def test_the_terms_are_those_of_the_formulas(name, weight, kind):
    sums, logps = scored(0)
    other_sums, other = scored(1)
    chosen = objective(preference_loss=name, image_preference=weight, image_preference_loss=kind)
    terms = chosen.terms(logps, other if loss_keys.needs_reference({"preference_loss": name}) else None)
    torch.testing.assert_close(terms["loss"], by_hand(name, sums, other_sums, weight, kind), rtol=1e-5, atol=1e-6)
    assert chosen.runs_damaged == (weight > 0 or name == "mdpo") == ("image_loss" in terms)
    if chosen.runs_damaged:
        margin = (sums / LENGTHS)[1:3] - (sums / LENGTHS)[6:8]
        assert terms["has_damaged"].tolist() == [0, 1, 1] and terms["image_loss"][0] == 0
        torch.testing.assert_close(terms["grounding_margin"], torch.tensor([0.0, *margin.tolist()]))
        assert terms["grounding_accuracy"].tolist() == [0.0, *(margin > 0).float().tolist()]


def test_a_pair_without_a_damaged_image_gets_no_gradient_of_the_image_term():
    for name, weight in (("orpo", 0.7), ("mdpo", 0.0)):
        sums, logps = scored(0)
        terms = objective(preference_loss=name, image_preference=weight).terms(logps, scored(1)[1])
        terms["loss"][0].backward()
        assert sums.grad[[0, 3]].abs().min() > 0 and sums.grad[[1, 2, 4, 5, 6, 7]].abs().max() == 0
    sums, logps = scored(0)
    damaged = logps["chosen_mean"][0] - logps["damaged_mean"][0]
    damaged.backward()
    assert damaged.item() == 0 and sums.grad.abs().max() == 0


def test_sft_needs_no_rejected_answer_and_logs_no_reward():
    sums, logps = scored(0, rejected=False)
    terms = objective(preference_loss="sft", image_preference=1.0).terms(logps)
    assert "chosen_rewards" not in terms and "rejected_sum" not in logps
    torch.testing.assert_close(terms["sft_loss"], -sums[:3] / LENGTHS[:3])
    torch.testing.assert_close(logps["damaged_sum"][1:], sums[3:])


def test_losses_that_only_llamafactory_has_get_sums_or_means_as_there():
    seen = []

    def other(*arguments):
        seen.append(arguments)
        return arguments[0], arguments[0], arguments[1]

    for pref_loss, kind in (("hinge", "sum"), ("ipo", "mean")):
        finetuning = SimpleNamespace(
            pref_loss=pref_loss, pref_beta=0.1, simpo_gamma=0.5, dpo_label_smoothing=0.0, pref_bco_weight=0.0
        )
        made = Objective.of(PluginArguments(), finetuning, other)
        logps, reference = scored(0)[1], scored(1)[1]
        assert made.name == "" and torch.equal(made.terms(logps, reference)["loss"], logps[f"chosen_{kind}"])
        assert torch.equal(seen[-1][3], reference[f"rejected_{kind}"])
    assert objective(pref_loss="sigmoid", pref_bco_weight=0.5).name == ""


CONTRADICTIONS = [
    ({"preference_loss": "simpo", "pref_loss": "orpo"}, "preference_loss: simpo contradicts pref_loss: orpo"),
    ({"preference_loss": "pea", "pref_loss": "simpo"}, "preference_loss: pea contradicts pref_loss: simpo"),
    ({"preference_loss": "sft", "stage": "sft"}, "preference_loss: sft is for `stage: dpo`"),
    ({"image_preference": 0.5, "stage": "kto"}, "image_preference: 0.5 is for `stage: dpo`"),
    ({"preference_loss": "dpo", "pref_bco_weight": 0.5}, "does not go with pref_bco_weight"),
    ({"preference_loss": "mdpo", "image_preference": 0.5}, "mdpo, which has an image term of its own"),
    ({"preference_loss": "mdpo", "shared_prefix": False}, "preference_loss: mdpo needs the shared-prefix step"),
    ({"preference_loss": "sft", "shared_prefix": False}, "preference_loss: sft needs the shared-prefix step"),
    ({"image_preference": 0.5, "shared_prefix": False}, "image_preference: 0.5 needs the shared-prefix step"),
    (
        {"preference_loss": "dpo", "reference": "cached", "shared_prefix": False, "finetuning_type": "lora"},
        "reference: cached needs the shared-prefix step",
    ),
    ({"damaged_image": "crop"}, "damaged_image has no effect without image_preference"),
    ({"image_margin": 2.0, "preference_loss": "sft"}, "image_margin has no effect without image_preference"),
    ({"text_margin": 2.0, "pref_loss": "orpo"}, "text_margin is for preference_loss: pea"),
    ({"pref_loss": "orpo", "reference": "adapter_off"}, "reference: adapter_off has no effect with orpo"),
    (
        {"preference_loss": "dpo", "reference": "adapter_off", "finetuning_type": "full"},
        "needs `finetuning_type: lora`",
    ),
    ({"preference_loss": "dpo", "reference": "cached", "ref_model": "x"}, "reference: cached contradicts ref_model"),
    ({"preference_loss": "mdpo", "reference": "cached"}, "does not go with damaged_image: masked"),
    ({"preference_loss": "mdpo", "reference": "cached", "damaged_image": "crop"}, "set `damaged_image: grey` or"),
]


@pytest.mark.parametrize("keys, sentence", CONTRADICTIONS)
def test_contradictions_are_refused_in_one_line(keys, sentence):
    (found,) = loss_keys.problems(keys)
    assert sentence in found and "\n" not in found
    assert found in precheck.problems({"model_name_or_path": "org/name", **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"pref_loss": "hinge"},
        {"preference_loss": "sft", "pref_loss": None},
        {"preference_loss": "mdpo", "pref_loss": "sigmoid", "damaged_image": "crop"},
        {"preference_loss": "mdpo", "reference": "cached", "damaged_image": "grey"},
        {"pref_loss": "ipo", "reference": "cached", "image_preference": 0.2, "damaged_image": "other"},
        {"image_preference": 0, "damaged_image": "noise", "image_preference_loss": "hinge"},
        {"preference_loss": "pea", "text_margin": 1.0, "image_preference": 0.2, "image_margin": 4.5},
    ],
)
def test_what_goes_together_passes(keys):
    assert loss_keys.problems(keys) == []
