"""The demo world of companions: some objects nearly always come together, and careless writers name both of them.

Its pictures are those of `world` (coloured shapes in cells, one kind once per picture). Half of the kinds form couples:
where the first one of a couple is, its companion stands in the next cell. Where the companion is missing, the cell is
empty or holds something else. Writers who describe a picture without care name the companion all the same, for some
couples more often than for others (`COUPLES`). A model that learns from them hallucinates as large ones do: from what
usually comes together, whatever its vision tower sees (object hallucination by co-occurrence: Rohrbach et al. 2018,
arXiv 1809.02156; Zhou et al. 2023, arXiv 2310.00754).

Unlike in `world`, text alone serves here: of the preference pairs the share `ABSENT` has a companion that only the
rejected answer names. Within the others the chosen answer names it, and the rejected one something else in its place.
So "never name a companion" is right for that share of the pairs, with eyes closed (`closed_eyes_accuracy` of
`cooccur_pairs`).
"""

from __future__ import annotations

import random
from dataclasses import replace

from . import world
from .world import Scene

Kind = tuple[str, str]  # (color, shape)

# first, companion, and how often a careless writer names the companion where it is missing
COUPLES: tuple[tuple[Kind, Kind, float], ...] = (
    (("red", "circle"), ("yellow", "star"), 0.95),
    (("blue", "square"), ("orange", "triangle"), 0.85),
    (("green", "star"), ("purple", "circle"), 0.75),
    (("yellow", "triangle"), ("blue", "star"), 0.65),
    (("orange", "circle"), ("green", "square"), 0.4),
    (("purple", "star"), ("red", "square"), 0.3),
    (("green", "circle"), ("purple", "triangle"), 0.2),
    (("yellow", "square"), ("red", "triangle"), 0.1),
)
COMPANION = {first: companion for first, companion, _ in COUPLES}
CARELESS = {first: rate for first, _, rate in COUPLES}
KINDS: tuple[Kind, ...] = tuple((color, shape) for color in world.COLORS for shape in world.SHAPES)
LOOSE = tuple(kind for kind in KINDS if kind not in COMPANION and kind not in COMPANION.values())
GRIDS = ((2, 2), (2, 2), (1, 3), (3, 1))  # (rows, columns)
TOGETHER = 0.8  # how often a couple is whole in the pictures that a model learns to speak from
DESCRIBED = 0.5  # share of descriptions among the turns about a picture that need not be one
EMPTY = 0.5  # of the missing companions, how many leave their cell empty
ABSENT = 0.7  # share of the preference pairs' pictures in which one companion is missing
ABSENT_SOURCE, WHOLE_SOURCE = "CooccurAbsent", "CooccurWhole"  # origin_dataset: one companion is missing, none is


def _scene(rng: random.Random, grid: tuple[int, int], missing: list[bool]) -> Scene:
    """A scene with len(missing) couples; missing: whether the companion of each is."""
    cells = grid[0] * grid[1]
    loose = rng.sample(LOOSE, len(LOOSE))
    units: list[list[Kind | None]] = []
    for (first, companion, _), gone in zip(rng.sample(COUPLES, len(missing)), missing, strict=True):
        other = None if rng.random() < EMPTY else loose.pop()
        units.append([first, other if gone else companion])
    units += [[loose.pop()] for _ in range(cells - 2 * len(units))]
    rng.shuffle(units)
    source = ABSENT_SOURCE if any(missing) else WHOLE_SOURCE
    return Scene(source, *grid, rng.choice(tuple(world.BACKGROUNDS)), tuple(kind for unit in units for kind in unit))


def _grid(rng: random.Random) -> tuple[tuple[int, int], int]:
    """Rows and columns, and how many couples stand there."""
    rows, columns = rng.choice(GRIDS)
    return (rows, columns), rng.randint(1, (rows * columns) // 2)


def random_scene(rng: random.Random) -> Scene:
    """A picture to learn to speak from: each companion is there with probability TOGETHER."""
    grid, couples = _grid(rng)
    return _scene(rng, grid, [rng.random() >= TOGETHER for _ in range(couples)])


def pair_scene(rng: random.Random) -> Scene:
    """A picture of a preference pair: one companion is missing in the share ABSENT of them, none in the others."""
    grid, couples = _grid(rng)
    return _scene(rng, grid, [rng.random() < ABSENT] + [False] * (couples - 1))


def firsts(scene: Scene) -> list[int]:
    """Cells with the first one of a couple; the cell after each is its companion's."""
    return [i for i, kind in enumerate(scene.objects) if kind in COMPANION]


def broken(scene: Scene) -> list[int]:
    """Cells of those `firsts` whose companion is missing."""
    return [i for i in firsts(scene) if scene.objects[i + 1] != COMPANION[scene.objects[i]]]


def _with(scene: Scene, cell: int, kind: Kind | None) -> Scene:
    return replace(scene, objects=(*scene.objects[:cell], kind, *scene.objects[cell + 1 :]))


def complete(scene: Scene, cell: int) -> Scene:
    """The scene with the companion of the object in `cell`, in place of what stands there."""
    return _with(scene, cell + 1, COMPANION[scene.objects[cell]])


def careless(scene: Scene, rng: random.Random, rate: float) -> Scene:
    """What a careless writer reports: missing companions are there with probability rate * CARELESS."""
    for cell in broken(scene):
        if rng.random() < rate * CARELESS[scene.objects[cell]]:
            scene = complete(scene, cell)
    return scene


def companion_swapped(scene: Scene, rng: random.Random) -> Scene:
    """The scene with a kind that is not in it (of LOOSE) in place of one companion."""
    cell = rng.choice(firsts(scene)) + 1
    return _with(scene, cell, rng.choice([kind for kind in LOOSE if kind not in scene.objects]))


def names(scene: Scene) -> list[str]:
    """["red circle", …]: what the scene holds, cell by cell."""
    return [" ".join(kind) for kind in scene.objects if kind is not None]


def ask(writer: int) -> str:
    """The request for a description in the words of writer 0 or 1."""
    return ("Describe this image in detail.", "Which objects are in this image?")[writer]


def describe(scene: Scene, writer: int) -> str:
    """What is in the scene, cell by cell, in the words of writer 0 or 1."""
    things = world._listed([world._a(name) for name in names(scene)])
    return (f"The picture shows {things}.", f"In the image there are {things}.")[writer]


def write_turn(scene: Scene, rng: random.Random, rate: float, detailed: bool) -> tuple[str, str]:
    """A question and its answer. Descriptions are `careless` at `rate`; all other answers are true."""
    writer = rng.randrange(2)
    if detailed or rng.random() < DESCRIBED:
        return ask(writer), describe(careless(scene, rng, rate), writer)
    if rng.random() < 0.7:
        cell = rng.randrange(len(scene.objects))
        place, kind = world._at(scene.place(cell)), scene.objects[cell]
        question = (f"What is {place}?", f"What can be seen {place} of the picture?")[writer]
        thing = "nothing" if kind is None else world._a(" ".join(kind))
        return question, (f"There is {thing} {place}.", f"I can see {thing} {place}.")[writer]
    asked = rng.choice([kind for kind in scene.objects if kind] + [COMPANION[scene.objects[i]] for i in firsts(scene)])
    if rng.random() < 0.3:
        asked = rng.choice(KINDS)
    thing = world._a(" ".join(asked))
    question = (f"Is there {thing} in the picture?", f"Can you see {thing}?")[writer]
    return question, (f"Yes, there is {thing}." if asked in scene.objects else f"No, there is no {' '.join(asked)}.")
