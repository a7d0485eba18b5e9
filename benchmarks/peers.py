"""The same pairs through ms-swift, LLaMA-Factory and LLaMA-Factory with the plugin, as whole command-line runs.

    bash benchmarks/install_ms_swift.sh              # once: .venv-ms-swift
    python benchmarks/peers.py                       # geometry mid, 6 steps of 1 pair

ms-swift and LLaMA-Factory run untouched: their own templates, collators and trainers, `swift rlhf --rlhf_type orpo`
and `llamafactory-cli train`. All run in fp32 with LoRA on the language model's linear layers and batch 1, without
gradient checkpointing. Seconds per step are each program's own `train_runtime` over the number of steps, data loading
and optimizer included; peak memory is the whole process's maximum resident set. Writes results/peers_<geometry>.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import setting
import yaml

NAMES = {"swift": "ms-swift 4.6.0", "stock": "LLaMA-Factory 0.9.5", "ours": "LLaMA-Factory + llava_orpo"}
LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def write_rows(folder: Path, images: int) -> None:
    """The rows of `setting.write_rows`, and the same as JSON lines with image files for ms-swift."""
    rows = setting.write_rows(folder, images, 1)
    with open(folder / "swift.jsonl", "w", encoding="utf-8") as f:
        for row in rows:
            picture = folder / row["image"]["path"]
            picture.write_bytes(row["image"]["bytes"])
            messages = [
                {"role": "user", "content": "<image>" + row["question"]},
                {"role": "assistant", "content": row["chosen"]},
            ]
            line = {"messages": messages, "rejected_response": row["rejected"], "images": [str(picture)]}
            f.write(json.dumps(line) + "\n")


def factory_command(side: str, geometry: str, folder: Path, steps: int) -> list[str]:
    keys = setting.recipe(
        geometry,
        folder,
        lora_target=LAYERS,
        freeze_multi_modal_projector=True,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-5,
        gradient_accumulation_steps=1,
        overwrite_output_dir=True,
        output_dir=str(folder / side),
    )
    if side == "stock":
        keys = setting.without_plugin(keys)
    path = folder / f"{side}.yaml"
    path.write_text(yaml.safe_dump(keys))
    return [str(Path(sys.executable).parent / "llamafactory-cli"), "train", str(path)]


def swift_command(geometry: str, folder: Path, steps: int, venv: Path) -> list[str]:
    rank = setting.lora_rank(setting.GEOMETRIES[geometry])
    options = {
        "rlhf_type": "orpo",
        "model": setting.model_folder(geometry),
        "model_type": "llava1_6_mistral_hf",
        "template": "llava1_6_mistral_hf",
        "tuner_type": "lora",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "dataset": folder / "swift.jsonl",
        "split_dataset_ratio": 0,
        "max_length": 4096,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "vit_gradient_checkpointing": "false",
        "beta": 0.1,
        "learning_rate": 1e-5,
        "lora_rank": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0,
        "freeze_vit": "true",
        "freeze_aligner": "true",
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": folder / "swift",
        "add_version": "false",
        "report_to": "none",
        "use_hf": "true",
        "use_cpu": "true",
        "bf16": "false",
        "fp16": "false",
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [str(venv / "bin" / "swift"), "rlhf", *words, "--target_modules", *LAYERS.split(",")]


def train_runtime(output: Path) -> float:
    """The program's own train_runtime: train_results.json (LLaMA-Factory) or logging.jsonl (ms-swift)."""
    results = output / "train_results.json"
    if results.exists():
        return float(json.loads(results.read_text())["train_runtime"])
    for line in reversed((output / "logging.jsonl").read_text().splitlines()):
        if "train_runtime" in json.loads(line):
            return float(json.loads(line)["train_runtime"])
    raise ValueError(f"{output} has neither train_results.json nor a train_runtime in logging.jsonl")


def run(command: list[str], output: Path, log: Path, steps: int) -> dict:
    """Runs one program to its end; returns seconds and peak memory of that process alone."""
    started = time.perf_counter()
    environment = {**os.environ, "USE_HF": "1", "HF_HUB_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1"}
    environment["HF_DATASETS_CACHE"] = str(output.parent / f"cache-{output.name}")
    with open(log, "w", encoding="utf-8") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return {
        "seconds_per_step": train_runtime(output) / steps,
        "whole_run_seconds": time.perf_counter() - started,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def ratios(sides: dict[str, dict]) -> dict[str, float]:
    """Each peer's seconds and bytes over ours; above 1 ours is better."""
    out = {}
    for name in sides.keys() - {"ours"}:
        out[f"{name}_speed"] = sides[name]["seconds_per_step"] / sides["ours"]["seconds_per_step"]
        out[f"{name}_memory"] = sides[name]["peak_bytes"] / sides["ours"]["peak_bytes"]
    return out


def show(result: dict) -> str:
    """The table of a run."""
    rows = [
        [
            NAMES[name],
            side["seconds_per_step"],
            side["peak_bytes"] / 1e9,
            side["whole_run_seconds"],
            result["ratios"].get(f"{name}_speed", 1.0),
        ]
        for name, side in result["sides"].items()
    ]
    what = f"{result['geometry']}, {result['steps']} steps"
    return measure.table([what, "s per step", "peak RSS, GB", "whole run, s", "step / ours"], rows)


def main() -> None:
    parser = measure.parser(__doc__, smoke="smallest model, 2 steps: does it run")
    parser.add_argument("--geometry", choices=setting.GEOMETRIES, default="mid")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--venv", type=Path, default=setting.ROOT / ".venv-ms-swift")
    parser.add_argument("--without-swift", action="store_true", help="LLaMA-Factory and ours only")
    args = parser.parse_args()
    if args.smoke:
        args.geometry, args.steps = "smoke", 2
    if not args.without_swift and not (args.venv / "bin" / "swift").exists():
        raise SystemExit(f"No ms-swift in {args.venv}: run `bash benchmarks/install_ms_swift.sh`, or --without-swift.")
    sides = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, args.steps)
        commands = {side: factory_command(side, args.geometry, folder, args.steps) for side in ("stock", "ours")}
        if not args.without_swift:
            commands = {"swift": swift_command(args.geometry, folder, args.steps, args.venv), **commands}
        for side, command in commands.items():
            sides[side] = run(command, folder / side, folder / f"{side}.log", args.steps)
    result = {"geometry": args.geometry, "steps": args.steps, "sides": sides, "ratios": ratios(sides)}
    path = measure.save(f"peers_{args.geometry}", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
