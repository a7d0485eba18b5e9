"""step/collator.py: what a batch holds, on rows by hand and with a processor that says which pictures it was shown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helpers.serving import picture, png
from llava_orpo.arguments import PluginArguments
from llava_orpo.step.collator import SharedPrefixCollator

IMAGE_TOKEN = 99
BROKEN = b"no image at all"
NAMES = {"A": png(picture(11, 20, seed=0)), "B": png(picture(12, 20, seed=1)), "broken": BROKEN}


def image_processor(pictures, return_tensors):
    assert return_tensors == "pt"
    return {"sizes": [picture.size for picture in pictures], "colours": [picture.getcolors(2) for picture in pictures]}


PROCESSOR = SimpleNamespace(image_processor=image_processor)


def row(name, number):
    """A pair on an image of that name ("" for none), as `PairProcessor` makes it."""
    tokens = {"A": 2, "B": 3, "broken": 4, "": 0}[name]
    width, height = {"A": (11, 20), "B": (12, 20), "broken": (30 + number, 40), "": (0, 0)}[name]
    return {
        "pair_id": str(number),
        "image": NAMES.get(name),
        "image_hash": name,
        "width": width,
        "height": height,
        "num_image_tokens": tokens,
        "prompt_ids": [1, *([IMAGE_TOKEN] if name else []), 5],
        "chosen_ids": [10 + number],
        "rejected_ids": [20 + number, 2],
    }


def rows(*names):
    return [row(name, number) for number, name in enumerate(names)]


def test_each_pair_is_a_group_of_its_own_without_grouping():
    made = rows("A", "", "broken", "A")
    batch = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN)(made)
    assert batch["rows"] == made and batch["packed"].n_pairs == len(batch["packed"].layout.groups) == 4
    assert batch["weights"].tolist() == [1, 1, 0, 1]
    ((index, reason),) = batch["bad_images"]
    assert index == 2 and "no known image format" in reason
    # The grey picture has the size of the row's own image: its tokens were counted from it.
    assert batch["image_inputs"]["sizes"] == [(11, 20), (32, 40), (11, 20)]
    assert batch["image_inputs"]["colours"][1] == [(32 * 40, (128, 128, 128))]
    assert batch["packed"].num_image_tokens == 2 + 4 + 2
    assert batch["packed"].targets.tolist() == [10, 11, 12, 13, 20, 2, 21, 2, 22, 2, 23, 2]


@pytest.mark.parametrize("limit, groups", [(2, ["02", "1", "35", "4", "6"]), (3, ["02", "1", "356", "4"])])
def test_pairs_of_an_image_share_its_tokens_and_its_damage(limit, groups):
    made = rows("A", "", "A", "broken", "", "broken", "broken")
    batch = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN, group_by_image=True, max_pairs_per_image=limit)(made)
    order = [int(number) for number in "".join(groups)]
    assert batch["rows"] == [made[number] for number in order]
    assert len(batch["packed"].layout.groups) == len(groups)
    damaged = [index for index, number in enumerate(order) if number in (3, 5, 6)]
    assert [index for index, _ in batch["bad_images"]] == damaged
    assert batch["weights"].tolist() == [0.0 if index in damaged else 1.0 for index in range(7)]
    shown = [first for first in (made[int(group[0])] for group in groups) if first["image"]]
    assert batch["packed"].num_image_tokens == sum(first["num_image_tokens"] for first in shown)
    assert len(batch["image_inputs"]["sizes"]) == len(shown)


@pytest.mark.parametrize("grouping", [False, True])
def test_a_batch_without_images_has_no_image_inputs(grouping):
    made = rows("", "")
    batch = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN, grouping)(made)
    assert batch["image_inputs"] == {} and batch["bad_images"] == [] and batch["rows"] == made
    assert len(batch["packed"].layout.groups) == 2, "pairs without an image share nothing"


def test_a_recipe_s_collator_takes_the_model_s_token_and_the_recipe_s_limits():
    model = SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace(image_token_id=7)))  # as DDP wraps one
    arguments = PluginArguments(group_pairs_by_image=True, max_pairs_per_image=3)
    assert SharedPrefixCollator.of(PROCESSOR, model, arguments) == SharedPrefixCollator(PROCESSOR, 7, True, 3)
    assert SharedPrefixCollator(PROCESSOR, 7) == SharedPrefixCollator(PROCESSOR, 7, False, 4)


def test_empty_places_are_left_out_as_far_as_a_pair_remains():
    first, second, third = rows("A", "B", "broken")
    collator = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN)
    batch = collator([first, {**second, "padding": True}, {**third, "padding": True}])
    assert batch["rows"] == [first] and batch["weights"].tolist() == [1.0] and not batch["bad_images"]
    batch = collator([{**third, "padding": True}, {**third, "padding": True}])
    assert len(batch["rows"]) == 1 and batch["weights"].tolist() == [0.0]
    assert not batch["bad_images"], "the pair is listed where it has its own place"


def with_geometry():
    processor = SimpleNamespace(
        image_processor=image_processor, image_token="<image>", num_additional_image_tokens=1, patch_size=14
    )
    processor.image_processor = lambda pictures, return_tensors: image_processor(pictures, return_tensors)
    processor.image_processor.crop_size = {"height": 28, "width": 28}
    processor.image_processor.image_grid_pinpoints = [[28, 56], [56, 28]]
    processor.vision_feature_select_strategy = "default"
    return processor


def test_a_batch_of_text_only_pairs_gets_a_grey_stand_in_without_weight():
    processor = with_geometry()
    text, image = rows("", "A")
    collator = SharedPrefixCollator(processor, IMAGE_TOKEN, always_with_image=True)
    batch = collator([text])
    assert batch["weights"].tolist() == [1.0, 0.0] and [bool(row.get("padding")) for row in batch["rows"]] == [
        False,
        True,
    ]
    ((size,), (colours,)) = batch["image_inputs"]["sizes"], batch["image_inputs"]["colours"]
    assert size == (28, 28) and colours == [(28 * 28, (128, 128, 128))]
    assert batch["packed"].num_image_tokens == batch["rows"][1]["num_image_tokens"] > 0
    assert collator([text, image])["weights"].tolist() == [1.0, 1.0], "an image is there already"
    assert SharedPrefixCollator(processor, IMAGE_TOKEN)([text])["image_inputs"] == {}


def test_a_batch_that_is_too_long_is_cut_into_batches_of_its_own():
    made = rows("A", "A", "B", "", "broken")
    collator = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN, group_by_image=True)
    lengths = [sum(group) for group in collator(made)["packed"].layout.groups]
    assert lengths == [10, 8, 5, 9], "two pairs on A, then a pair each"
    collator.max_tokens = 32
    assert "parts" not in collator(made)
    collator.max_tokens = 18
    batch = collator(made)
    assert [[row["pair_id"] for row in part["rows"]] for part in batch["parts"]] == [["0", "1", "2"], ["3", "4"]]
    assert batch["rows"] == made and batch["weights"].tolist() == [1, 1, 1, 1, 0]
    assert [index for index, _ in batch["bad_images"]] == [4]
    assert [index for index, _ in batch["parts"][1]["bad_images"]] == [1]
    collator.max_tokens = 9  # the pairs on A part, and each has the image
    batch = collator(made)
    assert [part["packed"].num_tokens for part in batch["parts"]] == [7, 7, 8, 5, 9]
    assert [len(part["image_inputs"].get("sizes", [])) for part in batch["parts"]] == [1, 1, 1, 0, 1]


def test_every_part_has_an_image_where_every_batch_needs_one():
    made = rows("", "", "A", "")
    collator = SharedPrefixCollator(with_geometry(), IMAGE_TOKEN, always_with_image=True)
    alone = collator(made[:1])["packed"].num_tokens  # a text-only pair and the stand-in
    collator.max_tokens = alone
    batch = collator(made)
    assert [row["pair_id"] for row in batch["rows"] if not row.get("padding")] == ["0", "1", "2", "3"]
    assert all(part["packed"].num_image_tokens and part["packed"].num_tokens <= alone for part in batch["parts"])
    assert batch["weights"].sum() == 4 and len(batch["rows"]) > 4
