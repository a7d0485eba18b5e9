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
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
    "green": (40, 160, 70),
    "yellow": (240, 215, 50),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS = {"white": (248, 248, 248), "gray": (128, 128, 128), "black": (16, 16, 16)}
LAYOUTS = {  # origin_dataset -> (rows, columns) it may have
    "DemoGrid": ((2, 2),),
    "DemoStrip": ((1, 2), (2, 1), (1, 3), (3, 1)),
    "DemoBoard": ((2, 3), (3, 2)),
}
SOURCE_WEIGHTS = (4, 4, 2)  # boards are the hardest to see
CONFUSED = 0.6  # how often a changed color or shape becomes its partner rather than any other
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIDES = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}
LEVELS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `objects` holds (color, shape) row by row, `rows * columns` of them.

    The scenes of `cooccur` may have None for an empty cell.
    """

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
    source = rng.choices(tuple(LAYOUTS), SOURCE_WEIGHTS)[0]
    rows, columns = rng.choice(LAYOUTS[source])
    objects = tuple((rng.choice(tuple(COLORS)), rng.choice(SHAPES)) for _ in range(rows * columns))
    return Scene(source, rows, columns, rng.choice(tuple(BACKGROUNDS)), objects)


def _change(scene: Scene, rng: random.Random) -> Scene:
    """Recolors one object, reshapes one, or swaps two. Each change is as likely as its inverse."""
    objects = list(scene.objects)
    kind = rng.choice(("color", "shape", "swap"))
    if kind == "swap":
        i, j = rng.sample(range(len(objects)), 2)
        objects[i], objects[j] = objects[j], objects[i]
    else:
        i = rng.randrange(len(objects))
        old = objects[i][0] if kind == "color" else objects[i][1]
        names = tuple(COLORS) if kind == "color" else SHAPES
        new = partner(old) if rng.random() < CONFUSED else rng.choice([name for name in names if name != old])
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
    """What a careless observer reports.

    Each color and shape becomes its `partner` with probability `rate`, and left and right are exchanged with
    probability `rate` / 2.
    """
    objects = tuple(tuple(partner(name) if rng.random() < rate else name for name in pair) for pair in scene.objects)
    if rng.random() < rate / 2:
        rows = [objects[r * scene.columns : (r + 1) * scene.columns] for r in range(scene.rows)]
        objects = tuple(pair for row in rows for pair in reversed(row))
    return replace(scene, objects=objects)


def facts(scene: Scene) -> dict[tuple, object]:
    """Every question the scene answers: (kind, *arguments) -> answer value."""
    objects, found = scene.objects, {("describe",): scene.objects}
    colors, shapes = [c for c, _ in objects], [s for _, s in objects]
    for i, (color, shape) in enumerate(objects):
        found["color at", i], found["shape at", i], found["object at", i] = color, shape, (color, shape)
        for j in range(i + 1, len(objects)):
            found["same color", i, j], found["same shape", i, j] = (color, colors[j]), (shape, shapes[j])
    if scene.rows > 1 < scene.columns:
        for row in range(scene.rows):
            found["row", row] = objects[row * scene.columns : (row + 1) * scene.columns]
    for color in COLORS:
        if colors.count(color) == 1:
            found["shape of", color] = shapes[colors.index(color)]
        for shape in SHAPES:
            found["is there", color, shape] = (color, shape) in objects
    for shape in SHAPES:
        found["count", shape] = tuple(shapes)
        if shapes.count(shape) == 1:
            found["color of", shape] = colors[shapes.index(shape)]
    unique = sorted(pair for pair in set(objects) if objects.count(pair) == 1)
    for a in unique:
        found[("where", *a)] = objects.index(a)
        for b in unique:
            col_a, col_b = (objects.index(x) % scene.columns for x in (a, b))
            if a < b and col_a != col_b:
                found["side", a, b] = "left" if col_a < col_b else "right"
    return found


# How often each kind of question is asked, relative to the others that a pair of scenes allows.
KINDS = {
    "object at": 4,
    "color at": 4,
    "shape at": 4,
    "row": 4,
    "same color": 2,
    "same shape": 2,
    "count": 3,
    "color of": 3,
    "shape of": 3,
    "where": 1,
    "is there": 1,
    "side": 1,
}


def choose_question(scene: Scene, other: Scene, rng: random.Random) -> tuple:
    """A short question that both scenes answer, differently: a kind by its weight, then any key of that kind."""
    mine, theirs = facts(scene), facts(other)
    keys = [k for k in mine if k in theirs and mine[k] != theirs[k] and k[0] != "describe"]
    kinds = sorted({k[0] for k in keys})
    kind = rng.choices(kinds, [KINDS[k] for k in kinds])[0]
    return rng.choice([k for k in keys if k[0] == kind])


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _at(place: str) -> str:
    return {"left": "on the left", "right": "on the right", "middle": "in the middle"}.get(place, f"at the {place}")


def _listed(things: list[str]) -> str:
    return ", ".join(things[:-1]) + f" and {things[-1]}"


def ask(scene: Scene, key: tuple, writer: int) -> str:
    """The question for `key` in the words of writer 0 or 1."""
    kind, args = key[0], key[1:]
    if kind == "object at":
        place = _at(scene.place(args[0]))
        return (f"What is {place}?", f"What can be seen {place} of the picture?")[writer]
    if kind in ("color at", "shape at"):
        noun, place = kind.split()[0], _at(scene.place(args[0]))
        return (f"What {noun} is the one {place}?", f"Which {noun} do you see {place}?")[writer]
    if kind in ("same color", "same shape"):
        noun, a, b = kind.split()[1], scene.place(args[0]), scene.place(args[1])
        return (
            f"Do the {a} one and the {b} one have the same {noun}?",
            f"Compare the {a} with the {b}: is the {noun} the same?",
        )[writer]
    if kind == "row":
        level = LEVELS[scene.rows][args[0]]
        return (f"What does the {level} row show?", f"Which shapes are in the {level} row?")[writer]
    if kind == "count":
        return (f"How many {args[0]}s are there?", f"Count the {args[0]}s in the picture.")[writer]
    if kind == "color of":
        return (f"What color is the {args[0]}?", f"Which color does the {args[0]} have?")[writer]
    if kind == "shape of":
        return (f"What shape is the {args[0]} one?", f"Which shape is painted {args[0]}?")[writer]
    if kind == "where":
        return (f"Where is the {args[0]} {args[1]}?", f"In which place is the {args[0]} {args[1]}?")[writer]
    if kind == "is there":
        thing = _a(f"{args[0]} {args[1]}")
        return (f"Is there {thing} in the picture?", f"Can you see {thing}?")[writer]
    if kind == "side":
        a, b = (f"the {color} {shape}" for color, shape in args)
        return (f"Is {a} to the left or to the right of {b}?", f"Compare {a} with {b}: which side is it on?")[writer]
    return ("Describe this image in detail.", "What do you see? Give a full description.")[writer]


def answer(scene: Scene, key: tuple, value: object, writer: int) -> str:
    """The sentence that gives `value` as the answer to `key`. All values of one key give equally many words.

    Comparisons and counts name what they compare or count before they conclude.
    """
    kind, args = key[0], key[1:]
    if kind == "object at":
        thing, place = _a(" ".join(value)), _at(scene.place(args[0]))
        return (f"There is {thing} {place}.", f"I can see {thing} {place}.")[writer]
    if kind == "color at":
        place = _at(scene.place(args[0]))
        return (f"The one {place} is {value}.", f"The shape {place} is {value}.")[writer]
    if kind == "shape at":
        return (f"The one {_at(scene.place(args[0]))} is a {value}.", f"It is a {value}.")[writer]
    if kind in ("same color", "same shape"):
        a, b = (
            f"the {scene.place(i)} one is {v if kind == 'same color' else _a(v)}"
            for i, v in zip(args, value, strict=True)
        )
        same = value[0] == value[1]
        end = (
            "so the answer is yes" if same else "so the answer is no",
            "so they match" if same else "so they differ",
        )
        return f"{a.capitalize()} and {b}, {end[writer]}."
    if kind == "row":
        things, level = _listed([_a(" ".join(pair)) for pair in value]), LEVELS[scene.rows][args[0]]
        return (f"The {level} row shows {things}.", f"In the {level} row there are {things}.")[writer]
    if kind == "count":
        number, noun = value.count(args[0]), args[0] if value.count(args[0]) == 1 else f"{args[0]}s"
        things = _listed([_a(shape) for shape in value])
        return (
            f"I see {things}, so {NUMBERS[number]} {noun}.",
            f"With {things}, it has {NUMBERS[number]} {noun}.",
        )[writer]
    if kind == "color of":
        return (f"The {args[0]} is {value}.", f"It is {_a(f'{value} {args[0]}')}.")[writer]
    if kind == "shape of":
        return (f"The {args[0]} one is a {value}.", f"It is {_a(f'{args[0]} {value}')}.")[writer]
    if kind == "where":
        place = _at(scene.place(value))
        return (f"The {args[0]} {args[1]} is {place}.", f"It is {place}.")[writer]
    if kind == "is there":
        thing = f"{args[0]} {args[1]}"
        yes = (f"Yes, there is {_a(thing)}.", f"Yes, the picture shows {_a(thing)}.")
        no = (f"No, there is no {thing}.", f"No, the picture shows no {thing}.")
        return (yes if value else no)[writer]
    if kind == "side":
        a, b = (f"the {color} {shape}" for color, shape in args)
        return (f"{a.capitalize()} is to the {value} of {b}.", f"It is to the {value} of {b}.")[writer]
    things = [(_a(" ".join(pair)), scene.place(i)) for i, pair in enumerate(value)]
    start = f"{NUMBERS[len(things)]} shapes on a {scene.background} background"
    if writer == 0:
        return f"The picture shows {start}: " + ", ".join(f"{thing} {_at(place)}" for thing, place in things) + "."
    return f"There are {start}. " + " ".join(f"The {place} one is {thing}." for thing, place in things)


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
    """Renders a scene. Sizes, places and colors are jittered by `rng`, so two pictures of one scene differ.

    Returns:
        The RGB picture, and an "L" picture of the same size that holds at each pixel the object's index + 1 (0 is
        the background).
    """
    zoom = 3  # drawn larger, then averaged down: smooth edges
    cell = rng.randint(44, 84)
    width, height = (round(n * cell * rng.uniform(0.94, 1.06)) for n in (scene.columns, scene.rows))
    shade = rng.randint(-7, 7)
    picture = Image.new("RGB", (width * zoom, height * zoom), tuple(v + shade for v in BACKGROUNDS[scene.background]))
    labels = Image.new("L", (width, height), 0)
    paint, mark = ImageDraw.Draw(picture), ImageDraw.Draw(labels)
    step_x, step_y = width / scene.columns, height / scene.rows
    for i, kind in enumerate(scene.objects):
        if kind is None:
            continue
        color, shape = kind
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
