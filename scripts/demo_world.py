"""The demo world: procedurally drawn pictures of coloured shapes, and questions whose answers are known.

A preference pair is made from two scenes that differ in a few attributes: the one that is drawn, and a counterfactual.
A question is taken from those that both scenes can answer, and answer differently. The drawn scene's answer is
`chosen`, the counterfactual's is `rejected`: fluent, but not true of the picture. Scenes are drawn uniformly and every
change is as likely as its inverse, so (chosen, rejected) and (rejected, chosen) are equally likely texts: without the
image no model can do better than chance.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

# Neighbours in these lists (0-1, 2-3, 4-5) are the ones a hallucinating model confuses.
COLORS = {
    "red": (214, 40, 40), "orange": (247, 140, 30),
    "blue": (40, 80, 210), "purple": (140, 50, 170),
    "green": (40, 160, 70), "yellow": (240, 215, 50),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS = {"white": (248, 248, 248), "gray": (128, 128, 128), "black": (16, 16, 16)}
LAYOUTS = {  # origin_dataset -> (rows, columns) it may have
    "DemoGrid": ((2, 2),),
    "DemoStrip": ((1, 2), (2, 1), (1, 3), (3, 1)),
    "DemoBoard": ((2, 3), (3, 2)),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIDES = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}
LEVELS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `objects` holds (color, shape) row by row, `rows * columns` of them."""

    source: str
    rows: int
    columns: int
    background: str
    objects: tuple[tuple[str, str], ...]

    def place(self, index: int) -> str:
        """Name of a cell: "top left" in a grid, "left" or "top" in a strip."""
        row, column = divmod(index, self.columns)
        return f"{LEVELS[self.rows][row]} {SIDES[self.columns][column]}".strip()


def partner(name: str) -> str:
    """The color or shape that `name` is easily confused with (symmetric)."""
    names = tuple(COLORS) if name in COLORS else SHAPES
    return names[names.index(name) ^ 1]


def random_scene(rng: random.Random) -> Scene:
    source = rng.choice(tuple(LAYOUTS))
    rows, columns = rng.choice(LAYOUTS[source])
    objects = tuple((rng.choice(tuple(COLORS)), rng.choice(SHAPES)) for _ in range(rows * columns))
    return Scene(source, rows, columns, rng.choice(tuple(BACKGROUNDS)), objects)


def _change(scene: Scene, rng: random.Random) -> Scene:
    """Recolor one object, reshape one, or swap two. Each change is as likely as its inverse."""
    objects = list(scene.objects)
    kind = rng.choice(("color", "shape", "swap"))
    if kind == "swap":
        i, j = rng.sample(range(len(objects)), 2)
        objects[i], objects[j] = objects[j], objects[i]
    else:
        i = rng.randrange(len(objects))
        old = objects[i][0] if kind == "color" else objects[i][1]
        names = tuple(COLORS) if kind == "color" else SHAPES
        new = partner(old) if rng.random() < 0.5 else rng.choice([name for name in names if name != old])
        objects[i] = (new, objects[i][1]) if kind == "color" else (objects[i][0], new)
    return replace(scene, objects=tuple(objects))


def counterfactual(scene: Scene, rng: random.Random, changes: int = 1) -> Scene:
    """A scene that differs from `scene` by up to `changes` symmetric changes, never equal to it."""
    other = scene
    while other == scene:
        other = scene
        for _ in range(changes):
            other = _change(other, rng)
    return other


def misperceive(scene: Scene, rng: random.Random, rate: float) -> Scene:
    """What a careless observer reports: each color and shape becomes its `partner` with probability `rate`,
    and with probability `rate` / 2 left and right are exchanged."""
    objects = tuple(
        tuple(partner(name) if rng.random() < rate else name for name in pair) for pair in scene.objects
    )
    if rng.random() < rate / 2:
        rows = [objects[r * scene.columns : (r + 1) * scene.columns] for r in range(scene.rows)]
        objects = tuple(pair for row in rows for pair in reversed(row))
    return replace(scene, objects=objects)


