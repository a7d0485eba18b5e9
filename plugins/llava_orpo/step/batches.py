"""Which pairs share a batch: runs of one image, and batches filled with whole runs. The sampler is in `order`."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def image_runs(image_hashes: Sequence[str], order: Sequence[int], max_pairs: int) -> list[list[int]]:
    """Cuts a (shuffled) order of pair indices into runs of one image with at most `max_pairs` pairs each.

    Runs are in the order of their first pair; a pair without an image hash is a run of its own.
    """
    runs: list[list[int]] = []
    open_runs: dict[str, list[int]] = {}
    for index in order:
        key = image_hashes[index]
        run = open_runs.get(key) if key else None
        if run is None or len(run) >= max_pairs:
            run = []
            runs.append(run)
            if key:
                open_runs[key] = run
        run.append(index)
    return runs


def fill_batches(runs: Sequence[list[int]], batch_size: int) -> list[int]:
    """An order of all indices in which consecutive batches of `batch_size` hold whole runs as far as they fit.

    The best fitting open run comes next; a run is split only when no waiting run fits the rest of a batch. Every index
    appears exactly once, so epochs, steps and samples count pairs as they do without grouping.
    """
    waiting: dict[int, list[list[int]]] = {}
    for run in reversed(runs):
        for start in range(0, len(run), batch_size):
            piece = run[start : start + batch_size]
            waiting.setdefault(len(piece), []).append(piece)
    order: list[int] = []
    left = sum(len(piece) for pieces in waiting.values() for piece in pieces)
    while left:
        room = batch_size
        while room and left:
            size = next((s for s in range(room, 0, -1) if waiting.get(s)), None)
            if size is None:  # only longer runs wait: split one
                longer = waiting[min(s for s, pieces in waiting.items() if pieces)].pop()
                piece, rest = longer[:room], longer[room:]
                waiting.setdefault(len(rest), []).append(rest)
            else:
                piece = waiting[size].pop()
            order += piece
            room -= len(piece)
            left -= len(piece)
    return order


def cut_to_fit(groups: Sequence[list], tokens: Callable[[list[list]], int], limit: int) -> list[list[list]]:
    """Cuts the groups of a batch into parts of at most `limit` tokens, in the order of the groups and of their pairs.

    tokens: the tokens of a list of groups. A group that is longer than the limit is cut between its pairs, each piece
    with the image again; a single pair that is longer is a part of its own, because nothing of it can be left out.
    """
    pieces = []
    for group in groups:
        piece = group[:1]
        for pair in group[1:]:
            if tokens([[*piece, pair]]) <= limit:
                piece = [*piece, pair]
            else:
                pieces.append(piece)
                piece = [pair]
        pieces.append(piece)
    parts: list[list[list]] = []
    for piece in pieces:
        if parts and tokens([*parts[-1], piece]) <= limit:
            parts[-1].append(piece)
        else:
            parts.append([piece])
    return parts
