"""Every loss of the family, through the real collator and trainer, against plain forwards and the papers' formulas.

The reference runs transformers' model, in a trainer without the shared prefix, once per sequence: the chosen and the
rejected answer, and the chosen one under the damaged image. Compared: loss, and the gradient of every trainable
parameter, fp32 at 1e-5 relative. Where LLaMA-Factory has the loss, its own trainer is compared too.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from helpers.exactness import compare, same_gradients, same_weights
from helpers.recipes import build_trainer, photo_rows, step, write_rows
from llava_orpo.data.conversation import full_prompt_ids
from llava_orpo.data.damaged import damage
from llava_orpo.data.image_store import load_image

LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,down_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}
EPOCH = 3
IMAGE_TERM = {"preference_loss": "orpo", "image_preference": 0.7}
FAMILY = {
    "orpo": {"preference_loss": "orpo"},
    "simpo": {"preference_loss": "simpo", "pref_beta": 2.5, "simpo_gamma": 0.25},
    "dpo": {"preference_loss": "dpo", "pref_beta": 0.3},
    "mdpo": {"preference_loss": "mdpo", "pref_beta": 0.3, "damaged_image": "crop"},
    "pea": {
        "preference_loss": "pea",
        "image_preference": 0.2,
        "image_preference_loss": "hinge",
        "damaged_image": "masked",
    },
    "sft": {"preference_loss": "sft"},
    "orpo-masked": {**IMAGE_TERM, "damaged_image": "masked"},
    "orpo-hinge-noise": {
        **IMAGE_TERM,
        "image_preference_loss": "hinge",
        "image_margin": 0.9,
        "damaged_image": "noise",
    },
    "orpo-grey": {**IMAGE_TERM, "damaged_image": "grey"},
    "orpo-other": {**IMAGE_TERM, "damaged_image": "other"},
    "simpo-image": {"preference_loss": "simpo", "pref_beta": 2.0, "image_preference": 0.5, "damaged_image": "crop"},
    "dpo-image": {"preference_loss": "dpo", "pref_beta": 0.3, "image_preference": 0.5, "damaged_image": "masked"},
    "sft-image": {"preference_loss": "sft", "image_preference": 0.5, "damaged_image": "masked"},
}


def plain_logp(trainer, row, picture, answer) -> tuple[torch.Tensor, int]:
    """(summed log-prob of the answer, its tokens) from one forward of prompt and answer."""
    prompt = full_prompt_ids(row, trainer.model.config.image_token_id)
    ids = torch.tensor([prompt + list(answer)])
    images = trainer.data_collator.processor.image_processor([picture], return_tensors="pt")
    logits = trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids), **images, use_cache=False).logits
    logps = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum(), len(answer)


def plain_logps(trainer, row, pictures, keys) -> dict[str, torch.Tensor]:
    """{w, l, d: sums; hw, hl, hd: means} of the chosen and rejected answer and of the chosen one, image damaged."""
    picture = load_image(row["image"])
    sequences = {"w": (picture, row["chosen_ids"]), "l": (picture, row["rejected_ids"])}
    if "damaged_image" in keys:
        other = next((load_image(image) for name, image in pictures.items() if name != row["image_hash"]), None)
        seed = f"0 {row['epoch']} {row['image_hash']}"
        sequences["d"] = (damage(picture, keys["damaged_image"], seed, other), row["chosen_ids"])
    out = {}
    for name, (shown, answer) in sequences.items():
        out[name], tokens = plain_logp(trainer, row, shown, answer)
        out["h" + name] = out[name] / tokens
    return out


def log_odds(h: torch.Tensor) -> torch.Tensor:
    return h - torch.log1p(-torch.exp(h))


def formula(keys, p, ref) -> torch.Tensor:
    """The loss of one pair, as the papers write it; `ref` holds the reference model's sums."""
    name, beta = keys["preference_loss"], keys.get("pref_beta", 0.1)

    def reward(key):
        return beta * (p[key] - ref[key])

    if name == "orpo":
        loss = -p["hw"] - beta * F.logsigmoid(log_odds(p["hw"]) - log_odds(p["hl"]))
    elif name == "simpo":
        loss = -F.logsigmoid(beta * (p["hw"] - p["hl"]) - keys.get("simpo_gamma", 0.5))
    elif name in ("dpo", "dpo_context"):
        loss = -F.logsigmoid(reward("w") - reward("l"))
    elif name == "mdpo":
        loss = -F.logsigmoid(reward("w") - reward("l")) - F.logsigmoid(reward("w") - reward("d"))
        loss = loss - F.logsigmoid(reward("w"))
    elif name == "pea":
        loss = (1.5 - (p["hw"] - p["hl"])).clamp(min=0)
    else:
        loss = -p["hw"]
    if weight := keys.get("image_preference"):
        if keys.get("image_preference_loss") == "hinge":
            term = (keys.get("image_margin", 4.5) - (p["hw"] - p["hd"])).clamp(min=0)
        else:
            term = -F.logsigmoid(log_odds(p["hw"]) - log_odds(p["hd"]))
        loss = loss + weight * term
    return loss