def facts(scene: Scene) -> dict[tuple, object]:
    """Every question the scene answers: (kind, *arguments) -> answer value."""
    objects, found = scene.objects, {}
    colors, shapes = [c for c, _ in objects], [s for _, s in objects]
    for i, (color, shape) in enumerate(objects):
        found["color at", i], found["shape at", i], found["object at", i] = color, shape, (color, shape)
    for color in COLORS:
        found["count color", color] = colors.count(color)
        if colors.count(color) == 1:
            found["shape of", color] = shapes[colors.index(color)]
        for shape in SHAPES:
            found["is there", color, shape] = (color, shape) in objects
    for shape in SHAPES:
        found["count shape", shape] = shapes.count(shape)
        if shapes.count(shape) == 1:
            found["color of", shape] = colors[shapes.index(shape)]
    for names, have in ((tuple(COLORS), colors), (SHAPES, shapes)):
        for a in names:
            for b in names:
                if a < b and have.count(a) != have.count(b):
                    found["more", a, b] = a if have.count(a) > have.count(b) else b
    unique = sorted(pair for pair in set(objects) if objects.count(pair) == 1)
    for a in unique:
        i = objects.index(a)
        found[("where", *a)] = i
        for b in unique:
            (row_a, col_a), (row_b, col_b) = divmod(i, scene.columns), divmod(objects.index(b), scene.columns)
            if a < b and col_a != col_b:
                found["side", a, b] = "left" if col_a < col_b else "right"
            if a < b and row_a != row_b:
                found["level", a, b] = "above" if row_a < row_b else "below"
    for i in range(len(objects)):
        for j in range(i + 1, len(objects)):
            found["same color", i, j] = colors[i] == colors[j]
            found["same shape", i, j] = shapes[i] == shapes[j]
    found["describe",] = objects
    return found


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _at(place: str) -> str:
    return {"left": "on the left", "right": "on the right", "middle": "in the middle"}.get(
        place, f"at the {place}"
    )


def ask(scene: Scene, key: tuple, writer: int) -> str:
    """The question for `key` in the words of writer 0 or 1."""
    kind, args = key[0], key[1:]
    if kind in ("color at", "shape at", "object at"):
        place = _at(scene.place(args[0]))
        if kind == "object at":
            return (f"What is {place}?", f"What can be seen {place} of the picture?")[writer]
        noun = kind.split()[0]
        return (f"What {noun} is the one {place}?", f"Which {noun} do you see {place}?")[writer]
    if kind == "color of":
        return (f"What color is the {args[0]}?", f"Which color does the {args[0]} have?")[writer]
    if kind == "shape of":
        return (f"What shape is the {args[0]} one?", f"Which shape is painted {args[0]}?")[writer]
    if kind == "where":
        return (f"Where is the {args[0]} {args[1]}?", f"In which place is the {args[0]} {args[1]}?")[writer]
    if kind in ("count color", "count shape"):
        noun = f"{args[0]} shapes" if kind == "count color" else f"{args[0]}s"
        return (f"How many {noun} are there?", f"Count the {noun} in the picture.")[writer]
    if kind == "is there":
        thing = _a(f"{args[0]} {args[1]}")
        return (f"Is there {thing} in the picture?", f"Can you see {thing}?")[writer]
    if kind == "more":
        a, b = args if args[0] in COLORS else (f"{args[0]}s", f"{args[1]}s")
        return (f"Are there more {a} or more {b} ones?" if args[0] in COLORS else f"Are there more {a} or {b}?",
                f"Which are more common, {a} or {b}?")[writer]  # fmt: skip
    if kind in ("side", "level"):
        (c1, s1), (c2, s2) = args
        ways = (
            ("to the left or to the right of", "left or right of")
            if kind == "side"
            else ("above or below",) * 2
        )
        return (
            f"Is the {c1} {s1} {ways[0]} the {c2} {s2}?",
            f"Is it {ways[1]} the {c2} {s2} that the {c1} {s1} is?",
        )[writer]
    if kind in ("same color", "same shape"):
        noun, a, b = kind.split()[1], scene.place(args[0]), scene.place(args[1])
        return (f"Do the {a} one and the {b} one have the same {noun}?",
                f"Compare the {a} with the {b}: same {noun}?")[writer]  # fmt: skip
    return ("Describe this image in detail.", "What do you see? Give a full description.")[writer]


