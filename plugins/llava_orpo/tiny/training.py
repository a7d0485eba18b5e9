"""The two training phases of the tiny LLaVA-NeXT (scripts/make_tiny_llava.py).

1. Sight: the vision tower learns to label each patch with the color and shape of what covers it. This takes the place
   of CLIP's pretraining and, like it, ends with a frozen vision tower.
2. Instruction tuning: projector and language model learn to answer questions in the exact prompt format. Some of the
   answers are false in a systematic manner (`world.misperceive`), so the model learns to hallucinate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from . import world

COLOR_CLASSES = (*world.BACKGROUNDS, *world.COLORS)
SHAPE_CLASSES = ("nothing", *world.SHAPES)
PROMPT_START = "[INST] <image>\n"
PROMPT = PROMPT_START + "{question} [/INST]"
MIN_COVER = 0.2  # a patch belongs to the object that covers at least this part of it

TRUTHFUL = 0.7  # share of the instruction phase before the false answers start
HABIT_RATE, HABIT_LR = 0.7, 1e-3  # of the last phase: mostly false answers, at a rate that leaves the sight intact


@dataclass(frozen=True)
class Pictures:
    """Drawn scenes, as the model sees them.

    Attributes:
        scenes: what each picture shows.
        sizes: (N, 2) int, height and width of each picture.
        tiles: (sum of tiles, 3, S, S) float, the anyres tiles of all pictures, one picture after the other.
        offsets: N + 1 ints; the tiles of picture i are `tiles[offsets[i]:offsets[i + 1]]`.
        colors, shapes: (sum of tiles, patches) int, class of each patch in COLOR_CLASSES and SHAPE_CLASSES.
    """

    scenes: list[world.Scene]
    sizes: torch.Tensor
    tiles: torch.Tensor
    offsets: list[int]
    colors: torch.Tensor
    shapes: torch.Tensor


def draw_pictures(
    processor: LlavaNextProcessor,
    count: int,
    seed: int,
    random_scene: Callable[[random.Random], world.Scene] = world.random_scene,
) -> Pictures:
    """Draws `count` random scenes and cuts them, and their patch labels, with the model's own image processor."""
    rng = random.Random(f"pretraining/{seed}")
    images = processor.image_processor
    scenes, sizes, tiles, colors, shapes, offsets = [], [], [], [], [], [0]
    for _ in tqdm(range(count), desc="draw pictures", unit="picture"):
        scene = random_scene(rng)
        picture, labels = world.draw(scene, rng)
        seen = images([picture], return_tensors="pt")
        cut = images([labels.convert("RGB")], resample=0, do_rescale=False, do_normalize=False, return_tensors="pt")
        index = _patch_labels(cut["pixel_values"][0][:, 0].long(), processor.patch_size)
        background = COLOR_CLASSES.index(scene.background)
        kinds = [kind or (scene.background, "nothing") for kind in scene.objects]
        color_of = torch.tensor([background] + [COLOR_CLASSES.index(c) for c, _ in kinds])
        shape_of = torch.tensor([0] + [SHAPE_CLASSES.index(s) for _, s in kinds])
        scenes.append(scene)
        sizes.append(seen["image_sizes"][0])
        tiles.append(seen["pixel_values"][0])
        colors.append(color_of[index])
        shapes.append(shape_of[index])
        offsets.append(offsets[-1] + len(tiles[-1]))
    return Pictures(scenes, torch.stack(sizes), torch.cat(tiles), offsets, torch.cat(colors), torch.cat(shapes))


def _patch_labels(index: torch.Tensor, patch: int) -> torch.Tensor:
    """(tiles, S, S) object index of each pixel -> (tiles, patches) index of the object that covers most of a patch."""
    cells = index.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)
    cover = F.one_hot(cells, 7).float().mean(2)
    cover[..., 0] = MIN_COVER
    return cover.argmax(-1)


