"""The model's config and the sizes of a recipe's pairs: from the files where they are here, else stated assumptions."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.anyres import AnyresGeometry
from ..errors import UserError
from ..loss_keys import runs_damaged, runs_rejected
from ..step.batches import fill_batches, image_runs
from . import hub
from .trace import PairSize

PUBLISHED = "llava-hf/llava-v1.6-mistral-7b-hf"
PUBLISHED_CONFIG = Path(__file__).with_name("llava16_mistral_7b.json")
PHOTO = (640, 480)  # COCO's usual size
HEAD, QUESTION, CHOSEN, REJECTED = 6, 26, 80, 65  # tokens assumed of a pair whose data is not here
EPOCH = 83132  # pairs of RLAIF-V


@dataclass(frozen=True)
class Data:
    """Sizes of all pairs with their images' hashes ("": none, never grouped), and where they come from.

    pairs counts an epoch's pairs; assumed data has one pair in `sizes` for all of them.
    """

    sizes: list[PairSize]
    hashes: list[str]
    pairs: int
    source: str
    assumed: bool = False

    def pairs_per_image(self) -> dict[int, int]:
        """{pairs on one image: how many images have so many}."""
        per_image = Counter(Counter(name for name in self.hashes if name).values())
        return dict(sorted(per_image.items()))

    def groups(self, batch: int, max_pairs: int | None) -> list[list[list[PairSize]]]:
        """The batches of an epoch in the data's order, each a list of groups; max_pairs None: no grouping."""
        order = list(range(len(self.sizes)))
        keys = self.hashes if max_pairs else [""] * len(order)
        if max_pairs:
            order = fill_batches(image_runs(keys, order, max_pairs), batch)
        batches = [order[start : start + batch] for start in range(0, len(order), batch)]
        return [
            [[self.sizes[i] for i in run] for run in image_runs(keys, members, max_pairs or 1)] for members in batches
        ]

    def longest(self, batch: int, max_pairs: int | None) -> list[list[int]]:
        """The numbers of the pairs of the longest batch that a shuffled epoch can draw, one list per group."""
        order = list(range(len(self.sizes)))
        runs = image_runs(self.hashes, order, max_pairs) if max_pairs and batch > 1 else [[i] for i in order]
        runs = sorted(runs, key=lambda run: -group_tokens([self.sizes[i] for i in run]) / len(run))
        picked: list[list[int]] = []
        for run in runs:
            room = batch - sum(map(len, picked))
            if not room:
                break
            picked.append(run[:room])
        return picked


def group_tokens(group: Sequence[PairSize]) -> int:
    """Tokens of a packed group: image and head once, then every question and its two answers.

    With a damaged image that and head once more, then every question and its chosen answer.
    """
    shared = group[0].image + group[0].head
    total = shared + sum(s.question + s.chosen + s.rejected for s in group)
    return total + (shared + sum(s.question + s.chosen for s in group) if group[0].damaged else 0)


def as_run(data: Data, recipe: Mapping[str, Any]) -> Data:
    """The data with what a training with this recipe's loss runs of each pair."""
    if runs_rejected(recipe) and not runs_damaged(recipe):
        return data
    sizes = [
        replace(
            size,
            damaged=runs_damaged(recipe) and size.image > 0,
            rejected=size.rejected if runs_rejected(recipe) else 0,
        )
        for size in data.sizes
    ]
    return replace(data, sizes=sizes)


