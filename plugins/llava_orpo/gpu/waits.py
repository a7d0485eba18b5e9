"""Stage 3: how often the host waits for the card, how long a step waits for data, tokens per second."""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..step.collator import SharedPrefixCollator
from ..tiny.shapes import PATCH, config
from . import models, speed
from .host_waits import Waits
from .machine import SMALLEST, Machine, installed
from .record import Record, Unmeasured

TITLE = "3 host synchronizations, data, tokens per second"
STEPS, DRY_STEPS = 12, 3
TRAINER_STEPS = 4
PHOTO = (640, 480)


@contextlib.contextmanager
def host_synchronizations(device: torch.device) -> Iterator[Counter[str]]:
    """Counts {place: times}, known at the end: on CUDA by torch's sync debug mode, on a CPU what would wait there."""
    counts: Counter[str] = Counter()
    if device.type != "cuda":
        with Waits().counting() as waits:
            yield counts
        counts.update(waits.places())
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    counts.update(places)


def optimizer_step(held: speed.Trainee) -> None:
    """Clip, step, zero: what Trainer does between its micro-batches, without asking for the norm."""
    torch.nn.utils.clip_grad_norm_(held.trained(), 1.0)
    held.optimizer.step()
    held.optimizer.zero_grad(set_to_none=False)


def _counted(machine: Machine, counts: Counter[str], steps: int = 1) -> dict[str, tuple[Any, str]]:
    # a CPU cannot tell what lives on the host anyway, such as Adam's step counters
    name = "host synchronizations" if machine.device.type == "cuda" else "what would wait"
    figures: dict[str, tuple[Any, str]] = {name: (sum(counts.values()) / steps, "")}
    for place, times in counts.most_common(6):
        figures[f"at {place}"] = (times / steps, "")
    return figures


def weights_here() -> str:
    """The weights that the headline recipe trains on, as far as they can be had."""
    return "nf4" if installed("bitsandbytes") else "bf16"


def in_the_step(machine: Machine, optimizer: bool) -> dict[str, tuple[Any, str]]:
    """Of the step's forward, loss and backward, or of the optimizer's part."""
    machine.in_time()
    held = speed.trainee(machine, weights_here())
    batch = speed.batch_for(machine, 1)
    loss_of = speed.side_loss(machine, held.model, speed.OURS)
    models.set_recompute(held.model, "all")
    speed.micro_batch(machine, held.model, loss_of, batch)  # compiled and planned
    optimizer_step(held)
    machine.wait()
    with host_synchronizations(machine.device) as counts:
        if optimizer:
            optimizer_step(held)
        else:
            speed.micro_batch(machine, held.model, loss_of, batch)
    return _counted(machine, counts)


# data -------------------------------------------------------------------------------------------------------------


class _FromBytes(SharedPrefixCollator):
    """The collator for images that are at hand as bytes: the store of a dataset needs pyarrow, which torch does not."""

    def _load(self, row: dict[str, Any]):
        from ..data.images import decode_rgb

        return decode_rgb(row["image"]), ""


def photographs(count: int, size: tuple[int, int], seed: int = 0) -> list[bytes]:
    """JPEG files of this (width, height) with the detail of photographs: smooth noise in several scales."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    files = []
    for _ in range(count):
        layers = [
            torch.nn.functional.interpolate(
                torch.randn(1, 3, size[1] // scale, size[0] // scale, generator=generator),
                size=size[::-1],
                mode="bilinear",
            )
            for scale in (4, 16, 64)
        ]
        picture = (sum(layers)[0] * 30 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "JPEG", quality=92)
        files.append(out.getvalue())
    return files


def rows(settings, count: int) -> list[dict[str, Any]]:
    """Tokenized pairs on photographs, as a training's dataset gives them to the collator."""
    size = models.photo(settings, *PHOTO)
    draws = random.Random(0)
    vocabulary = min(30_000, settings.get_text_config().vocab_size)

    def words(number: int) -> list[int]:
        return [draws.randrange(10, vocabulary) for _ in range(number)]

    return [
        {
            "prompt_ids": [*words(size.head), settings.image_token_id, *words(size.question)],
            "chosen_ids": words(size.chosen),
            "rejected_ids": words(size.rejected),
            "num_image_tokens": size.image,
            "image": image,
            "image_hash": str(number),
            "width": size.width,
            "height": size.height,
        }
        for number, image in enumerate(photographs(count, PHOTO))
    ]