def plain_step(trainer, rows, keys):
    """(mean loss of these rows, gradients by parameter name)."""
    trainer.model.train()
    trainer.model.zero_grad()
    pictures = {row["image_hash"]: row["image"] for row in rows}
    losses = []
    for row in rows:
        with torch.no_grad(), trainer.model.disable_adapter():
            ref = plain_logps(trainer, row, pictures, keys)
        losses.append(formula(keys, plain_logps(trainer, row, pictures, keys), ref))
    loss = torch.stack(losses).mean()
    loss.backward()
    grads = {n: p.grad.detach().double() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(the trainer without the shared prefix, the folder of its rows): two images with two pairs each."""
    folder = tmp_path_factory.mktemp("family")
    write_rows(folder, photo_rows(2, 2))
    return build_trainer(folder, {**LORA, "shared_prefix": False}), folder


QUICK = [("mdpo", True), ("pea", False), ("orpo-other", True), ("sft-image", True)]
CASES = [(name, grouped) for name in FAMILY for grouped in (False, True)]


@pytest.mark.parametrize(
    "name, grouped", [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.heavy]) for case in CASES]
)
def test_equals_plain_forwards(name, grouped, plain):
    plain, folder = plain
    keys = FAMILY[name]
    more = {"group_pairs_by_image": True, "max_pairs_per_image": 2} if grouped else {}
    ours = build_trainer(folder, {**LORA, "pref_loss": None, **keys, **more})
    same_weights(plain.model, ours.model)
    rows = [{**ours.train_dataset[i], "epoch": EPOCH} for i in (0, 1, 3)]
    expected, gradients = plain_step(plain, rows, keys)
    loss, metrics, found = step(ours, rows)
    packed = ours.data_collator([dict(row) for row in rows])["packed"]
    assert len(packed.layout.groups) == (2 if grouped else 3) * (2 if "damaged_image" in keys else 1)
    assert loss == pytest.approx(expected, rel=1e-5)
    same_gradients(gradients, found, 1e-5)
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"pref_loss": "orpo", "pref_beta": 0.5}, marks=pytest.mark.heavy),
        pytest.param({"pref_loss": "simpo", "pref_beta": 2.5, "simpo_gamma": 0.25}, marks=pytest.mark.heavy),
        {"pref_loss": "sigmoid", "pref_beta": 0.5, "dpo_label_smoothing": 0.1},
    ],
    ids=["orpo", "simpo", "dpo"],
)
def test_equals_llamafactory(keys, tmp_path):
    name = {"sigmoid": "dpo"}.get(keys["pref_loss"], keys["pref_loss"])
    compare({**LORA, **keys}, photo_rows(3, 1), tmp_path, [[0, 1, 2]], plugin_keys={"preference_loss": name})


def test_a_context_is_read_before_both_answers_and_has_no_loss(tmp_path):
    """Each sequence is that of the whole answer, and what is compared is the answer behind the context."""
    keys, rows = {"preference_loss": "dpo_context", "pref_beta": 0.3}, photo_rows(2, 2)
    contexts = ["There is a photograph of a woman.", "", "Two flags.", "There is a window. It is old."]
    joined = [f"{context} " if context else "" for context in contexts]
    whole = [{**r, **{k: c + r[k] for k in ("chosen", "rejected")}} for c, r in zip(joined, rows, strict=True)]
    write_rows(tmp_path, whole, "whole")
    write_rows(tmp_path, rows)
    table = pq.read_table(tmp_path / "rows.parquet").append_column("context", pa.array(contexts))
    pq.write_table(table, tmp_path / "rows.parquet")
    plain = build_trainer(tmp_path, {**LORA, "shared_prefix": False, "dataset": "whole"})
    for more in ({}, {"group_pairs_by_image": True, "max_pairs_per_image": 2}):
        ours = build_trainer(tmp_path, {**LORA, "pref_loss": None, **keys, **more})
        same_weights(plain.model, ours.model)
        read = [{**ours.train_dataset[i], "epoch": 0} for i in range(4)]
        for i, (row, original) in enumerate(zip(read, rows, strict=True)):
            sequences = plain.train_dataset[i]
            for side in ("chosen", "rejected"):
                ids = row[f"{side}_ids"]
                prompt = full_prompt_ids(row, ours.model.config.image_token_id)
                assert prompt + list(ids) == sequences[f"{side}_input_ids"], (i, side)
                assert ours.processing_class.decode(ids).strip() == original[side] + "</s>"
        expected, gradients = plain_step(plain, read, keys)
        loss, _, found = step(ours, read)
        assert loss == pytest.approx(expected, rel=1e-5)
        same_gradients(gradients, found, 1e-5)
