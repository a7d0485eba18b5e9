"""Damaged images on the shared prefix: what `pack` makes of them, what the collator puts where, and that it repeats."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.drawn import examples
from helpers.serving import picture, png
from llava_orpo.data import damaged, images
from llava_orpo.step.collator import SharedPrefixCollator
from llava_orpo.step.damage import NO_OTHER, ONE_COLOUR, Damage
from llava_orpo.step.order import Drawn, PaddedRows, Padding, PairOrder
from llava_orpo.step.packing import TokenPair, pack, packed_length
from llava_orpo.step.parts import filled_up
from llava_orpo.step.reference import ReferenceLogps

IMAGE_TOKEN = 99
PICTURES = {"A": picture(40, 30, seed=0), "B": picture(30, 50, seed=1), "grey": images.grey_like(20, 20)}
tokens = st.lists(st.integers(5, 7), min_size=1, max_size=5)


@examples(100)
@given(st.data(), st.booleans())
def test_a_damaged_image_is_a_group_of_its_own_with_the_chosen_answers_alone(data, with_rejected):
    rejected = tokens if with_rejected else st.none()
    pair = st.builds(TokenPair, prompt_ids=tokens, chosen_ids=tokens, rejected_ids=rejected)
    groups = data.draw(st.lists(st.lists(pair, min_size=1, max_size=3), min_size=1, max_size=3))
    chosen = [
        (number, sorted(data.draw(st.sets(st.integers(0, len(group) - 1), min_size=1))))
        for number, group in enumerate(groups)
        if data.draw(st.booleans())
    ]
    packed, plain = pack(groups, damaged=chosen), pack(groups)
    pairs = [pair for group in groups for pair in group]
    first = [sum(map(len, groups[:number])) for number in range(len(groups))]
    numbers = sorted(first[number] + index for number, indices in chosen for index in indices)
    assert (packed.n_pairs, packed.n_rejected) == (len(pairs), len(pairs) * with_rejected)
    assert packed.damaged_pairs.tolist() == numbers and packed.n_damaged == len(numbers)
    assert packed.response_tokens == plain.response_tokens
    # What was packed without it stands in front, unchanged.
    assert torch.equal(packed.input_ids[:, : plain.num_tokens], plain.input_ids)
    assert torch.equal(packed.position_ids[:, : plain.num_tokens], plain.position_ids)
    kept = len(plain.targets)
    assert torch.equal(packed.logits_to_keep[:kept], plain.logits_to_keep)
    assert torch.equal(packed.targets[:kept], plain.targets)
    # A token of a damaged image's answer sees the plain sequence prompt + answer of that group, and nothing else.
    end, ids = packed.layout.subtree_end.tolist(), packed.input_ids[0].tolist()
    at, positions = kept, packed.position_ids[0].tolist()
    for pair in (pairs[number] for number in numbers):
        for offset, token in enumerate(pair.chosen_ids):
            position = packed.logits_to_keep[at].item()
            seen = [j for j in range(position + 1) if position < end[j]]
            assert packed.targets[at].item() == token and min(seen) >= plain.num_tokens
            assert [ids[j] for j in seen] == [*pair.prompt_ids, *pair.chosen_ids[:offset]]
            assert [positions[j] for j in seen] == list(range(len(seen)))
            at += 1
    assert at == len(packed.targets)


def test_it_takes_at_most_2_1_times_the_tokens_of_a_plain_pair():
    prompt = [1] * 6 + [IMAGE_TOKEN] * 2340 + [5] * 26  # RLAIF-V's usual pair on a photograph
    group = [TokenPair(prompt, [7] * 80, [8] * 65)]
    made = pack([group], IMAGE_TOKEN, [(0, [0])])
    assert made.num_tokens <= 2.1 * pack([group]).num_tokens
    assert made.num_tokens < 2 * len(prompt) + 80 + 65 + 2 * 80, "below LLaMA-Factory's two sequences and an answer"
    four = [TokenPair([*prompt, 10 + i], [7] * 80, [8] * 65) for i in range(4)]
    shared = pack([four], IMAGE_TOKEN, [(0, range(4))]).num_tokens
    assert shared <= 2.1 * packed_length(four), "the pairs of an image share the damaged one"
    assert packed_length([TokenPair(prompt, [7] * 80, None)]) == len(prompt) + 80


def test_rejected_answers_of_some_pairs_only_are_refused():
    with pytest.raises(ValueError, match="some pairs have no rejected answer"):
        pack([[TokenPair([1], [2], [3])], [TokenPair([1], [2], None)]])


# the collator ----------------------------------------------------------------------------------------------------


def image_processor(pictures, return_tensors):
    return {"sizes": [each.size for each in pictures], "bytes": [each.tobytes() for each in pictures]}


PROCESSOR = SimpleNamespace(image_processor=image_processor)


def row(number: int, name: str, **more):
    """A pair on an image of that name ("" for none), as a training draws it in epoch 0."""
    shown = PICTURES.get(name)
    size = (9, 9) if shown is None else shown.size
    return {
        "pair_id": str(number),
        "dataset": "d",
        "image": None if not name else b"broken" if shown is None else png(shown),
        "image_hash": name,
        "width": size[0],
        "height": size[1],
        "num_image_tokens": 3 if name else 0,
        "prompt_ids": [1, *([IMAGE_TOKEN] if name else []), 5],
        "chosen_ids": [10 + number],
        "rejected_ids": [20 + number, 2],
        "epoch": 0,
        "place": number,
        **more,
    }


def collator(kind="crop", **more) -> SharedPrefixCollator:
    return SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN, damage=Damage(kind, seed=3), **more)


def test_damaged_images_follow_the_true_ones_and_what_has_none_is_listed():
    rows = [row(0, "A"), row(1, ""), row(2, "A"), row(3, "grey"), row(4, "broken"), row(5, "B"), row(6, "B")]
    rows[6]["padding"] = True
    batch = collator("crop", group_by_image=True)(rows)
    packed = batch["packed"]
    assert [r["pair_id"] for r in batch["rows"]] == ["0", "2", "1", "3", "4", "5"]
    assert packed.damaged_pairs.tolist() == [0, 1, 5] and len(packed.layout.groups) == 5 + 2
    assert batch["undamaged"] == [(2, "it has no image"), (3, ONE_COLOUR)] and batch["bad_images"][0][0] == 4
    assert batch["weights"].tolist() == [1, 1, 1, 1, 0, 1]
    shown = batch["image_inputs"]
    assert shown["sizes"] == [(40, 30), (20, 20), (9, 9), (30, 50), (40, 30), (30, 50)], "sizes stay, so tokens do"
    assert shown["bytes"][4] == damaged.damage(PICTURES["A"], "crop", "3 0 A").tobytes() != shown["bytes"][0]
    assert packed.num_image_tokens == 6 * 3


def test_rows_of_an_evaluation_are_packed_as_ever():
    rows = [{k: v for k, v in row(i, "A").items() if k not in ("epoch", "place")} for i in range(2)]
    scores = ReferenceLogps(torch.zeros(2), torch.zeros(2))
    for made in (collator(), collator(without_rejected=True), collator(reference_logps=scores)):
        batch, plain = made(rows), SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN)(rows)
        assert torch.equal(batch["packed"].input_ids, plain["packed"].input_ids) and "reference" not in batch
        assert batch["packed"].n_rejected == 2 and not batch["undamaged"] and batch["packed"].n_damaged == 0


def test_sft_runs_no_rejected_answer():
    batch = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN, without_rejected=True)([row(0, "A"), row(1, "")])
    assert batch["packed"].targets.tolist() == [10, 11] and batch["packed"].n_rejected == 0


@pytest.mark.parametrize("limit", [6, 14, 18, 32])
def test_parts_count_the_damaged_images_too(limit):
    rows = [row(0, "A"), row(1, "A"), row(2, "B"), row(3, "")]
    made = collator("masked", group_by_image=True)
    whole = made(rows)
    made.max_tokens = limit
    cut = made(rows)
    parts = cut.get("parts", [cut])
    assert made._num_tokens(made._group(rows)) == whole["packed"].num_tokens == 37
    assert len(parts) == {6: 4, 14: 4, 18: 3, 32: 2}[limit]
    assert all(part["packed"].num_tokens <= max(limit, 14) for part in parts), "a pair on an image takes 14"
    assert sum(part["packed"].n_damaged for part in parts) == whole["packed"].n_damaged == 3
    shown = {data for part in parts for data in part["image_inputs"].get("bytes", [])}
    assert shown == set(whole["image_inputs"]["bytes"]), "each part has the damaged image that the whole has"
    assert cut["undamaged"] == whole["undamaged"] == [(3, "it has no image")]
    longer = filled_up(cut, 6)
    assert longer["undamaged"] == cut["undamaged"] and longer["parts"][-1]["undamaged"] == []


def test_what_the_reference_could_not_score_has_no_weight():
    scores = ReferenceLogps(torch.tensor([-1.0, float("nan"), -3.0]), torch.tensor([-4.0, float("nan"), -6.0]))
    batch = SharedPrefixCollator(PROCESSOR, IMAGE_TOKEN, reference_logps=scores)([row(2, "A"), row(1, "B")])
    assert batch["weights"].tolist() == [1, 0]
    assert batch["reference"].chosen.tolist() == [-3, 0] and batch["reference"].rejected.tolist() == [-6, 0]


# the same image again --------------------------------------------------------------------------------------------


def rows_of(*names):
    rows = [{k: v for k, v in row(i, name).items() if k not in ("epoch", "place")} for i, name in enumerate(names)]

    class Rows(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

        def __getitem__(self, key):
            return [r[key] for r in self] if isinstance(key, str) else super().__getitem__(key)

    return Rows(rows)


@pytest.mark.parametrize("kind", ["masked", "crop", "noise", "other", "grey"])
def test_it_depends_on_image_epoch_and_seed_alone(kind):
    rows = rows_of("A", "A", "B", "grey", "")

    def of(number, epoch=0, seed=3):
        made, reason = Damage(kind, seed, rows).of(
            {**rows[number], "epoch": epoch}, PICTURES[rows[number]["image_hash"]]
        )
        assert not reason and made.size == (rows[number]["width"], rows[number]["height"])
        return made.tobytes()

    assert of(0) == of(0) == of(1), "the pairs of an image, whether they are in one group or not"
    found = {of(0, epoch, seed) for epoch in range(4) for seed in (3, 4)}
    assert len(found) == {"grey": 1, "other": 2}.get(kind, 8)


def test_other_takes_another_image_that_can_be_decoded():
    rows = rows_of("A", "", "broken", "B", "broken2")
    damage = Damage("other", 0, rows)
    for epoch in range(6):
        made, _ = damage.of({**rows[0], "epoch": epoch}, PICTURES["A"])
        assert made.tobytes() == PICTURES["B"].resize((40, 30), 3).tobytes()
    assert Damage("other", 0, rows_of("A", "broken")).of({**rows[0], "epoch": 0}, PICTURES["A"]) == (None, NO_OTHER)
    unnamed = rows_of("A", "B")  # of another LLaMA-Factory format
    for each in unnamed:
        each.update(image_hash="", pair_id="")
    made, _ = Damage("other", 0, unnamed).of({**unnamed[0], "epoch": 0}, PICTURES["A"])
    assert made.tobytes() == PICTURES["B"].resize((40, 30), 3).tobytes()


def collate(batch, made=None):
    out = made(batch)
    return [r["epoch"] for r in out["rows"]], out["image_inputs"]["bytes"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_of_any_number_and_a_resumed_run_make_the_same(workers):
    rows = rows_of(*"ABABAB")

    def epoch(order, workers=0):
        from functools import partial

        loader = DataLoader(
            PaddedRows(rows), 4, sampler=order, num_workers=workers, collate_fn=partial(collate, made=collator("noise"))
        )
        return list(loader)

    whole = PairOrder(6, global_batch=4, batch_size=4, seed=1)
    first, second = epoch(whole), epoch(whole)
    assert {e for epochs, _ in first for e in epochs} == {0} and {e for epochs, _ in second for e in epochs} == {1}
    resumed = PairOrder(6, global_batch=4, batch_size=4, seed=1, epoch_now=lambda: 1)
    assert epoch(resumed, workers) == second
    noise = [
        {data for _, shown in each for data in shown} - {p.tobytes() for p in PICTURES.values()}
        for each in (first, second)
    ]
    assert len(noise[0]) == len(noise[1]) == 2 and not noise[0] & noise[1], "one for each image and epoch"


def test_an_empty_place_keeps_its_epoch_and_is_no_other_number():
    order = list(PairOrder(3, global_batch=2, batch_size=2, epoch_now=lambda: 5))
    assert sorted(order[:3]) == [0, 1, 2] and isinstance(order[3], Padding)
    assert [number.epoch for number in order] == [5] * 4 and all(isinstance(number, Drawn) for number in order)
    marked = PaddedRows(rows_of("A", "B", "A")).__getitems__(order)[3]
    assert marked["padding"] and marked["epoch"] == 5 and marked["place"] == int(order[3])
