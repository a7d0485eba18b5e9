"""One training step (forward and backward) of each loss of the family, against LLaMA-Factory's plain ORPO, in turn.

    python benchmarks/losses.py --geometry tiny
    python benchmarks/losses.py --geometry mid --repeats 3

All sides have the same weights, token ids and pixels (a 640x480 photograph, 336-pixel anyres), one pair, fp32 and LoRA,
as benchmarks/orpo_step.py. LLaMA-Factory's own step is measured with each loss that it has: orpo, simpo and dpo (its
`sigmoid`, the reference by adapter off). Seconds are medians of runs in turn, A B C A B C; where the machine was busy,
the FLOPs are the firmer number. A step with a damaged image includes neither decoding nor damaging, which the
dataloader's workers do; `damage_milliseconds` gives that for one image. `dpo_context` has its own data, whose context
makes the prompt longer; `dpo, cached` needs no second forward: both are the step of another row and not run here.
Writes results/losses_<geometry>.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import measure
import setting

from llava_orpo.data import damaged
from llava_orpo.data.image_store import load_image

DAMAGED = {"damaged_image": "masked"}
STOCK = {  # LLaMA-Factory's own step
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "dpo": {"pref_loss": "sigmoid"},
}
OURS = {
    "orpo": {"preference_loss": "orpo"},
    "orpo + image term": {"preference_loss": "orpo", "image_preference": 0.1, **DAMAGED},
    "simpo": {"preference_loss": "simpo"},
    "pea + image term": {
        "preference_loss": "pea",
        "image_preference": 0.2,
        "image_preference_loss": "hinge",
        **DAMAGED,
    },
    "dpo": {"preference_loss": "dpo", "reference": "adapter_off"},
    "mdpo": {"preference_loss": "mdpo", "reference": "adapter_off", "damaged_image": "crop"},
    "sft": {"preference_loss": "sft"},
}
SIDES = {f"stock: {name}": keys for name, keys in STOCK.items()} | {
    f"ours: {name}": keys for name, keys in OURS.items()
}
BASE = "stock: orpo"
HEAD = ["loss", "s per pair", "tokens per pair", "GFLOP", "seconds of plain ORPO", "FLOPs of plain ORPO", "own loss: s"]


def build(name: str, geometry: str, folder: Path):
    """The trainer of one of `SIDES`."""
    side, _, loss = name.partition(": ")
    keys = STOCK[loss] if side == "stock" else {"pref_loss": None, **OURS[loss]}
    return setting.build(side, geometry, folder, **keys)


def batch_of(trainer) -> dict:
    """The batch of the one pair, in the first epoch."""
    row = {**trainer.train_dataset[0], "epoch": 0}
    return trainer._prepare_inputs(trainer.data_collator([row]))


def tokens(batch: dict) -> int:
    """Positions of one forward of the language model."""
    return batch["packed"].num_tokens if "packed" in batch else batch["input_ids"].numel()


def damage_milliseconds(row: dict, repeats: int) -> dict[str, float]:
    """Milliseconds to damage one decoded 640x480 photograph, by kind: the median."""
    picture = load_image(row["image"])
    return {
        kind: 1e3
        * measure.median(
            measure.timed(lambda kind=kind, seed=seed: damaged.damage(picture, kind, str(seed), picture))
            for seed in range(repeats)
        )
        for kind in damaged.KINDS
    }


def compare(geometry: str, repeats: int, folder: Path) -> dict:
    """Measures all sides in this process."""
    setting.write_rows(folder, 1, 1)
    trainers = {name: build(name, geometry, folder) for name in SIDES}
    for trainer in trainers.values():  # LoRA's B becomes nonzero; every side has the same tensors
        setting.share_weights(trainers[BASE].model, trainer.model)
    batches = {name: batch_of(trainer) for name, trainer in trainers.items()}
    result: dict = {"geometry": geometry, "pairs_per_image": 1, "repeats": repeats, "sides": {}}
    for name, trainer in trainers.items():  # the first pass warms up, counts FLOPs and gives loss and gradients
        losses: list[float] = []

        def one_pass(trainer=trainer, batch=batches[name], losses=losses):
            losses.append(setting.forward_backward(trainer, batch))

        flops = measure.count_flops(one_pass)
        result["sides"][name] = {"loss": losses[0], "lm_tokens": tokens(batches[name]), "flops": flops["total"]}
        twin = "stock: " + name.removeprefix("ours: ")
        if name.startswith("stock"):
            result["sides"][name]["gradients"] = setting.gradients(trainer)
        elif twin in result["sides"]:
            found, expected = setting.gradients(trainer), result["sides"][twin]["gradients"]
            result["sides"][name]["gradient_difference"] = setting.largest_difference(found, expected)
        trainer.model.zero_grad(set_to_none=True)
    for side in result["sides"].values():
        side.pop("gradients", None)

    def run(name: str, repeat: int) -> None:
        setting.forward_backward(trainers[name], batches[name])
        trainers[name].model.zero_grad(set_to_none=True)

    seconds = measure.in_turn({name: lambda repeat, name=name: run(name, repeat) for name in SIDES}, repeats)
    for name, side in result["sides"].items():
        side["seconds_of_each"] = seconds[name]
        side["seconds_per_pair"] = measure.median(seconds[name])
    result["damage_milliseconds"] = damage_milliseconds(trainers[BASE].train_dataset[0], 3 * repeats)
    return result


def relative(result: dict, name: str, to: str = BASE) -> dict[str, float]:
    """{seconds, flops, lm_tokens} of a side over those of another, LLaMA-Factory's plain ORPO; below 1 is cheaper."""
    side, other = result["sides"][name], result["sides"][to]
    keys = {"seconds": "seconds_per_pair", "flops": "flops", "lm_tokens": "lm_tokens"}
    return {short: side[key] / other[key] for short, key in keys.items()}


