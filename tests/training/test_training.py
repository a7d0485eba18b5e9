"""Whole runs through the real `llamafactory-cli`, on random weights: logs, subsets, distributed, both steps, export."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path

import bitsandbytes
import pytest
import torch
import yaml

from helpers.paths import ROOT
from helpers.recipes import build_trainer, photo_rows, random_model, run_cli, step, write_recipe, write_rows

pytestmark = pytest.mark.slow
LORA = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj,linear_1,linear_2",
    "freeze_multi_modal_projector": False,
}


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def tensorboard_tags(folder: Path) -> set[str]:
    """Names of all scalars in the event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags: set[str] = set()
    for file in folder.rglob("events.out.tfevents*"):
        tags |= set(EventAccumulator(str(file)).Reload().Tags()["scalars"])
    return tags


def wandb_history_keys(file: Path) -> set[str]:
    """Names of everything logged in an offline run's .wandb file (wandb 0.31 has no reader in Python any more).

    The file is a LevelDB log: blocks of 32 KiB of (checksum 4, length 2, type 1, data), after 7 bytes of W&B's own;
    type 1 is a whole record, 2, 3 and 4 are its first, middle and last part.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, keys = file.read_bytes(), 7, b"", set()
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # too little for a header: padding
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        assert kind in (1, 2, 3, 4), kind
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            history = Record.FromString(parts).history
            keys |= {item.key or item.nested_key[0] for item in history.item}  # a table has keys of its own below
            parts = b""
    return keys


def test_photographs_train_at_336_pixels_with_every_log(tmp_path):
    """Real photographs at full anyres, 4-bit, W&B offline, TensorBoard, overrides on the command line."""
    write_rows(tmp_path, photo_rows(6, 1, aspect="mixed"))
    keys = {
        **LORA,
        "model_name_or_path": str(random_model("tiny")),
        "quantization_bit": 4,
        "double_quantization": True,
        "eval_dataset": "rows",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "plot_loss": True,
        "report_to": ["wandb", "tensorboard"],
        "project": "llava-orpo-test",
        "run_name": "photos",
        "max_steps": 9,
        "per_device_eval_batch_size": 2,
        "metric_for_best_model": "preference_accuracy",
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": True,
        "grounding_eval": True,
    }
    path = write_recipe(tmp_path, keys)
    run_cli(
        "train",
        path,
        "max_steps=2",
        "per_device_train_batch_size=1",
        "learning_rate=1e-3",
        env={"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_DATA_DIR": str(tmp_path / "wandb-data")},
        fresh=True,
    )
    out = tmp_path / "out"
    lines = log_lines(out)
    steps = [line for line in lines if "loss" in line and "grad_norm" in line]
    assert [line["current_steps"] for line in steps] == [1, 2]
    for key in (
        "loss",
        "sft_loss",
        "odds_ratio_loss",
        "log_odds",
        "log_odds_ratio",
        "nll_loss",
        "grad_norm",
        "learning_rate",
        "lr",
        "logps/chosen",
        "logps/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "accuracy",
        "data_wait_fraction",
    ):
        assert math.isfinite(steps[0][key]), key
    assert steps[0]["loss"] == pytest.approx(steps[0]["sft_loss"] + 0.1 * steps[0]["odds_ratio_loss"], rel=1e-3)
    history = json.loads((out / "preference_eval.json").read_text())["history"]
    (evaluated,) = [
        line
        for line in json.loads((out / "trainer_state.json").read_text())["log_history"]
        if line["step"] == 2 and "eval_n" in line
    ]
    for key in (
        "rewards/chosen",
        "rewards/margins",
        "logps/chosen",
        "odds_ratio_loss",
        "log_odds",
        "logps/margin_p50",
        "ties",
        "n",
        "preference_accuracy",
        "preference_accuracy_low",
        "preference_accuracy_high",
        "preference_accuracy_sum",
        "sft_loss",
    ):
        assert evaluated[f"eval_{key}"] == pytest.approx(history[-1]["metrics"][key], rel=1e-6), key
    assert history[-1]["step"] == 2 and history[-1]["metrics"]["n"] == 6
    assert set(history[-1]["grounding"]) >= {"true", "grey", "other", "true_minus_grey"}
    assert len((out / "preference_pairs.jsonl").read_text().splitlines()) == 6
    for name in ("loss", "odds_ratio_loss", "sft_loss", "learning_rate", "eval_preference_accuracy"):
        assert (out / f"training_{name}.png").stat().st_size > 1000, name
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    names = {"train/loss", "train/odds_ratio_loss", "train/sft_loss", "eval/preference_accuracy", "eval/sft_loss"}
    assert wandb_history_keys(run) >= names | {"eval/examples"}
    assert tensorboard_tags(tmp_path) >= names
    table = json.loads(next(run.parent.rglob("*.table.json")).read_text())
    assert table["columns"][:3] == ["pair_id", "subset", "image"] and len(table["data"]) == 6
    staged = [p for p in (tmp_path / "wandb-data").rglob("*") if p.is_file() and p.read_bytes()[:4] == b"\x89PNG"]
    assert len(staged) >= 6  # the table's pictures, waiting to be synced
    assert json.loads((out / "trainer_state.json").read_text())["best_metric"] is not None


def test_four_bit_layers_are_the_language_model_only(tmp_path):
    write_rows(tmp_path, photo_rows(1, 1))

    def quantized(**keys):
        trainer = build_trainer(tmp_path, {**LORA, "quantization_bit": 4, **keys})
        return [n for n, m in trainer.model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]

    names = quantized()
    assert len([n for n in names if "language_model" in n]) == 2 * 7  # layers * (q k v o gate up down)
    assert not [n for n in names if "vision_tower" in n or "projector" in n or "lm_head" in n]
    assert [n for n in quantized(quantize_vision=True) if "vision_tower" in n]


def test_four_bit_training_goes_on_after_an_evaluation(tmp_path):
    """bitsandbytes' CPU inference kernels must not take over: they have no gradient."""
    write_rows(tmp_path, photo_rows(2, 1))
    trainer = build_trainer(tmp_path, {**LORA, "quantization_bit": 4, "eval_dataset": "rows", "eval_strategy": "steps"})
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    features = [trainer.train_dataset[i] for i in (0, 1)]
    loss, _, gradients = step(trainer, features)
    trainer.evaluate()
    loss_after, _, gradients_after = step(trainer, features)
    assert loss_after == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradients_after[name], gradient, rtol=1e-5, atol=1e-8)