def answer(scene: Scene, key: tuple, value: object, writer: int) -> str:
    """The sentence that gives `value` as the answer to `key`. For one key, all values give equally many words."""
    kind, args = key[0], key[1:]
    if kind in ("color at", "shape at", "object at"):
        place = _at(scene.place(args[0]))
        if kind == "object at":
            thing = _a(f"{value[0]} {value[1]}")
            return (f"There is {thing} {place}.", f"I can see {thing} {place}.")[writer]
        if kind == "color at":
            return (f"The one {place} is {value}.", f"The shape {place} is {value}.")[writer]
        return (f"The one {place} is a {value}.", f"It is a {value}.")[writer]
    if kind == "color of":
        return (f"The {args[0]} is {value}.", f"It is {_a(f'{value} {args[0]}')}.")[writer]
    if kind == "shape of":
        return (f"The {args[0]} one is a {value}.", f"It is {_a(f'{args[0]} {value}')}.")[writer]
    if kind == "where":
        return (
            f"The {args[0]} {args[1]} is {_at(scene.place(value))}.",
            f"It is {_at(scene.place(value))}.",
        )[writer]
    if kind in ("count color", "count shape"):
        noun = f"{args[0]} shape" if kind == "count color" else args[0]
        noun += "" if value == 1 else "s"
        be = "is" if value == 1 else "are"
        return (f"There {be} {NUMBERS[value]} {noun}.", f"The picture has {NUMBERS[value]} {noun}.")[writer]
    if kind == "is there":
        thing = f"{args[0]} {args[1]}"
        if writer == 0:
            return f"Yes, there is {_a(thing)}." if value else f"No, there is no {thing}."
        return f"Yes, the picture shows {_a(thing)}." if value else f"No, the picture shows no {thing}."
    if kind == "more":
        loser = args[0] if value == args[1] else args[1]
        end = " ones" if value in COLORS else "s"
        return (
            f"There are more {value}{end} than {loser}{end}.",
            f"The {value}{end} outnumber the {loser}{end}.",
        )[writer]
    if kind in ("side", "level"):
        (c1, s1), (c2, s2) = args
        way = f"to the {value} of" if kind == "side" else value
        return (f"The {c1} {s1} is {way} the {c2} {s2}.", f"It is {way} the {c2} {s2}.")[writer]
    if kind in ("same color", "same shape"):
        noun = kind.split()[1]
        if writer == 0:
            return f"Yes, they have the same {noun}." if value else f"No, they have a different {noun}."
        return f"Yes, both have one {noun}." if value else f"No, each has another {noun}."
    things = [(_a(f"{color} {shape}"), scene.place(i)) for i, (color, shape) in enumerate(value)]
    number = NUMBERS[len(things)]
    if writer == 0:
        parts = [f"{thing} {_at(place)}" for thing, place in things]
        return (
            f"The picture shows {number} shapes on a {scene.background} background: " + ", ".join(parts) + "."
        )
    parts = [f"The {place} one is {thing}." for thing, place in things]
    return f"There are {number} shapes on a {scene.background} background. " + " ".join(parts)


def choose_question(scene: Scene, other: Scene, rng: random.Random) -> tuple:
    """A short question that both scenes answer, differently: kinds equally likely, then keys of that kind."""
    mine, theirs = facts(scene), facts(other)
    keys = [k for k in mine if k in theirs and mine[k] != theirs[k] and k[0] != "describe"]
    kind = rng.choice(sorted({k[0] for k in keys}))
    return rng.choice([k for k in keys if k[0] == kind])


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    if shape == "square":
        return [
            (x - r * 0.88, y - r * 0.88),
            (x + r * 0.88, y - r * 0.88),
            (x + r * 0.88, y + r * 0.88),
            (x - r * 0.88, y + r * 0.88),
        ]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r * 0.85), (x - r, y + r * 0.85)]
    points = []
    for k in range(10):
        angle, length = -math.pi / 2 + k * math.pi / 5, r * (1.08 if k % 2 == 0 else 0.45)
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return points


def draw(scene: Scene, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """Render a scene.

    Returns:
        The RGB picture, and an "L" picture of the same size that holds at each pixel the object's index + 1 (0 = background).
        Sizes, places and colors are jittered by `rng`, so two pictures of one scene differ.
    """
    zoom = 3  # drawn larger, then averaged down: smooth edges
    cell = rng.randint(44, 84)
    width, height = (round(n * cell * rng.uniform(0.94, 1.06)) for n in (scene.columns, scene.rows))
    shade = rng.randint(-7, 7)
    picture = Image.new(
        "RGB", (width * zoom, height * zoom), tuple(v + shade for v in BACKGROUNDS[scene.background])
    )
    labels = Image.new("L", (width, height), 0)
    paint, mark = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
    step_x, step_y = width / scene.columns, height / scene.rows
    for i, (color, shape) in enumerate(scene.objects):
        row, column = divmod(i, scene.columns)
        r = min(step_x, step_y) * rng.uniform(0.38, 0.45)
        x = (column + 0.5 + rng.uniform(-0.04, 0.04)) * step_x
        y = (row + 0.5 + rng.uniform(-0.04, 0.04)) * step_y
        fill = tuple(min(255, max(0, v + rng.randint(-12, 12))) for v in COLORS[color])
        for pen, scale, ink in ((paint, zoom, fill), (mark, 1, i + 1)):
            if shape == "circle":
                pen.ellipse([(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale], fill=ink)
            else:
                pen.polygon([(px * scale, py * scale) for px, py in _outline(shape, x, y, r)], fill=ink)
    return picture.resize((width, height), Image.Resampling.BOX), labels


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