def show(result: dict) -> str:
    """The table of one run: cost relative to LLaMA-Factory's plain ORPO, and to its step of the same loss."""
    rows = []
    for name, side in result["sides"].items():
        found, twin = relative(result, name), "stock: " + name.removeprefix("ours: ")
        own = ""
        if name.startswith("ours") and twin in result["sides"]:
            own = f"{relative(result, name, twin)['seconds']:.2f}"
        label = name.replace("stock:", "LLaMA-Factory:")
        cost = [f"{found['seconds']:.2f}", f"{found['flops']:.2f}", own]
        rows.append([label, side["seconds_per_pair"], side["lm_tokens"], side["flops"] / 1e9, *cost])
    worst = max(side.get("gradient_difference", 0.0) for side in result["sides"].values())
    kinds = ", ".join(f"{kind} {value:.1f}" for kind, value in result["damage_milliseconds"].items())
    return (
        f"`{result['geometry']}`, one pair per image. LLaMA-Factory's tokens are those of two padded\n"
        f"sequences; dpo and mdpo run theirs twice, the second time without gradients.\n\n"
        f"{measure.table(HEAD, rows)}\n\n"
        f"Largest relative gradient difference from LLaMA-Factory's own step of the same loss: {worst:.0e}.\n"
        f"Damaging one 640x480 photograph in a worker, milliseconds: {kinds}."
    )


def costs(results: list[dict]) -> str:
    """The table of docs/losses.md: seconds (FLOPs) over LLaMA-Factory's plain ORPO, a column per model."""
    head = (
        ["loss", *(f"`{result['geometry']}`: seconds (FLOPs)" for result in results)] if results else ["loss", "cost"]
    )
    rows = []
    for name in SIDES:
        found = [relative(result, name) for result in results]
        cells = [f"{each['seconds']:.2f} ({each['flops']:.2f})" for each in found] or ["not yet measured"]
        rows.append([name.replace("stock:", "LLaMA-Factory:"), *cells])
    return measure.table(head, rows)


def main() -> None:
    parser = measure.parser(__doc__, smoke="smallest model, one repeat: does it run")
    parser.add_argument("--geometry", choices=setting.GEOMETRIES, default="mid")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.smoke:
        args.geometry, args.repeats = "smoke", 1
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args.geometry, args.repeats, Path(folder))
    path = measure.save(f"losses_{args.geometry}", result, args.out)
    print(f"{show(result)}\n{path}")


if __name__ == "__main__":
    main()
