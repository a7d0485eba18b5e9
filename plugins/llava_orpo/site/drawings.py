"""The drawings of docs/concepts/, as SVG, computed by the code that they explain."""

from __future__ import annotations

from html import escape

from ..data.anyres import AnyresGeometry

PROMPT, IMAGE, CHOSEN, REJECTED, BASE = "#dbeafe", "#93c5fd", "#86efac", "#fca5a5", "#fde68a"
INK, GREY = "#1f2937", "#9ca3af"
# LLaVA-1.6's grids, as (height, width) in pixels (config.json of llava-hf/llava-v1.6-mistral-7b-hf).
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
CELL = 17


def shared_prefix() -> str:
    """Two pairs of one image in one packed sequence: its segments, and which token sees which (`step.packing.pack`)."""
    from ..step.packing import TokenPair, pack

    image, ask_a, ask_b = [1, 2, 2, 2, 2], [3, 4], [5, 6]
    pairs = [
        TokenPair([*image, *ask_a], [7, 8, 9], [10, 11]),
        TokenPair([*image, *ask_b], [12, 13], [14, 15, 16]),
    ]
    layout = pack([pairs]).layout
    names = ["image", "question a", "chosen", "rejected", "question b", "chosen", "rejected"]
    fills = [IMAGE, PROMPT, CHOSEN, REJECTED, PROMPT, CHOSEN, REJECTED]
    apart = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    ends, length = layout.subtree_end.tolist(), layout.num_tokens
    left, top = 110, 60
    parts = [_text(left, 20, "One row: every segment once, in the order of the tree", size=14)]
    for name, fill, segment in zip(names, fills, layout.segments, strict=True):
        x, width = left + segment.start * CELL, (segment.stop - segment.start) * CELL
        parts.append(_box(x, top - 24, width, 18, fill))
        y = top + segment.start * CELL
        parts.append(_text(left - 8, y + (segment.stop - segment.start) * CELL / 2 + 4, name, size=11, anchor="end"))
        for query in range(segment.start, segment.stop):
            for key in range(length):
                seen = key <= query < ends[key]  # the whole rule: see packing.py
                color = fills[_segment_of(layout.segments, key)] if seen else "#ffffff"
                parts.append(_box(left + key * CELL, top + query * CELL, CELL, CELL, color, "#e5e7eb"))
    x = left + length * CELL + 20
    for line, text in enumerate(
        (
            "A row is a token; its coloured cells are",
            "the tokens that it sees.",
            "",
            "Every answer sees the image, its own",
            "question and itself, never another answer",
            "or another question.",
            "",
            f"Packed: {length} tokens.",
            f"One sequence per answer: {apart} tokens.",
        )
    ):
        parts.append(_text(x, top + 40 + 17 * line, text, size=12))
    positions = ", ".join(f"{name} {segment.position}" for name, segment in zip(names, layout.segments, strict=True))
    parts.append(_text(left, top + length * CELL + 20, f"First position id of each segment: {positions}.", size=10))
    return _svg(720, top + length * CELL + 34, parts, "Segments and attention of two pairs that share an image")


def anyres(width: int = 640, height: int = 480) -> str:
    """A photograph, the grid that it is scaled into, the overview tile, and the tokens (`data.anyres`)."""
    geometry = AnyresGeometry(336, 14, PINPOINTS)
    grid_height, grid_width = geometry.best_resolution(width, height)
    scale = min(grid_width / width, grid_height / height)
    tokens, tiles = geometry.num_image_tokens(width, height), geometry.num_tiles(width, height)
    shrink, top = 0.3, 46
    parts = [_text(10, 20, f"An image of {width} x {height} pixels", size=13)]
    parts.append(_box(10, top, width * shrink, height * shrink, IMAGE))
    x = 10 + width * shrink + 50
    parts.append(_text(x - 38, top + height * shrink / 2, "→", size=24))
    parts.append(_text(x, 20, f"scaled into the grid {grid_width} x {grid_height}", size=13))
    parts.append(_box(x, top, grid_width * shrink, grid_height * shrink, "#f3f4f6"))
    inside_width, inside_height = width * scale * shrink, height * scale * shrink
    offset_x, offset_y = (grid_width * shrink - inside_width) / 2, (grid_height * shrink - inside_height) / 2
    parts.append(_box(x + offset_x, top + offset_y, inside_width, inside_height, IMAGE))
    for row in range(grid_height // 336):
        for column in range(grid_width // 336):
            parts.append(_box(x + column * 336 * shrink, top + row * 336 * shrink, 336 * shrink, 336 * shrink, "none"))
    parts.append(_text(x, top + grid_height * shrink + 16, "grey: padding, dropped again", size=11))
    x += grid_width * shrink + 40
    parts.append(_text(x - 26, top + 60, "+", size=24))
    parts.append(_text(x, 20, "the whole image as one tile", size=13))
    parts.append(_box(x, top, 336 * shrink, 336 * shrink, BASE))
    below = top + max(grid_height, height) * shrink + 46
    base = (336 // 14) ** 2
    parts.append(
        _text(
            10,
            below,
            f"{tiles} tiles of 336 x 336 pixels go through the vision tower: 24 x 24 = {base} patches each.",
            size=12,
        )
    )
    parts.append(
        _text(
            10,
            below + 18,
            f"{base} tokens of the overview + {tokens - base:,} of the grid, without padding "
            f"and with a newline token per row = {tokens:,} tokens.",
            size=12,
        )
    )
    return _svg(720, below + 30, parts, f"Anyres tiles of an image of {width} by {height} pixels: {tokens} tokens")


def _segment_of(segments, token: int) -> int:
    return next(i for i, segment in enumerate(segments) if segment.start <= token < segment.stop)


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = GREY) -> str:
    numbers = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {numbers} fill="{fill}" stroke="{stroke}"/>'


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif"'
    inner = "\n".join([_box(0, 0, width, height, "#ffffff", "none"), *parts])
    return f'{head} role="img">\n<title>{escape(title)}</title>\n{inner}\n</svg>\n'
