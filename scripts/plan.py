"""What a recipe costs, before any weight is loaded: tokens, FLOPs, memory per GPU and engine, disk, hours.

    python scripts/plan.py recipes/llava16_orpo_qlora.yaml
    python scripts/plan.py recipes/llava16_orpo_qlora.yaml gpu=rtx4090,a100-80 gpus=4 lora_rank=32
    python scripts/plan.py recipes/tiny/llava16_orpo_qlora.yaml

Takes a recipe and overrides like llamafactory-cli. The step is traced at its true shapes on tensors without data, for
the longest batch (memory) and a typical one (FLOPs): seconds for a small model, minutes for 7 B parameters, because
`recompute: auto` is looked for on every GPU: as few recomputed decoder layers as its memory allows, and the hours then.
Model shapes and pair sizes come from the recipe's files. If the model is not on this machine and the Hub is not
reached, the published model's shapes are taken; if the data is not here, stated assumptions. Everything printed is
computed. Own keys:

    gpu            names, with commas: rtx3090, rtx4090, l4, a10g, a6000, l40s, a100-40, a100-80, h100, h200
    gpus           how many of them (default 1): DDP, ZeRO-2, ZeRO-3 and FSDP are then shown too
    utilization    share of the GPU's dense bf16 rate that hours assume (default 0.4)
    sample         read only the first so many pairs of every dataset (default 0: all)
    assume         true: assumed pair sizes although the data is here
    pairs_per_image  with assumed sizes: pairs on each image under group_pairs_by_image (default 1)
    variants       true: only trace the settings that docs/scaling.md and docs/benchmarks.md show
    out            the JSON file (default outputs/plan/<recipe>.json)

If a GPU does not hold the recipe, the keys that would change this are named.
"""

from __future__ import annotations

import os
from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import read_command, run

OWN_KEYS = {
    "gpu": str,
    "gpus": 1,
    "utilization": 0.4,
    "sample": 0,
    "assume": False,
    "pairs_per_image": 1,
    "variants": False,
    "out": Path,
}


def main(argv: list[str]) -> int:
    # no file of the recipe has to be there, and neither has a GPU
    command = read_command(__doc__, argv, OWN_KEYS, uses=())
    recipe, own = command.recipe, command.own
    if not 0 < own["utilization"] <= 1:
        raise UsageError("utilization must be more than 0 and at most 1.")
    if min(own["gpus"], own["pairs_per_image"]) < 1 or own["sample"] < 0:
        raise UsageError("gpus and pairs_per_image must be 1 or more, sample 0 or more.")
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")  # read when LLaMA-Factory is imported
    from llava_orpo.plan.gpus import named

    gpus = named(own["gpu"])
    from llava_orpo import precheck
    from llava_orpo.files import write_json
    from llava_orpo.plan import reading, report, sizes

    config, model_source = sizes.load_config(recipe)
    out = own["out"] or Path("outputs/plan") / f"{command.file.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if own["variants"]:
        write_json(out, report.variants(recipe, config, model_source, gpus))
        print(out)
        return 0
    here = Path(recipe["model_name_or_path"]).is_dir() and not precheck.problems(recipe, uses=("dataset",))
    if own["assume"] or not here or not sizes.data_is_here(recipe):
        data = sizes.assumed(config, own["pairs_per_image"])
    else:
        data = reading.read(recipe, config, own["sample"])
    result = report.plan(recipe, config, (model_source, data.source), data, gpus, own["gpus"], own["utilization"])
    write_json(out, result)
    print(f"{report.show(result)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