def image_processor(settings):
    """The image processor of this geometry. Raises Unmeasured where transformers cannot make it (no torchvision)."""
    try:
        from transformers import LlavaNextImageProcessor

        side = settings.vision_config.image_size
        return LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=settings.image_grid_pinpoints,
        )
    except ImportError as error:
        raise Unmeasured(f"transformers has no image processor here: {str(error).strip().splitlines()[0]}") from None


def with_data(machine: Machine) -> dict[str, tuple[Any, str]]:
    """Steps of one pair with the collator in the dataloader's workers: decode, resize, tile, pack, copy."""
    machine.in_time()
    settings = config(machine.geometry)
    processor = SimpleNamespace(image_processor=image_processor(settings), patch_size=PATCH)
    held = speed.trainee(machine, weights_here())
    loss_of = speed.side_loss(machine, held.model, speed.OURS)
    models.set_recompute(held.model, "all")
    steps = DRY_STEPS if machine.dry_run else STEPS
    loader = DataLoader(
        rows(settings, steps + 1),
        batch_size=1,
        collate_fn=_FromBytes(processor, settings.image_token_id),
        num_workers=1 if machine.dry_run else 4,
        pin_memory=machine.device.type == "cuda",
    )
    waited, tokens, started = 0.0, 0, 0.0
    batches = iter(loader)
    for number in range(steps + 1):
        if number == 1:  # the first step waits for the workers' start
            machine.wait()
            started, waited, tokens = time.perf_counter(), 0.0, 0
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        tokens += batch["packed"].num_tokens
        ours = {"packed": batch["packed"], "image_inputs": batch["image_inputs"]}
        speed.micro_batch(machine, held.model, loss_of, models.Batch(ours, {}, 1))
        optimizer_step(held)
    machine.wait()
    seconds = time.perf_counter() - started
    return {
        "waiting for data": (100 * waited / seconds, "%"),
        "tokens": (tokens / seconds, "per s"),
        "pairs": (steps / seconds, "per s"),
        "step": (seconds / steps, "s"),
    }


# the trainer ------------------------------------------------------------------------------------------------------


def in_the_trainer(machine: Machine) -> dict[str, tuple[Any, str]]:
    """Of a whole training through LLaMA-Factory's arguments and this plugin's trainer, on a small model: per step.

    How often it asks does not depend on the model's size. Each step has 2 micro-batches and is logged.
    """
    if not machine.full:
        raise Unmeasured("the trainer needs LLaMA-Factory")
    machine.in_time()
    from llamafactory.hparams import get_train_args

    from ..integration.run import current
    from ..tiny import photo_pairs, random_model
    from ..training import workflow

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model.write(SMALLEST, folder / "model")
        photo_pairs.write(folder / "rows.parquet", photo_pairs.rows(2 * TRAINER_STEPS, 1, 8, 5, sizes=[(300, 200)]))
        info = {"rows": {"file_name": "rows.parquet", "formatting": "rlaif_v", "ranking": True}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        keys = dict(plugins="llava_orpo", stage="dpo", do_train=True, pref_loss="orpo", template="llava_v16_mistral")
        keys |= dict(model_name_or_path=str(folder / "model"), dataset_dir=name, dataset="rows", cutoff_len=4096)
        keys |= dict(finetuning_type="lora", lora_rank=4, lora_target="q_proj,v_proj", output_dir=str(folder / "out"))
        keys |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=TRAINER_STEPS)
        keys |= dict(image_check=False)  # it waits too, once per training
        keys |= dict(logging_steps=1, save_strategy="no", report_to="none", use_cpu=machine.device.type == "cpu")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # bars and logs
            *arguments, _ = get_train_args(keys)
            trainer = workflow.build(current(), *arguments)
            with host_synchronizations(machine.device) as counts:
                trainer.train()
            trainer.accelerator.free_memory()
    return _counted(machine, counts, TRAINER_STEPS)


def run(machine: Machine, record: Record) -> None:
    """Each measurement by itself, so that one that fails takes no other with it."""
    record.attempt("a micro-batch of the step", lambda: in_the_step(machine, optimizer=False))
    record.attempt("clip and optimizer step", lambda: in_the_step(machine, optimizer=True))
    record.attempt("steps with a dataloader, 1 per image", lambda: with_data(machine))
    machine.shared.pop("trainee", None)
    record.attempt("the trainer, per step of 2 micro-batches, logged", lambda: in_the_trainer(machine))
