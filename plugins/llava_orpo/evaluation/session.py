"""Model, processor and held-out rows of a recipe, without training, for the commands in `evals/` that load a model.

Goes through LLaMA-Factory's own loading, so a base, adapter, merged or quantized model, and any registered dataset,
is loaded exactly as `llamafactory-cli` would.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from .. import PLUGIN_NAME, autoload
from ..errors import UserError
from ..integration import run
from ..step.collator import SharedPrefixCollator
from ..step.model import PackedLogps, packed_logps, prepare
from ..step.parts import chosen_first, parts_of
from ..training import workflow

TRAINING_ONLY = (
    "dataset",
    "do_train",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "eval_on_start",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "load_best_model_at_end",
    "metric_for_best_model",
    "early_stopping_steps",
    "plot_loss",
    "overwrite_output_dir",
    "run_name",
    "project",
    "num_train_epochs",
    "max_steps",
    "resume_from_checkpoint",
)


@dataclass
class Session:
    """A loaded recipe. `rows` are tokenized pairs (see `data.pairs.PairProcessor`), `arguments` the plugin's keys.

    model, collator: None where a server holds the model (`open_session` with need_model=False).
    """

    model: torch.nn.Module | None
    tokenizer: Any
    processor: Any
    template: Any
    rows: Any
    collator: SharedPrefixCollator | None
    arguments: Any
    recipe: dict[str, Any]
    beta: float
    autocast: torch.dtype | None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_error) -> None:
        """Releases the model, because the next one may need its memory."""
        self.model = self.collator = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.model.parameters())

    @property
    def image_token_id(self) -> int:
        """The id that is repeated for every image token; known without the model."""
        return self.tokenizer.convert_tokens_to_ids(self.template.mm_plugin.image_token)

    @property
    def batch_size(self) -> int:
        return int(self.recipe.get("per_device_eval_batch_size", 8))

    @property
    def num_workers(self) -> int:
        return int(self.recipe.get("dataloader_num_workers", 0))

    def precision(self) -> AbstractContextManager:
        """The autocast that the recipe's bf16 or fp16 asks for."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    @torch.no_grad()
    def forward(self, batch: dict[str, Any]) -> PackedLogps:
        """Runs one forward over a collated batch, or a part of one, in the recipe's precision."""
        with self.precision():
            return packed_logps(self.model, batch, self.device)

    def score_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """{"logps": (2n,)} of a collated batch: summed log-probs in nats, chosen first."""
        return {"logps": chosen_first([self.forward(part).sums for part in parts_of(batch)])}


def open_session(
    recipe: dict[str, Any],
    output_dir: str,
    need_rows: bool = True,
    need_model: bool = True,
    keep_adapter: bool = False,
) -> Session:
    """Loads model, processor and the recipe's `eval_dataset`. Training keys of the recipe are ignored.

    need_model: False reads no weights, for answers that a server gives; config, tokenizer and processor are still read.
    keep_adapter: True leaves the recipe's one adapter beside the base, so that PEFT's `disable_adapter` gives the base;
    LLaMA-Factory merges the adapter of an unquantized model that is not trained.

    Raises UserError when the recipe names no eval_dataset, and whatever loading raises.
    """
    if need_rows and not recipe.get("eval_dataset"):
        raise UserError(
            "The recipe names no eval_dataset; add eval_dataset=NAME (see data_registry/dataset_info.json)."
        )
    autoload.install()
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    keys = {key: value for key, value in recipe.items() if key not in TRAINING_ONLY}
    keys.update(plugins=PLUGIN_NAME, shared_prefix=True, stage="dpo", do_train=False, do_eval=need_rows)
    keys.update(report_to="none")
    keys["output_dir"] = output_dir
    if not keys.get("adapter_name_or_path"):
        keys.setdefault("finetuning_type", "lora")
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(keys)
    running = run.current()

    if need_rows:
        workflow.check(running, model_args, data_args, training_args, finetuning_args)
    module = load_tokenizer(model_args)
    tokenizer, processor = module["tokenizer"], module["processor"]
    template = get_template_and_fix_tokenizer(tokenizer, data_args)
    rows = None
    if need_rows:
        rows = workflow.read_rows(running, template, module, model_args, data_args, training_args)["eval_dataset"]
    model = collator = None
    if need_model:
        adapter = _taken_out(model_args) if keep_adapter else None
        model = load_model(tokenizer, model_args, finetuning_args, is_trainable=False)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        if not getattr(model, "hf_device_map", None) and not getattr(model, "is_quantized", False):
            model.to(training_args.device)
        prepare(model, training_args.device, running.arguments.attention_backend, running.arguments.cudnn_attention)
        model.eval()
        collator = SharedPrefixCollator.of(processor, model, running.arguments)
    autocast = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    return Session(
        model,
        tokenizer,
        processor,
        template,
        rows,
        collator,
        running.arguments,
        recipe,
        finetuning_args.pref_beta,
        autocast,
    )


def _taken_out(model_args) -> str | None:
    """The one adapter that the arguments name, which they name no longer; None if there is none.

    Raises UserError for several.
    """
    adapters, model_args.adapter_name_or_path = model_args.adapter_name_or_path or [], None
    if len(adapters) > 1:
        raise UserError(
            f"adapter_name_or_path names {len(adapters)} adapters; merge all but the last one into a base of its own "
            "(llamafactory-cli export)."
        )
    return adapters[0] if adapters else None
