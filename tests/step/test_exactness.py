"""The shared-prefix step against LLaMA-Factory 0.9.5's own CustomDPOTrainer on the same rows and weights.

Both trainers are built as `run_dpo` builds them; only `shared_prefix` differs. Compared: loss, logged terms and the
gradient of every trainable parameter, fp32 at 1e-5 relative, bf16 at 1e-2.
"""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from helpers.exactness import compare
from helpers.recipes import build_trainer, photo_rows, random_model, step, write_rows


def png(jpeg: bytes) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(out, "PNG")
    return out.getvalue()


LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,down_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}
METHODS = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "lora-projector-frozen": {**LORA, "freeze_multi_modal_projector": True},
    "full": {"finetuning_type": "full", "freeze_multi_modal_projector": False},
    "full-all-trained": {
        "finetuning_type": "full",
        "freeze_multi_modal_projector": False,
        "freeze_vision_tower": False,
    },
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "qlora": {**LORA, "quantization_bit": 4},
    "checkpointing": {**LORA, "disable_gradient_checkpointing": False},
    "checkpointing-nonreentrant": {**LORA, "disable_gradient_checkpointing": False, "use_reentrant_gc": False},
}


@pytest.mark.parametrize("method", METHODS)
def test_equals_llamafactory(method, tmp_path):
    rows = photo_rows(4, 1, aspect="mixed")
    # Through the whole vision tower, fp32 rounding alone reaches 1.3e-5 in single tensors: that one runs in float64.
    compare(METHODS[method], rows, tmp_path, batches=[[0], [1, 2, 3]], double=method == "full-all-trained")


def test_equals_llamafactory_at_336_pixels(tmp_path):
    keys = {**LORA, "model_name_or_path": str(random_model("tiny"))}
    compare(keys, photo_rows(1, 1, aspect="mixed"), tmp_path, batches=[[0]])


def test_equals_llamafactory_bf16(tmp_path):
    compare({**LORA, "bf16": True}, photo_rows(3, 1), tmp_path, batches=[[0, 1, 2]], tolerance=1e-2)


def test_one_token_responses_and_text_only(tmp_path):
    rows = photo_rows(3, 1)
    rows[0].update(chosen="a", rejected="the red woman near a small window with light and a dark old table")
    rows[1].update(image=None)
    compare({**LORA, "allow_text_only": True}, rows, tmp_path, [[0, 1, 2], [0, 1]])


@pytest.mark.parametrize("loss", ["simpo", "sigmoid", "ipo"])
def test_other_losses(loss, tmp_path):
    compare({**LORA, "pref_loss": loss, "pref_beta": 0.5}, photo_rows(3, 1), tmp_path, batches=[[0, 1, 2]])


def test_grouped_pairs_equal_ungrouped(tmp_path):
    rows = photo_rows(2, 3)
    ours, _ = compare(
        LORA,
        rows,
        tmp_path,
        batches=[[0, 1, 2, 3], [5, 0, 4, 1]],
        plugin_keys={"group_pairs_by_image": True, "max_pairs_per_image": 3},
    )
    packed = ours.data_collator([ours.train_dataset[i] for i in (0, 1, 2, 3)])["packed"]
    assert len(packed.layout.groups) == 2 and packed.n_pairs == 4


def test_collator_skips_images_that_do_not_decode(tmp_path):
    rows = photo_rows(2, 1)
    data = png(rows[1]["image"]["bytes"])
    half = len(data) // 2
    data = data[:half] + bytes(64) + data[half + 64 :]  # header and end marker are fine, the pixels are not
    rows[1]["image"] = {"bytes": data, "path": None}
    write_rows(tmp_path, rows)
    trainer = build_trainer(tmp_path, LORA)
    good, both = [trainer.train_dataset[0]], [trainer.train_dataset[i] for i in (0, 1)]
    loss_good, _, grads_good = step(trainer, good)
    loss_both, _, grads_both = step(trainer, both)
    assert trainer.data_collator(both)["weights"].tolist() == [1.0, 0.0]
    assert loss_both == pytest.approx(loss_good, rel=1e-6)
    for name, gradient in grads_good.items():
        torch.testing.assert_close(grads_both[name], gradient, rtol=1e-5, atol=1e-8)
    listed = (tmp_path / "out" / "skipped_rows.jsonl").read_text()
    assert trainer.train_dataset[1]["pair_id"] in listed
