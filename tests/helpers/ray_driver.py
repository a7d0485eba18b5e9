"""`python -m helpers.ray_driver recipe.json`: trains a recipe on Ray, with one CPU per worker.

LLaMA-Factory 0.9.5 asks 10 CPUs for every CPU of the cluster, which none has; the demand is swapped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llamafactory.train import tuner
from ray.util.placement_group import placement_group


def main(recipe: dict) -> None:
    bundle = {"CPU": 1}
    remote_config = tuner.get_ray_remote_config_for_worker
    tuner.get_placement_group = lambda _: (placement_group([bundle] * recipe["ray_num_workers"]), bundle)
    tuner.get_ray_remote_config_for_worker = lambda **keys: {**remote_config(**keys), "num_cpus": 1}
    tuner.run_exp(recipe)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
