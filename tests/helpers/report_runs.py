"""Output folders as an evaluation leaves them, made by hand for the report's tests."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from llava_orpo.preference import metrics, records
from llava_orpo.preference.records import ScoredPair

SOURCES = ("COCO", "VQA v2", "a source with a rather long name, as they come")
TYPES = ("question answering", "detailed description")
COLORS = ("crimson", "royalblue", "seagreen", "goldenrod")


def draw_image(path: Path, seed: int, size: tuple[int, int] = (400, 300), noise: bool = False) -> None:
    """A picture of shapes; with noise it compresses as badly as a photo does."""
    rng = random.Random(seed)
    if noise:
        image = Image.merge("RGB", [Image.effect_noise(size, 60) for _ in range(3)])
    else:
        image = Image.new("RGB", size, "lightgrey")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, r = rng.randrange(size[0]), rng.randrange(size[1]), rng.randrange(10, 80)
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x - r, y - r, x + r, y + r), fill=rng.choice(COLORS))
    path.parent.mkdir(exist_ok=True)
    image.save(path)


def make_pairs(n: int, gain: float, seed: int, condition: str = "true") -> list[ScoredPair]:
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        fixed = random.Random(f"pair {i}")  # what belongs to the pair is the same in every run
        source, kind = fixed.choice(SOURCES[:2] if i < n - 5 else SOURCES), fixed.choice(TYPES)
        longest = 40 if kind == TYPES[0] else 160
        chosen_tokens, rejected_tokens = fixed.randint(5, longest), fixed.randint(5, longest)
        rejected = -rng.uniform(0.5, 1.6)
        chosen = min(-0.02, rejected + rng.gauss(gain, 0.35))
        pairs.append(
            ScoredPair(
                pair_id=f"demo-{i:04d}",
                dataset="demo_heldout",
                subset=f"{source}/{kind}",
                source=source,
                question_type=kind,
                image_hash=f"hash{i // 2}",
                image_condition=condition,
                chosen_logp=chosen * chosen_tokens,
                rejected_logp=rejected * rejected_tokens,
                chosen_tokens=chosen_tokens,
                rejected_tokens=rejected_tokens,
            )
        )
    return pairs


def write_training(folder: Path, steps: int = 200) -> None:
    rng = random.Random(3)
    log = []
    for step in range(2, steps + 1, 2):
        odds, sft = (
            0.69 * math.exp(-step / 120) + rng.gauss(0, 0.03),
            1.2 * math.exp(-step / 300) + rng.gauss(0, 0.04),
        )
        log.append(
            {
                "step": step,
                "epoch": step / 100,
                "loss": sft + 0.1 * odds,
                "learning_rate": 5e-5 * (1 + math.cos(math.pi * step / steps)) / 2,
                "odds_ratio_loss": odds,
                "sft_loss": sft,
                "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.4 * step / steps + rng.gauss(0, 0.1))),
            }
        )
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    lines = [{"current_steps": e["step"], "loss": e["loss"], "lr": e["learning_rate"]} for e in log]
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_history(folder: Path, n: int = 160, steps: int = 200) -> None:
    for step in range(0, steps + 1, 25):
        gain = 0.02 + 0.45 * step / steps
        conditions = [
            make_pairs(n, g, seed, c)
            for g, seed, c in ((gain, step, "true"), (0.0, step + 1, "grey"), (0.02, step + 2, "other"))
        ]
        entry = {
            "step": step,
            "epoch": step / 100,
            "dataset": "demo_heldout",
            "metrics": metrics.summarize(conditions[0], beta=0.1),
            "grounding": metrics.grounding(*conditions, n_boot=200),
        }
        records.append_history(folder / "preference_eval.json", entry)


def write_examples(folder: Path, pairs: list[ScoredPair], noise: bool = False) -> None:
    lines, generations = [], []
    for i, pair in enumerate(pairs):
        image = {"path": f"images/{pair.image_hash}.png"}
        if not (folder / image["path"]).exists():
            draw_image(folder / image["path"], seed=i // 2, size=((400, 300), (300, 420))[i % 4 // 2], noise=noise)
        detail = " The table is made of wood, and a window lets in the light of the afternoon." * (i % 4 * 2)
        texts = {
            "dataset": pair.dataset,
            "pair_id": pair.pair_id,
            "image": image,
            "question": f"What is on the {('table', 'shelf', 'road')[i % 3]}, and what colour is it?",
            "chosen": f"There is a {COLORS[i % 4]} ball on the left, near two smaller boxes.{detail}",
            "rejected": f"There is a {COLORS[(i + 1) % 4]} cat on the left, near two smaller boxes.{detail}",
        }
        lines.append(texts | {k: getattr(pair, k) for k in ("subset", "chosen_logp", "rejected_logp")})
        answers = {
            "base": f"A cat sits on the left. Answer {i:03d}.",
            "orpo": f"A {COLORS[i % 4]} ball. Answer {i:03d}.",
        }
        generations.append(texts | {"subset": pair.subset, "answers": answers})
    write_lines(folder / "preference_examples.jsonl", lines)
    write_lines(folder / "generations.jsonl", generations)


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_run(folder: Path, n: int = 160, examples: int = 40, noise: bool = False) -> tuple[Path, Path]:
    """A trained run with everything in it, and a baseline folder with the base model's scores."""
    after, before = folder / "llava16_orpo", folder / "base"
    for place in (after, before):
        place.mkdir(parents=True)
    pairs = make_pairs(n, 0.47, seed=200)
    records.write_pairs(after / "preference_pairs.jsonl", pairs)
    records.write_pairs(before / "preference_pairs.jsonl", make_pairs(n, 0.02, 0))
    for i, (condition, gain) in enumerate((("grey", 0.0), ("other", 0.02))):
        records.write_pairs(after / f"preference_pairs_{condition}.jsonl", make_pairs(n, gain, 201 + i, condition))
        records.write_pairs(before / f"preference_pairs_{condition}.jsonl", make_pairs(n, gain, 1 + i, condition))
    write_training(after)
    write_history(after, n)
    write_examples(after, pairs[:examples], noise)
    adapter = {"base_model_name_or_path": "llava-hf/llava-v1.6-mistral-7b-hf", "peft_type": "LORA", "r": 32}
    (after / "adapter_config.json").write_text(json.dumps(adapter))
    (after / "all_results.json").write_text(json.dumps({"train_runtime": 1234.5}))
    return after, before