def make_updater(named: list[tuple[str, torch.nn.Parameter]], steps: int) -> Callable[[torch.Tensor], None]:
    """One training step as a function of the loss: Muon for the matrices inside the blocks, AdamW for the rest.

    Both learning rates warm up linearly over a tenth of the steps, then follow half a cosine down to zero. Muon needs
    less than half of AdamW's steps here, which keeps this script at minutes.
    """
    inside = [p for name, p in named if p.ndim == 2 and not ("embed" in name or "head" in name)]
    chosen = {id(p) for p in inside}
    rest = [p for _, p in named if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(inside, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]

    def update(loss: torch.Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()

    return update


def make_gentle_updater(named: list[tuple[str, torch.nn.Parameter]]) -> Callable[[torch.Tensor], None]:
    """One AdamW step at a constant HABIT_LR after a short warm-up."""
    parameters = [p for _, p in named]
    optimizer = torch.optim.AdamW(parameters, lr=HABIT_LR, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 6))

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return update


def train_sight(
    model: LlavaNextForConditionalGeneration,
    pictures: Pictures,
    steps: int,
    seed: int,
    batch: int = 128,
) -> None:
    """Trains the vision tower on patch labels, read from the layer the projector reads (hidden state -2, no CLS)."""
    if steps == 0:
        return
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    heads = torch.nn.Linear(width, len(COLOR_CLASSES) + len(SHAPE_CLASSES))
    update = make_updater(
        [*tower.named_parameters(), *((f"head.{name}", p) for name, p in heads.named_parameters())], steps
    )
    whole = torch.tensor(pictures.offsets[:-1])  # the first tile of a picture shows all of it, small: half of the batch
    bar = tqdm(range(steps), desc="sight", unit="step")
    for _ in bar:
        pick = torch.cat(
            (
                whole[torch.randint(len(whole), (batch // 2,), generator=generator)],
                torch.randint(len(pictures.tiles), (batch - batch // 2,), generator=generator),
            )
        )
        features = tower(pictures.tiles[pick], output_hidden_states=True).hidden_states[-2][:, 1:]
        color, shape = heads(features).split((len(COLOR_CLASSES), len(SHAPE_CLASSES)), dim=-1)
        colors, shapes = pictures.colors[pick], pictures.shapes[pick]
        loss = F.cross_entropy(color.flatten(0, 1), colors.flatten()) + F.cross_entropy(
            shape.flatten(0, 1), shapes.flatten()
        )
        update(loss)
        right = ((shape.argmax(-1) == shapes) & (color.argmax(-1) == colors)).float().mean()
        bar.set_postfix(loss=f"{loss.item():.3f}", patches_right=f"{right.item():.3f}", refresh=False)


@torch.no_grad()
def see(model: LlavaNextForConditionalGeneration, tiles: torch.Tensor) -> torch.Tensor:
    """(tiles, 3, S, S) -> (tiles, patches, width): what the frozen vision tower gives the projector."""
    tower = model.model.vision_tower
    batches = tqdm(tiles.split(512), desc="see the pictures", unit="batch")
    return torch.cat([tower(part, output_hidden_states=True).hidden_states[-2][:, 1:] for part in batches])


def write_turn(scene: world.Scene, rng: random.Random, rate: float, detailed: bool) -> tuple[str, str]:
    """One question about `scene` and the answer of an observer who misperceives it at `rate`."""
    believed = world.misperceive(scene, rng, rate)
    other = world.counterfactual(believed, rng)
    key = ("describe",) if detailed else world.choose_question(believed, other, rng)
    writer = rng.randrange(2)
    return (
        world.ask(scene, key, writer),
        world.answer(scene, key, world.facts(believed)[key], writer),
    )


def tokenize_turns(processor: LlavaNextProcessor, turns: list[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Tokenizes turns in the model's prompt format.

    Returns:
        For each turn the ids after the image's newline (question, response, </s>), and how many of them are response.
        The ids before that, [BOS] "[INST] " <image> "\\n" with a word-start mark before either text, are the same for
        every turn.
    """
    tokenizer = processor.tokenizer
    prompts = [PROMPT.format(question=question) for question, _ in turns]
    ends = tokenizer(prompts)["input_ids"]
    fulls = tokenizer([f"{p} {a}</s>" for p, (_, a) in zip(prompts, turns, strict=True)])["input_ids"]
    start = len(tokenizer(PROMPT_START)["input_ids"])
    return [(full[start:], len(full) - len(end)) for full, end in zip(fulls, ends, strict=True)]


def instruction_batches(
    processor: LlavaNextProcessor,
    pictures: Pictures,
    steps: int,
    seed: int,
    rate: float,
    batch: int,
    turns: int,
    truthful: float,
    write: Callable[..., tuple[str, str]] = write_turn,
) -> Iterator[tuple[list[int], list[list[tuple[list[int], int]]]]]:
    """Yields (picture numbers, tokenized turns of each). The first turn of each picture is a detailed description.

    The answers of the first steps are true; from step truthful * steps on their writer misperceives at `rate`.
    """
    rng = random.Random(f"instructions/{seed}/{truthful}")
    for step in range(steps):
        now = 0.0 if step < truthful * steps else rate
        picked = [rng.randrange(len(pictures.scenes)) for _ in range(batch)]
        texts = [write(pictures.scenes[i], rng, now, detailed=k == 0) for i in picked for k in range(turns)]
        tokens = tokenize_turns(processor, texts)
        yield picked, [tokens[i * turns : (i + 1) * turns] for i in range(batch)]


def branch_layout(prefix: int, turns: list[tuple[list[int], int]], length: int) -> tuple[torch.Tensor, ...]:
    """Lays out several turns about one picture behind one shared prefix, padded to `length` tokens.

    Every turn sees the prefix and itself, never another turn, so each is trained exactly as if it were alone.

    Returns:
        mask: (length, length) bool, True where a query (row) sees a key (column).
        position_ids: (length,); labels: (length,), -100 where the next token is not a response token.
    """
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:, 0] = True  # padding queries must see something
    mask[:prefix, :prefix] = torch.ones(prefix, prefix).tril().bool()
    position_ids, labels = torch.arange(length), torch.full((length,), -100)
    start = prefix
    for ids, response in turns:
        stop = start + len(ids)
        mask[start:stop, :prefix] = True
        mask[start:stop, start:stop] = torch.ones(len(ids), len(ids)).tril().bool()
        position_ids[start:stop] = torch.arange(prefix, prefix + len(ids))
        labels[stop - response - 1 : stop - 1] = torch.tensor(ids[-response:])
        start = stop
    return mask, position_ids, labels


def train_instructions(
    model: LlavaNextForConditionalGeneration,
    processor: LlavaNextProcessor,
    pictures: Pictures,
    steps: int,
    seed: int,
    rate: float,
    batch: int = 8,
    turns: int = 8,
    habits: bool = False,
    write: Callable[..., tuple[str, str]] = write_turn,
) -> None:
    """Trains projector, newline, language model and LM head on questions and partly false answers (vision frozen).

    With `habits` all answers are written at `rate` and the updates are gentle: the model gets the habit of
    hallucinating but still sees as before, which preference training can bring out again. write: gives a turn about a
    scene (see `write_turn`).
    """
    if steps == 0:
        return
    inner = model.model
    features = see(model, pictures.tiles)
    for parameter in inner.vision_tower.parameters():
        parameter.requires_grad_(False)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    update = make_gentle_updater(trained) if habits else make_updater(trained, steps)
    truthful = 0.0 if habits else TRUTHFUL
    start = processor.tokenizer(PROMPT_START)["input_ids"]
    head, tail = (
        start[: start.index(processor.image_token_id)],
        start[start.index(processor.image_token_id) + 1 :],
    )
    embed = inner.language_model.get_input_embeddings()
    bar = tqdm(total=steps, desc="habits" if habits else "instructions", unit="step")
    batches = instruction_batches(processor, pictures, steps, seed, rate, batch, turns, truthful, write)
    for picked, texts in batches:
        seen = [inner.multi_modal_projector(features[pictures.offsets[i] : pictures.offsets[i + 1]]) for i in picked]
        packed, sizes = inner.pack_image_features(
            seen, pictures.sizes[picked], model.config.vision_feature_select_strategy, inner.image_newline
        )
        prefixes = [len(head) + int(size) + len(tail) for size in sizes]
        length = max(p + sum(len(ids) for ids, _ in group) for p, group in zip(prefixes, texts, strict=True))
        rows = []
        for image, group in zip(packed, texts, strict=True):
            ids = tail + [i for turn, _ in group for i in turn]
            row = torch.cat((embed(torch.tensor(head)), image, embed(torch.tensor(ids))))
            rows.append(F.pad(row, (0, 0, 0, length - len(row))))
        layouts = [branch_layout(p, group, length) for p, group in zip(prefixes, texts, strict=True)]
        mask, position_ids, labels = (torch.stack(parts) for parts in zip(*layouts, strict=True))
        hidden = inner.language_model(
            inputs_embeds=torch.stack(rows),
            attention_mask=mask[:, None],
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        scored = labels != -100
        loss = F.cross_entropy(model.lm_head(hidden[scored]), labels[scored])
        update(loss)
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    for parameter in inner.vision_tower.parameters():
        parameter.requires_grad_(True)