def load_config(recipe: Mapping[str, Any]) -> tuple[Any, str]:
    """(config of the recipe's model, where it comes from). Raises UserError where there is none to be had."""
    from transformers import AutoConfig, LlavaNextConfig

    name = str(recipe["model_name_or_path"])
    local = os.path.isdir(name)
    try:
        if not local and hub.find(name) == hub.UNREACHED:  # else transformers asks six times, in half a minute
            raise OSError(f"the Hub was not reached, and {name} is not in its cache here")
        config, source = AutoConfig.from_pretrained(name), f"{name}/config.json"
    except (OSError, ValueError) as error:
        if name != PUBLISHED:
            raise UserError(
                f"model_name_or_path: no config of {name} can be read: {str(error).splitlines()[0]}"
            ) from None
        config = LlavaNextConfig(**json.loads(PUBLISHED_CONFIG.read_text(encoding="utf-8")))
        source = f"shapes of {name} that this package ships (the Hub was not reached)"
    if config.model_type != "llava_next":
        raise UserError(f"model_name_or_path: {name} is {config.model_type!r}; plan knows llava_next alone.")
    limit = recipe.get("anyres_max_tiles")
    if limit is not None:
        kept = AnyresGeometry.from_config(config).limited(limit).grid_pinpoints
        config.image_grid_pinpoints = [list(point) for point in kept]
    return config, source


def assumed(config, pairs_per_image: int = 1) -> Data:
    """Pairs of assumed size on a 640x480 photograph, for data that is not on this machine."""
    geometry = AnyresGeometry.from_config(config)
    size = PairSize(
        geometry.num_image_tokens(*PHOTO), geometry.num_tiles(*PHOTO), *PHOTO, HEAD, QUESTION, CHOSEN, REJECTED
    )
    source = (
        f"assumed, not read: {EPOCH:,} pairs on {PHOTO[0]}x{PHOTO[1]} photographs, {HEAD + QUESTION} prompt,"
        f" {CHOSEN} chosen and {REJECTED} rejected tokens, {pairs_per_image} per image"
    )
    return Data([size] * pairs_per_image, ["photograph"] * pairs_per_image, EPOCH, source, assumed=True)


def largest(size: PairSize, config) -> PairSize:
    """The same pair on the image that takes the most tokens (a square)."""
    geometry = AnyresGeometry.from_config(config)
    side = max(max(point) for point in geometry.grid_pinpoints)
    shapes = {(side, side), *((w, h) for h, w in geometry.grid_pinpoints)}
    width, height = max(shapes, key=lambda shape: geometry.num_image_tokens(*shape))
    tokens, tiles = geometry.num_image_tokens(width, height), geometry.num_tiles(width, height)
    return replace(size, image=tokens, tiles=tiles, width=width, height=height)


def sizes_of(rows, recipe: Mapping[str, Any], config) -> Data:
    """Sizes of tokenized rows (see `data.pairs.PairProcessor`), of what the recipe's loss runs of them."""
    from ..data.columns import values  # needs pyarrow and datasets, which assumed sizes do not

    geometry = AnyresGeometry.from_config(config)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "num_image_tokens", "width", "height", "image_hash")
    table = {name: values(rows, name) for name in columns}
    prompts = table["prompt_ids"]
    head = len(os.path.commonprefix([min(prompts), max(prompts)])) if len(prompts) > 1 else HEAD + 1
    sizes = []
    for i, prompt in enumerate(prompts):
        image, width, height = table["num_image_tokens"][i], table["width"][i], table["height"][i]
        tiles = geometry.num_tiles(width, height) if image else 0
        shared = min(head, len(prompt)) - (1 if image else 0)
        question = len(prompt) - (1 if image else 0) - shared
        answers = len(table["chosen_ids"][i]), len(table["rejected_ids"][i])
        sizes.append(PairSize(image, tiles, width, height, shared, question, *answers))
    data = Data(sizes, list(table["image_hash"]), len(sizes), f"{recipe['dataset']}, {len(sizes):,} pairs")
    return as_run(data, recipe)


def data_is_here(recipe: Mapping[str, Any]) -> bool:
    """Whether every dataset of the recipe is a file or folder of this machine (nothing is downloaded to plan)."""
    folder = Path(recipe.get("dataset_dir", "data"))
    try:
        entries = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = str(recipe.get("dataset") or "").split(",")
    return all((folder / entries.get(name.strip(), {}).get("file_name", "-")).exists() for name in names)
