"""`reference: cached`: the reference model's log-probs of the whole training set, computed once before the first step.

The reference is the model without its adapter. What was computed stays in `output_dir`, where an interrupted run goes
on with it and a resumed training finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from llamafactory.extras import logging
from transformers import TrainerCallback

from ..evaluation.saved import Saved
from ..preference.fingerprint import fingerprint
from ..preference.scoring import ScoredRow
from ..step.reference import ReferenceLogps

logger = logging.get_logger("llamafactory." + __name__)
FILE = "reference_logps.{}.jsonl"  # of each process


class ReferenceOnce(TrainerCallback):
    """Computes what is missing when the training begins, and hands it to the collator.

    trainer: a SharedPrefixTrainer. keys: the recipe's keys as LLaMA-Factory parsed them, the plugin's among them.
    """

    def __init__(self, trainer, keys: Mapping[str, Any]) -> None:
        self.trainer, self.keys = trainer, keys

    def on_train_begin(self, args, state, control, **kwargs):
        rows = self.trainer.train_dataset
        # the grey image's pairs, where the loss compares with it: `loss_keys` lets no other damage pass
        conditions = ("true", "grey") if self.trainer.objective.name == "mdpo" else ("true",)
        found = {condition: self._scores(rows, condition) for condition in conditions}
        tensors = {"chosen": found["true"][:, 0], "rejected": found["true"][:, 1]}
        if "grey" in found:
            tensors["damaged"] = found["grey"][:, 0]
        self.trainer.data_collator.reference_logps = ReferenceLogps(**tensors)

    def _scores(self, rows, condition: str) -> torch.Tensor:
        """(n, 2) summed log-probs of the chosen and the rejected answers; NaN where an image can't be decoded."""
        trainer, args = self.trainer, self.trainer.args
        folder, key = Path(args.output_dir), f"{fingerprint(self.keys, rows)} {condition}"
        name = FILE if condition == "true" else FILE.replace(".{}", f"_{condition}.{{}}")
        folder.mkdir(parents=True, exist_ok=True)
        own = Saved(folder / name.format(args.process_index), key)
        records = list(own.records)
        if args.process_index == 0:  # what more processes have left
            for other in folder.glob(name.format("*")):
                rank = other.suffixes[-2].removeprefix(".")
                if rank.isdecimal() and int(rank) >= args.world_size:
                    records += Saved(other, key).records
        known = self._of_all(records)
        waiting = [place for place in range(len(rows)) if place not in known]
        if waiting:
            logger.info_rank0(
                f"reference: cached computes the log-probs of {len(waiting)} of {len(rows)} pairs ({condition} image), "
                f"once; they are kept in {folder / name.format('*')}."
            )
            share = -(-len(waiting) // args.world_size)
            with own.appending(share, 0, "pair", f"reference, {condition} image") as add:
                scored = trainer.score_reference(rows, condition, waiting, _adding(add))
            known |= self._of_all([_record(row) for row in scored])
        return torch.tensor([known[place] for place in range(len(rows))], dtype=torch.float32)

    def _of_all(self, records: list[dict[str, Any]]) -> dict[int, list[float]]:
        """{place: its log-probs} of the records of all processes."""
        parts = [records]
        if self.trainer.args.world_size > 1:
            parts = [None] * self.trainer.args.world_size
            torch.distributed.all_gather_object(parts, records)
        return {
            record["place"]: [math.nan if value is None else value for value in record["logps"]]
            for part in parts
            for record in part
        }


def _adding(add: Callable[[list[dict]], None]) -> Callable[[list[ScoredRow]], None]:
    return lambda rows: add([_record(row) for row in rows])


def _record(row: ScoredRow) -> dict[str, Any]:
    pair = row.pair
    return {"place": row.position, "logps": [pair.chosen_logp, pair.rejected_logp] if pair else [None, None]}
