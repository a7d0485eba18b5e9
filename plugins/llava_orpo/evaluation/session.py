"""Model, processor and held-out rows of a recipe, without training: what the scripts in `evals/` start from.

Goes through LLaMA-Factory's own loading, so a base, adapter, merged or quantized model, and any registered dataset,
is loaded exactly as `llamafactory-cli` would.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..autoload import PLUGIN_NAME, install
from ..integration import run
from ..step import attention as shared_attention
from ..step.collator import SharedPrefixCollator
from ..step.model import keep_four_bit_trainable
from ..step.packing import response_logps
from ..step.vision_tower import skip_unread_vision_layers

TRAINING_ONLY = (
    "dataset", "do_train", "deepspeed", "fsdp", "fsdp_config", "eval_on_start", "eval_strategy", "eval_steps",
    "save_steps", "save_strategy", "save_total_limit", "load_best_model_at_end", "metric_for_best_model",
    "early_stopping_steps", "plot_loss", "overwrite_output_dir", "run_name", "project", "num_train_epochs", "max_steps",
    "resume_from_checkpoint",
)  # fmt: skip


@dataclass
class Session:
    """A loaded recipe. `rows` are tokenized pairs (see `pairs.PairProcessor`), `arguments` the plugin's keys."""

    model: torch.nn.Module
    tokenizer: Any
    processor: Any
    template: Any
    rows: Any
    collator: SharedPrefixCollator
    arguments: Any
    recipe: dict[str, Any]
    beta: float
    autocast: torch.dtype | None

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.model.parameters())

    @torch.no_grad()
    def score_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """{"logps": (2n,), "lengths": (2n,)} of a collated batch: summed log-probs in nats, chosen first."""
        packed = batch["packed"].to(self.device)
        images = {key: batch[key].to(self.device) for key in ("pixel_values", "image_sizes") if key in batch}
        context = torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()
        with skip_unread_vision_layers(shared_attention.unwrap(self.model)), context:
            logits = shared_attention.packed_forward(self.model, packed, **images)
        sums, lengths = response_logps(logits, packed)
        return {"logps": sums, "lengths": lengths}


def open_session(recipe: dict[str, Any], output_dir: str, need_rows: bool = True) -> Session:
    """Loads model, processor and the recipe's `eval_dataset`. Training keys of the recipe are ignored.

    Raises ValueError when the recipe names no eval_dataset, and whatever loading raises.
    """
    if need_rows and not recipe.get("eval_dataset"):
        raise ValueError("The recipe names no eval_dataset; add eval_dataset=NAME (see data_registry/dataset_info.json).")
    install()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer
    from llamafactory.train.dpo import workflow

    keys = {key: value for key, value in recipe.items() if key not in TRAINING_ONLY}
    keys.update(plugins=PLUGIN_NAME, stage="dpo", do_train=False, do_eval=need_rows, report_to="none")
    keys["output_dir"] = output_dir
    if not keys.get("adapter_name_or_path"):
        keys.setdefault("finetuning_type", "lora")
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(keys)
    arguments = run.current().arguments

    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    rows = None
    if need_rows:
        rows = workflow.get_dataset(template, model_args, data_args, training_args, stage="rm", **module)["eval_dataset"]
    model = load_model(module["tokenizer"], model_args, finetuning_args, is_trainable=False)
    if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
        model.to(training_args.device)
    backend, _ = shared_attention.choose_backend(training_args.device, arguments.attention_backend)
    shared_attention.enable(model, backend)
    keep_four_bit_trainable(model)  # the numbers are those of the trainer's own evaluation
    collator = SharedPrefixCollator(
        module["processor"],
        shared_attention.unwrap(model).config.image_token_id,
        arguments.group_pairs_by_image,
        arguments.max_pairs_per_image,
    )
    autocast = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    return Session(
        model.eval(), module["tokenizer"], module["processor"], template, rows, collator, arguments, recipe,
        finetuning_args.pref_beta, autocast,
    )  # fmt: skip
