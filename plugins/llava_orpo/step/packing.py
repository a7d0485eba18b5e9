"""Packed shared-prefix batches: each image and each prompt once, however many responses follow it.

A batch is ONE sequence of T tokens without padding. It holds groups; a group is a tree of segments, written in
pre-order:

    [ root | question a | chosen | rejected | chosen | rejected | question b | chosen | rejected ] [ root ...

root      longest common token prefix of the group's prompts (image level); the whole prompt of a single pair
question  what is left of a prompt; pairs with equal prompts share it; absent when nothing is left
responses the tokens of one answer, never shared

The chosen answer under a damaged image is a response of one more group, whose image tokens are the damaged image's:

    [ root, the damaged image | question a | chosen | chosen | question b | chosen ]

A token sees itself, the tokens before it in its own segment, and its segment's ancestors; position ids continue from
the parent's end. So every hidden state equals the one of the plain sequence prompt + response.
In pre-order each segment's subtree is one interval, which makes the whole rule `j <= i < subtree_end[j]`
(query i, key j).

This module needs only torch. The attention that reads the layout, and the model call, are in `attention.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import torch

from .token_logps import token_logps

FLEX_BLOCK = 128
KINDS = ("chosen", "rejected", "damaged")  # of responses, in their order


@dataclass(frozen=True)
class TokenPair:
    """One preference pair as token ids; `prompt_ids` with the image placeholder expanded to full length.

    rejected_ids is None where the chosen answer alone is run.
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int] | None


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the sequence.

    `parent` indexes `SharedPrefixLayout.segments` (-1: root of a group); `position` is the first token's position id.
    """

    start: int
    stop: int
    parent: int
    position: int


@dataclass(frozen=True, eq=False)
class ReadPositions:
    """The K' positions of a packed sequence whose final hidden state is read: each predicts a response token.

    positions  (K',) int64, ascending, each position once
    counts     how many of them each group holds
    index      (K,) int64: the place of each entry of `PackedBatch.logits_to_keep` in `positions`
    """

    positions: torch.Tensor
    counts: tuple[int, ...]
    index: torch.Tensor


@dataclass(frozen=True, eq=False)
class SharedPrefixLayout:
    """Which token sees which in a packed sequence of T tokens.

    segments     all segments in the order of the sequence
    groups       per group (root length, tail length); groups follow each other without gaps
    subtree_end  (T,) int64: end of the subtree of each token's segment
    read         see ReadPositions

    Masks are computed once per layout and dtype, on the device of `subtree_end`, at their first use.
    """

    segments: tuple[Segment, ...]
    groups: tuple[tuple[int, int], ...]
    subtree_end: torch.Tensor
    read: ReadPositions

    @property
    def num_tokens(self) -> int:
        """T, the length of the sequence."""
        return sum(root + tail for root, tail in self.groups)

    @cached_property
    def _cache(self) -> dict[Any, Any]:
        return {}  # no dataclass field, so that replace(), hence .to() and FSDP's input casts, starts afresh

    def tail_masks(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Per group the additive mask (1, 1, tail, root + tail) of its tail queries: 0 seen, -inf hidden."""
        if ("tail", dtype) not in self._cache:
            rows = torch.arange(self.num_tokens, device=self.subtree_end.device)
            parts = rows.split([part for group in self.groups for part in group])
            self._cache["tail", dtype] = self._masks(parts[1::2], dtype)
        return self._cache["tail", dtype]

    def read_masks(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Per group the additive mask (1, 1, count, root + tail) of its queries at `read.positions`."""
        if ("read", dtype) not in self._cache:
            self._cache["read", dtype] = self._masks(self.read.positions.split(self.read.counts), dtype)
        return self._cache["read", dtype]

    def _masks(self, queries: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        start, masks = 0, []
        for (root, tail), query in zip(self.groups, queries, strict=True):
            stop = start + root + tail
            key = torch.arange(start, stop, device=self.subtree_end.device)
            hidden = (key > query[:, None]) | (query[:, None] >= self.subtree_end[start:stop])
            # Rows padded to 16 elements: CUDA's memory-efficient kernel would else copy the mask per layer.
            mask = torch.zeros(len(query), -(-(root + tail) // 16) * 16, dtype=dtype, device=hidden.device)
            masks.append(mask[:, : root + tail].masked_fill_(hidden, float("-inf"))[None, None])
            start = stop
        return tuple(masks)

    @property
    def flex_length(self) -> int:
        """The length FlexAttention runs at: whole blocks, and two or more.

        Other lengths, and the length of one block, are cases of their own for the compiler, with a graph each.
        """
        return max(-(-self.num_tokens // FLEX_BLOCK), 2) * FLEX_BLOCK

    def block_mask(self):
        """`torch.nn.attention.flex_attention.BlockMask` of the sequence, padded to `flex_length`.

        Made from block-wise minima and maxima of `subtree_end`, so nothing of size T x T exists. Blocks that only might
        hold a visible key count as partial. The padding sees itself alone, and no token sees it.
        """
        if "block_mask" not in self._cache:
            self._cache["block_mask"] = self._block_mask()
        return self._cache["block_mask"]

    def _block_mask(self):
        from torch.nn.attention.flex_attention import BlockMask

        length = self.flex_length
        end = self.subtree_end.new_full((length,), length)
        end[: self.num_tokens] = self.subtree_end
        by_block = end.view(-1, FLEX_BLOCK)
        largest, smallest = by_block.amax(1), by_block.amin(1)
        start = torch.arange(length // FLEX_BLOCK, device=end.device) * FLEX_BLOCK
        seen = (start[None] <= start[:, None]) & (largest[None] > start[:, None])
        full = (start[None] < start[:, None]) & (smallest[None] >= start[:, None] + FLEX_BLOCK)

        def visible(batch, head, query, key):
            return (key <= query) & (query < end[key])

        def blocks(table):
            order = torch.argsort(table.int(), dim=-1, descending=True, stable=True)
            return table.sum(-1).int()[None, None], order.int()[None, None].contiguous()

        return BlockMask.from_kv_blocks(
            *blocks(seen & ~full),
            *blocks(full),
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=visible,
            seq_lengths=(length, length),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SharedPrefixLayout:
        return map_tensors(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SharedPrefixLayout:
        return map_tensors(self, torch.Tensor.pin_memory)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """n pairs packed into one sequence of T tokens; R responses of K tokens in all.

    The responses are chosen 0 .. n-1, then rejected 0 .. n-1 (or none at all), then the d chosen answers under a
    damaged image.

    input_ids, position_ids  (1, T) int64
    layout                   see SharedPrefixLayout
    logits_to_keep           (K,) int64 positions whose logits predict `targets`; a last prompt token is in it
                             once for each response that starts there
    targets                  (K,) int64, in the order of the responses
    lengths                  (R,) int64 tokens per response; `response_lengths` the same on the host
    image_positions          (P,) int64 positions of the image tokens, ascending (none when `pack` was not told which
                             token that is)
    damaged_pairs            (d,) int64 number of the pair of each answer under a damaged image
    n_pairs, n_damaged       n and d
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    layout: SharedPrefixLayout
    logits_to_keep: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    response_lengths: tuple[int, ...]
    image_positions: torch.Tensor
    damaged_pairs: torch.Tensor
    n_pairs: int
    n_damaged: int

    @property
    def n_rejected(self) -> int:
        """n, or 0 where no rejected answer is run."""
        return len(self.response_lengths) - self.n_pairs - self.n_damaged

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def response_tokens(self) -> tuple[int, int]:
        """Tokens of all chosen responses, and of all rejected ones; those under a damaged image are not in it."""
        n = self.n_pairs
        return sum(self.response_lengths[:n]), sum(self.response_lengths[n : n + self.n_rejected])

    @property
    def num_image_tokens(self) -> int:
        return len(self.image_positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch with every tensor on `device`, the layout's too (DDP does not look inside)."""
        return map_tensors(self, lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Called by `DataLoader(pin_memory=True)`."""
        return map_tensors(self, torch.Tensor.pin_memory)


def map_tensors(batch, move: Callable[[torch.Tensor], torch.Tensor]):
    """The dataclass with every tensor moved, those of a layout inside it too."""
    changes = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            changes[field.name] = move(value)
        elif isinstance(value, (SharedPrefixLayout, ReadPositions)):
            changes[field.name] = map_tensors(value, move)
    return dataclasses.replace(batch, **changes)


def pack(
    groups: Sequence[Sequence[TokenPair]],
    image_token_id: int | None = None,
    damaged: Sequence[tuple[int, Sequence[int]]] = (),
) -> PackedBatch:
    """Packs groups of pairs into one sequence. The pairs of a group share one image, or are text-only.

    damaged: (group, which of its pairs) for every damaged image: one more group, behind all others and in this order,
    with the prompts and the chosen answers of those pairs.

    Raises ValueError naming group and pair for an empty group, prompt or response, for rejected answers of some pairs
    only, and, given `image_token_id`, for image tokens in a response or behind the point where the group's prompts
    part (the image would be in the sequence twice).
    """
    row = _Row(image_token_id)
    first = [0]
    for number, group in enumerate(groups):
        _check_group(number, group, image_token_id)
        row.add_group(number, group, range(first[-1], first[-1] + len(group)))
        first.append(first[-1] + len(group))
    if first[-1] == 0:
        raise ValueError("nothing to pack: no group was given")
    if row.kinds["rejected"] not in (0, first[-1]):
        raise ValueError("some pairs have no rejected answer: all of a batch must have one, or none")
    for number, indices in damaged:
        group = chosen_alone([groups[number][index] for index in indices])
        row.add_group(number, group, [first[number] + index for index in indices], "damaged")
    return row.finish()


def chosen_alone(group: Sequence[TokenPair]) -> list[TokenPair]:
    """The pairs without their rejected answers, as a damaged image's group holds them."""
    return [dataclasses.replace(pair, rejected_ids=None) for pair in group]


def packed_length(group: Sequence[TokenPair]) -> int:
    """The tokens that `pack` makes of a group, without packing it."""
    prompts = {tuple(pair.prompt_ids) for pair in group}
    shared = _common_prefix(tuple(prompts))
    questions = sum(len(prompt) - shared for prompt in prompts)
    return shared + questions + sum(len(pair.chosen_ids) + len(pair.rejected_ids or ()) for pair in group)


def _check_group(number: int, group: Sequence[TokenPair], image_token_id: int | None) -> None:
    if len(group) == 0:
        raise ValueError(f"group {number} holds no pair: leave it out")
    for index, pair in enumerate(group):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = getattr(pair, name)
            if ids is None and name == "rejected_ids":
                continue
            if name != "prompt_ids" and image_token_id in ids:
                raise ValueError(f"group {number}, pair {index}: image token in {name}: take <image> out of it")
            if len(ids) == 0:
                raise ValueError(f"group {number}, pair {index}: {name} is empty, it needs one token or more")


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    # The longest common prefix of all is that of the smallest and the largest in lexicographic order.
    low, high = min(prompts), max(prompts)
    return sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(low, high, strict=False)))


class _Row:
    """Collects the segments of a sequence; `finish` turns them into tensors."""

    def __init__(self, image_token_id: int | None):
        self.image_token_id = image_token_id
        self.ids: list[int] = []
        self.segments: list[Segment] = []
        self.groups: list[tuple[int, int]] = []
        self.responses: dict[tuple[int, int], tuple[list[int], Sequence[int]]] = {}
        self.kinds = dict.fromkeys(KINDS, 0)

    def add_group(
        self, number: int, group: Sequence[TokenPair], pairs: Sequence[int], chosen_as: str = "chosen"
    ) -> None:
        """pairs: the numbers of the group's pairs in the batch; chosen_as: the kind of their chosen answers."""
        start = len(self.ids)
        prompts = [tuple(pair.prompt_ids) for pair in group]
        shared = _common_prefix(prompts)
        if self.image_token_id is not None:
            for index, prompt in enumerate(prompts):
                if self.image_token_id in prompt[shared:]:
                    raise ValueError(
                        f"group {number}, pair {index}: image tokens after the prompts' common prefix of"
                        f" {shared} tokens; pairs share an image only when it stands before their questions:"
                        " put this pair into a group of its own"
                    )
        root = self._add_segment(prompts[0][:shared], parent=-1) if shared else -1
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_prompt.setdefault(prompt, []).append(index)
        for prompt, indices in by_prompt.items():
            leaf = self._add_segment(prompt[shared:], parent=root) if len(prompt) > shared else root
            for index in indices:
                pair = group[index]
                self._add_response(chosen_as, pairs[index], pair.chosen_ids, leaf)
                if pair.rejected_ids is not None:
                    self._add_response("rejected", pairs[index], pair.rejected_ids, leaf)
        self.groups.append((shared, len(self.ids) - start - shared))

    def _add_segment(self, ids: Sequence[int], parent: int) -> int:
        above = self.segments[parent] if parent >= 0 else Segment(0, 0, -1, 0)
        position = above.position + above.stop - above.start
        self.segments.append(Segment(len(self.ids), len(self.ids) + len(ids), parent, position))
        self.ids.extend(ids)
        return len(self.segments) - 1

    def _add_response(self, kind: str, pair: int, ids: Sequence[int], parent: int) -> None:
        segment = self.segments[self._add_segment(ids, parent)]
        last_prompt_token = self.segments[parent].stop - 1
        self.kinds[kind] += 1
        self.responses[KINDS.index(kind), pair] = ([last_prompt_token, *range(segment.start, segment.stop - 1)], ids)

    def finish(self) -> PackedBatch:
        ends = [segment.stop for segment in self.segments]
        for index in range(len(self.segments) - 1, -1, -1):  # children come after their parent
            parent = self.segments[index].parent
            if parent >= 0:
                ends[parent] = max(ends[parent], ends[index])
        sizes = torch.tensor([segment.stop - segment.start for segment in self.segments])
        starts = torch.tensor([segment.start for segment in self.segments])
        positions = torch.tensor([segment.position for segment in self.segments])
        offset = torch.arange(len(self.ids)) - torch.repeat_interleave(starts, sizes)
        ordered = [self.responses[key] for key in sorted(self.responses)]  # kind by kind
        keep = torch.tensor([position for positions, _ in ordered for position in positions])
        read, index = torch.unique(keep, return_inverse=True)
        group_stops = torch.tensor([root + tail for root, tail in self.groups]).cumsum(0)
        counts = torch.searchsorted(read, group_stops).diff(prepend=torch.zeros(1, dtype=torch.int64))
        layout = SharedPrefixLayout(
            segments=tuple(self.segments),
            groups=tuple(self.groups),
            subtree_end=torch.repeat_interleave(torch.tensor(ends), sizes),
            read=ReadPositions(read, tuple(counts.tolist()), index),
        )
        response_lengths = tuple(len(ids) for _, ids in ordered)
        lengths = torch.tensor(response_lengths)
        return PackedBatch(
            input_ids=torch.tensor(self.ids)[None],
            position_ids=(torch.repeat_interleave(positions, sizes) + offset)[None],
            layout=layout,
            logits_to_keep=keep,
            targets=torch.tensor([token for _, ids in ordered for token in ids]),
            lengths=lengths,
            response_lengths=response_lengths,
            image_positions=torch.tensor(
                [i for i, token in enumerate(self.ids) if token == self.image_token_id]
            ).long(),
            damaged_pairs=torch.tensor(
                sorted(pair for kind, pair in self.responses if KINDS[kind] == "damaged")
            ).long(),
            n_pairs=self.kinds["chosen"],
            n_damaged=self.kinds["damaged"],
        )


def response_logps(logits: torch.Tensor, packed: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed log-prob in nats of every response, (R,) fp32, and token counts, (R,) int64; in their order.

    logits: (1, K, V) or (K, V) at `packed.logits_to_keep`. Raises ValueError when K does not fit the batch.
    Each response is summed by itself, so its value does not depend, to the last bit, on the other responses.
    """
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.shape[0] != packed.targets.shape[0]:
        raise ValueError(
            f"{logits.shape[0]} rows of logits for {packed.targets.shape[0]} response tokens;"
            " was the model called with logits_to_keep=packed.logits_to_keep?"
        )
    parts = token_logps(logits, packed.targets).split(packed.response_lengths)
    return torch.stack([part.sum() for part in parts]), packed.lengths