def test_same_curve_with_and_without_shared_prefix(tmp_path):
    write_rows(tmp_path, photo_rows(12, 1))
    keys = {
        **LORA,
        "max_steps": 30,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    curves = []
    for shared in (True, False):
        out = tmp_path / f"out-{shared}"
        path = write_recipe(tmp_path, {**keys, "shared_prefix": shared, "output_dir": str(out)})
        run_cli("train", path)
        curves.append([line["loss"] for line in log_lines(out) if "loss" in line and "grad_norm" in line])
        assert len(curves[-1]) == 30
    assert curves[0][-1] < curves[0][0]  # it trained
    # trainer_log.jsonl rounds to 4 decimals
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-4 + 1e-9


def test_two_processes_score_and_train_like_one(tmp_path):
    """torchrun children load the plugin; no pair is scored twice or dropped; gradients are averaged over ranks."""
    write_rows(tmp_path, photo_rows(5, 1))
    keys = {
        **LORA,
        "eval_dataset": "rows",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "disable_shuffling": True,
        "ddp_timeout": 600,
    }
    scores = []
    for name, env, batch in (
        ("one", {}, 2),
        ("two", {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}, 1),
    ):
        out = tmp_path / name
        path = write_recipe(tmp_path, {**keys, "output_dir": str(out), "per_device_train_batch_size": batch})
        run_cli("train", path, env=env)
        pairs = [json.loads(line) for line in (out / "preference_pairs.jsonl").read_text().splitlines()]
        assert len({pair["pair_id"] for pair in pairs}) == len(pairs) == 5
        scores.append(pairs)
    for a, b in zip(*scores, strict=True):
        assert a["pair_id"] == b["pair_id"]
        assert b["chosen_logp"] == pytest.approx(a["chosen_logp"], rel=1e-5)
        assert b["rejected_logp"] == pytest.approx(a["rejected_logp"], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_export_is_published_and_equals_base_plus_adapter(tmp_path, method):
    """The exported folder loads in plain transformers with nothing missing and gives the trained model's logits."""
    base = random_model()
    write_rows(tmp_path, photo_rows(4, 1))
    tuning = {"lora": LORA, "dora": {**LORA, "use_dora": True}, "full": {"finetuning_type": "full"}}[method]
    run_cli("train", write_recipe(tmp_path, {**tuning, "max_steps": 3, "learning_rate": 5e-3}))
    merged = tmp_path / "merged"
    if method == "full":
        merged = tmp_path / "out"
    else:
        export = {
            "plugins": "llava_orpo",
            "model_name_or_path": str(base),
            "adapter_name_or_path": str(tmp_path / "out"),
            "template": "llava_v16_mistral",
            "infer_dtype": "float32",
            "export_dir": str(merged),
            "export_device": "cpu",
        }
        path = write_recipe(tmp_path, export, plain=True, name="export")
        run_cli("export", path, fresh=method == "lora")
        again = run_cli("export", path, check=False)
        assert again.returncode != 0 and "already holds files" in again.stderr
        run_cli("export", path, "overwrite_export_dir=true")
        card = (merged / "README.md").read_text(encoding="utf-8")
        trained = yaml.safe_load((tmp_path / "out" / "trained_with.yaml").read_text(encoding="utf-8"))
        assert trained["data"] == {"rows": "rows.parquet"} and trained["recipe"]["max_steps"] == 3
        assert "max_steps: 3" in card and "SHA-256 of adapter_model.safetensors: `" in card
        assert str(tmp_path) not in card and str(base.parent) not in card

    from safetensors import safe_open

    with safe_open(merged / "model.safetensors", "pt") as f:
        names = set(f.keys())
    with safe_open(base / "model.safetensors", "pt") as f:
        assert names == set(f.keys())  # the published layout
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (base / name).read_bytes(), name

    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(merged)
    image = Image.open(io.BytesIO(photo_rows(1, 1)[0]["image"]["bytes"]))
    inputs = processor(images=image, text="[INST] <image>\nWhat? [/INST] This.", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        original = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
        untrained = original(**inputs).logits
        if method != "full":
            from peft import PeftModel

            expected = PeftModel.from_pretrained(original, tmp_path / "out")(**inputs).logits
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (logits - untrained).abs().max() > 1e-3


def test_full_training_resumes_from_its_checkpoint(tmp_path):
    """Four steps in one go equal two, a stop, and two more."""
    write_rows(tmp_path, photo_rows(4, 1))
    keys = {
        "finetuning_type": "full",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
    }
    run_cli("train", write_recipe(tmp_path, {**keys, "output_dir": str(tmp_path / "whole")}))
    path = write_recipe(tmp_path, {**keys, "output_dir": str(tmp_path / "parts")})
    run_cli("train", path, "max_steps=2")
    run_cli("train", path, f"resume_from_checkpoint={tmp_path}/parts/checkpoint-2")
    from safetensors.torch import load_file

    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-5, atol=1e-6)


def test_plain_llamafactory_recipe_still_runs(tmp_path):
    """No `plugins:` key: LLaMA-Factory's own converter, template, collator and step."""
    write_rows(tmp_path, photo_rows(2, 1))
    rows = []
    for i, row in enumerate(photo_rows(2, 1)):
        picture = tmp_path / f"{i}.jpg"
        picture.write_bytes(row["image"]["bytes"])
        rows.append(
            {
                "instruction": "<image>\n" + row["question"],
                "chosen": row["chosen"],
                "rejected": row["rejected"],
                "images": [str(picture)],
            }
        )
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    info = {
        "plain": {
            "file_name": "plain.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected", "images": "images"},
        }
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    keys = {
        "model_name_or_path": str(random_model()),
        "stage": "dpo",
        "do_train": True,
        "pref_loss": "orpo",
        **LORA,
        "dataset_dir": str(tmp_path),
        "dataset": "plain",
        "template": "llava_next_mistral",
        "cutoff_len": 4096,
        "output_dir": str(tmp_path / "plain-out"),
        "report_to": "none",
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 1,
        "use_cpu": True,
    }
    run_cli("train", write_recipe(tmp_path, keys, plain=True), fresh=True)
    (line,) = [line for line in log_lines(tmp_path / "plain-out") if "loss" in line]
    assert "sft_loss" not in line and (tmp_path / "plain-out" / "adapter_model.safetensors").exists()


def test_every_recipe_has_a_header_and_known_keys():
    """Each recipe says what it does, its command, hardware and result; every key is LLaMA-Factory's or the plugin's."""
    from llamafactory.hparams.parser import _INFER_ARGS, _TRAIN_ARGS

    from llava_orpo.arguments import PLUGIN_KEYS

    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 4
    for path in recipes:
        text = path.read_text()
        if "llamafactory-cli" not in text:
            continue  # an accelerate or DeepSpeed file
        header = text.split("\n###")[0]
        assert "llamafactory-cli" in header and "Hardware:" in header and "Comes out:" in header, path
        known = set(PLUGIN_KEYS) | {f for c in {*_TRAIN_ARGS, *_INFER_ARGS} for f in c.__dataclass_fields__}
        assert not set(yaml.safe_load(text)) - known, path
