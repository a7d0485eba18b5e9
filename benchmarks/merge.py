"""Merging an adapter (`llamafactory-cli export`): tensor by tensor, and with the whole model in memory.

    python benchmarks/merge.py                    # slice7b in float16, rank 64, to bfloat16: 1.5 GB of weights

Each side runs in a process of its own, in turn, on the same folders: the export of recipes/llava16_merge.yaml from
reading the recipe to the finished folder, imports not counted. Every file of both sides is compared, byte for byte.

Peak memory: resident, with the pages of memory-mapped files (`peak_bytes`, VmHWM) and without (`peak_own_bytes`,
RssAnon, read every 20 ms), each in all and above what the imports had taken before. `slice7b` has the 7B's largest
tensors, and tensor by tensor nothing grows with the number of layers but their names: its peak is the 7B's. With the
whole model in memory the 7B's other layers come on top; that row is computed.

Writes results/merge_<geometry>.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import measure
import setting
import torch

SIDES = {"streamed": "tensor by tensor", "whole": "whole model in memory"}
NOTE = "MERGE-BENCHMARK "
REPEATS = 2


def make_base(geometry: str, folder: Path) -> Path:
    """A random base in float16, as the published one is stored."""
    from llava_orpo.tiny import random_model

    return random_model.write_sharded(setting.GEOMETRIES[geometry], folder, torch.float16)


def make_adapter(base: Path, rank: int, folder: Path) -> Path:
    """A LoRA adapter on decoder and projector with random weights, made without loading the model."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    from llava_orpo.checkpoint.merge import make_skeleton

    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=setting.LORA["lora_target"].split(","),
        exclude_modules=r".*vision_tower.*",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(make_skeleton(base), settings, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    folder.mkdir()
    settings.base_model_name_or_path = str(base)
    settings.save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def one_merge(side: str, base: Path, adapter: Path, out: Path) -> None:
    """Runs the export in this process and says what it took, in a line that begins with `NOTE`."""
    from llamafactory.train.tuner import export_model

    from llava_orpo import autoload
    from llava_orpo.checkpoint.merge import NotStreamed
    from llava_orpo.integration import export

    autoload.install()
    if side == "whole":

        def refuse(*args):
            raise NotStreamed("the benchmark compares both")

        export.streamed = refuse
    before, own, done = measure._status("VmRSS"), [0], threading.Event()
    own_before = measure._status("RssAnon")

    def watch() -> None:
        while not done.wait(0.02):
            own[0] = max(own[0], measure._status("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    given = {"plugins": "llava_orpo", "template": "llava_v16_mistral", "infer_dtype": "bfloat16"}
    given |= {"model_name_or_path": str(base), "adapter_name_or_path": str(adapter), "export_dir": str(out)}
    Path("/proc/self/clear_refs").write_text("5")
    started, computed = time.perf_counter(), time.process_time()
    export_model({**given, "export_device": "cpu", "export_size": 5})
    facts = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - computed}
    done.set()
    facts |= {"before_bytes": before, "own_before_bytes": own_before}
    print("\n" + NOTE + json.dumps({**facts, "peak_bytes": measure._status("VmHWM"), "peak_own_bytes": own[0]}))


def files(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of a merged folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def run_side(side: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--folders", str(base), str(adapter), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith(NOTE)), None)
    if done.returncode or line is None:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(line[len(NOTE) :])


def seven_b(sides: dict[str, dict[str, float]], weights: int) -> dict[str, Any]:
    """The 7B's peaks, computed from the slice's; its weights are exact, from its shapes."""
    from llava_orpo.tiny import random_model

    whole = sum(size for _, size in random_model.tensor_sizes(setting.GEOMETRIES["7b"], torch.bfloat16).values())
    more = whole - weights
    return {
        "weights_bytes": whole,
        "peak_own_bytes": {
            "streamed": sides["streamed"]["peak_own_bytes"],
            "whole": sides["whole"]["peak_own_bytes"] + more,
        },
    }


def show(result: dict) -> str:
    """The table of a run."""
    sides, ratio = result["sides"], result["ratios"]
    rows = [
        ["seconds", *(sides[side]["seconds"] for side in SIDES), f"{ratio['seconds']:.2f}x"],
        ["CPU time, s", *(sides[side]["cpu_seconds"] for side in SIDES), f"{ratio['cpu_seconds']:.2f}x"],
    ]
    for key, name in (
        ("peak_own_bytes", "peak memory, GB"),
        ("own_over_imports_bytes", "of it the merge, GB"),
        ("peak_bytes", "peak with mapped files, GB"),
    ):
        rows.append([name, *(sides[side][key] / 1e9 for side in SIDES), f"{ratio[key]:.2f}x"])
    if "7b" in result:
        found = result["7b"]["peak_own_bytes"]
        cells = [found[side] / 1e9 for side in SIDES]
        rows.append(["peak memory of the 7B, GB (computed)", *cells, f"{found['whole'] / found['streamed']:.2f}x"])
    head = f"{result['geometry']}, {result['weights_bytes'] / 1e9:.2f} GB of weights"
    same = "The files of both are the same, byte for byte." if result["same_files"] else "THE FILES DIFFER."
    return measure.table([head, *SIDES.values(), "ratio"], rows) + "\n\n" + same


def main() -> None:
    parser = measure.parser(__doc__, smoke="a tiny model, once: does it run")
    parser.add_argument("--geometry", choices=setting.GEOMETRIES, default="slice7b")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folders", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        one_merge(args.side, *args.folders)
        return
    geometry = "smoke" if args.smoke else args.geometry
    rank = max(2, setting.lora_rank(setting.GEOMETRIES[geometry]))
    setting.WORK.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(dir=setting.WORK) as name:
        folder = Path(name)
        base = make_base(geometry, folder / "base")
        adapter = make_adapter(base, rank, folder / "adapter")
        weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        for _ in range(1 if args.smoke else REPEATS):
            for side in SIDES:
                out = folder / side / "merged"
                runs[side].append(run_side(side, base, adapter, out))
                print(side, json.dumps(runs[side][-1]), flush=True)
                found[side] = files(out)
                shutil.rmtree(out)
    sides = {side: {key: measure.median(run[key] for run in ran) for key in ran[0]} for side, ran in runs.items()}
    for side in sides.values():
        side["own_over_imports_bytes"] = side["peak_own_bytes"] - side["own_before_bytes"]
    ratios = {key: sides["whole"][key] / sides["streamed"][key] for key in sides["whole"] if "before" not in key}
    result: dict[str, Any] = {
        "geometry": geometry,
        "rank": rank,
        "weights_bytes": weights,
        "repeats": len(runs["whole"]),
    }
    result |= {"sides": sides, "ratios": ratios, "same_files": found["streamed"] == found["whole"]}
    if geometry == "slice7b":
        result["7b"] = seven_b(sides, weights)
    path = measure.save("merge" if args.smoke else f"merge_{geometry}", result, args.out)
    print(f"{show(result)}\n{path}")
    if not result["same_files"]:
        raise SystemExit("the files of both sides differ")


if __name__ == "__main__":
    main()
