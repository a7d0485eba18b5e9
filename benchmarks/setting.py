"""Models, rows and trainers shared by the benchmarks: random LLaVA-NeXT models of the real geometry, photographs.

`stock` is LLaMA-Factory's own CustomDPOTrainer with its own collator and step, built through the plugin with
`shared_prefix: false`, so that both sides get the very same token ids and pixels; `ours` differs in that key alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
WORK = Path(os.environ.get("LLAVA_ORPO_BENCH_DIR", ROOT / "outputs" / "bench"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

# after the variables, which transformers reads when it is imported
from llava_orpo.tiny import photo_pairs  # noqa: E402
from llava_orpo.tiny import random_model as random_llava  # noqa: E402

PHOTO = [(640, 480)]  # COCO's usual size: 2,340 image tokens
CHOSEN_WORDS, REJECTED_WORDS = 68, 55  # about 80 and 65 tokens
GEOMETRIES = {
    **random_llava.GEOMETRIES,
    "smoke": random_llava.Geometry((64, 128, 2, 4, 2), (32, 64, 3, 2), tile=56),  # shows only that it runs
}
LORA = {
    "finetuning_type": "lora",
    "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}


def lora_rank(geometry) -> int:
    """Rank 64 at the 7B's width of 4,096 (the headline recipe's), in proportion at smaller widths: 8 for `mid`."""
    return geometry.text[0] // 64


def model_folder(geometry: str) -> Path:
    """A random model of one of `GEOMETRIES`, made at the first use."""
    out = WORK / "models" / geometry
    if not (out / "model.safetensors").exists():
        random_llava.write(GEOMETRIES[geometry], out)
    return out


def write_rows(folder: Path, images: int, pairs_per_image: int, sizes=PHOTO) -> list[dict[str, Any]]:
    """Writes photograph pairs and a dataset_info.json into the folder; returns the rows.

    rows.parquet holds them as they are, stock.parquet with `<image>` before the questions, as stock LLaMA-Factory
    needs.
    """
    rows = photo_pairs.rows(images, pairs_per_image, CHOSEN_WORDS, REJECTED_WORDS, sizes=sizes)
    photo_pairs.write(folder / "rows.parquet", rows)
    marked = [dict(row, question="<image>\n" + row["question"]) for row in rows]
    photo_pairs.write(folder / "stock.parquet", marked)
    columns = {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "images": "image"}
    info = {
        "rows": {"file_name": "rows.parquet", "formatting": "rlaif_v", "ranking": True},
        "stock": {"file_name": "stock.parquet", "ranking": True, "columns": columns},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return rows


def recipe(geometry: str, folder: Path, **keys) -> dict[str, Any]:
    """A whole ORPO + LoRA recipe in fp32, without gradient checkpointing, on the rows of `write_rows`."""
    rank = lora_rank(GEOMETRIES[geometry])
    return {
        "plugins": "llava_orpo",
        "model_name_or_path": str(model_folder(geometry)),
        "stage": "dpo",
        "do_train": True,
        **LORA,
        "lora_rank": rank,
        "lora_alpha": 2 * rank,
        "pref_loss": "orpo",
        "pref_beta": 0.1,
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "llava_v16_mistral",
        "cutoff_len": 4096,
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "per_device_train_batch_size": 1,
        "disable_gradient_checkpointing": True,
        "use_cpu": True,
        "seed": 0,
        **keys,
    }


def without_plugin(keys: dict[str, Any]) -> dict[str, Any]:
    """The recipe for stock LLaMA-Factory, on its own format and template."""
    keys = {key: value for key, value in keys.items() if key != "plugins"}
    return {**keys, "dataset": "stock", "template": "llava_next_mistral"}


def build(side: str, geometry: str, folder: Path, **keys):
    """The trainer that `llamafactory-cli train` would call `train()` (or `evaluate()`) on."""
    from llamafactory.hparams import get_train_args

    from llava_orpo.integration.run import current
    from llava_orpo.training import workflow

    *arguments, _ = get_train_args(recipe(geometry, folder, shared_prefix=side == "ours", **keys))
    trainer = workflow.build(current(), *arguments)
    expected = {"stock": "CustomDPOTrainer", "ours": "SharedPrefixTrainer"}[side]
    if type(trainer).__name__ != expected:
        raise RuntimeError(f"side {side} is a {type(trainer).__name__}, not a {expected}")
    trainer.model.train()
    return trainer


@torch.no_grad()
def share_weights(first, second) -> None:
    """Gives `second` the very tensors of `first`, so that frozen weights lie in memory once.

    LoRA's B becomes nonzero, or every gradient of A would be 0. Each trainer keeps gradients of its own.
    """
    generator = torch.Generator().manual_seed(7)
    others = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        others[name].data = parameter.data


def collate(trainer, pairs: list[int]) -> dict[str, Any]:
    """The batch of these training rows, as the trainer's own dataloader would make it."""
    return trainer._prepare_inputs(trainer.data_collator([dict(trainer.train_dataset[i]) for i in pairs]))


def forward_backward(trainer, batch: dict[str, Any], share: float = 1.0) -> float:
    """Runs one micro-batch with its loss times `share`, adds its gradients up and returns the loss."""
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, dict(batch))
    trainer.accelerator.backward(loss * share)
    return loss.item()


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Takes the gradients out of the trainer's model, by parameter name."""
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return found


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest ||found - expected|| / ||expected|| over the tensors."""
    if found.keys() != expected.keys():
        raise ValueError(f"gradients of different parameters: {sorted(found.keys() ^ expected.keys())[:5]}")
    return max((found[n].double() - g.double()).norm().item() / g.double().norm().item() for n, g in expected.items())
