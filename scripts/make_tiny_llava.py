"""Makes a tiny LLaVA-NeXT that sees the demo world, imperfectly: a plain transformers folder, for runs without a GPU.

    python scripts/make_tiny_llava.py --out outputs/tiny/model
    python scripts/make_tiny_llava.py --world cooccur      # it names what usually comes together, seen or not

The architecture, tokenizer kind, processor, chat template and tensor names are those of
llava-hf/llava-v1.6-mistral-7b-hf; only the sizes differ. The same flags give the same weights (on the same machine
and thread count). A complete folder is kept, and a run that was stopped reuses the vision tower it had finished.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run

DEFAULTS = {
    "shapes": {
        "out": Path("outputs/tiny/model"),
        "images": 5000,
        "steps": 300,
        "hallucination": 0.55,
        "habit_steps": 40,
        "habit_rate": 0.7,
    },
    "cooccur": {
        "out": Path("outputs/cooccur/model"),
        "images": 4000,
        "steps": 350,
        "hallucination": 1.0,
        "habit_steps": 60,
        "habit_rate": 1.0,
    },
}


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--world", choices=tuple(DEFAULTS), default="shapes", help="what it sees and talks about")
    parser.add_argument("--out", type=Path, help="folder (default outputs/tiny/model or outputs/cooccur/model)")
    parser.add_argument("--images", type=int, help="pictures drawn for a phase (default 5000 or 4000)")
    parser.add_argument("--sight-steps", type=int, default=350, help="steps of the patch-label phase")
    parser.add_argument("--steps", type=int, help="steps of the instruction phase: 8 pictures, 8 turns (default 300)")
    parser.add_argument(
        "--hallucination",
        type=float,
        help="chance that an answer misnames a color or shape (default 0.55), or names a missing companion where its "
        "writers do (default 1)",
    )
    parser.add_argument("--habit-steps", type=int, help="steps of the last phase, on false answers (default 40 or 60)")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args(argv)
    for key, value in DEFAULTS[args.world].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    from llava_orpo.tiny.model import make

    print(make(**vars(args)))
    return 0


if __name__ == "__main__":
    run(main)
