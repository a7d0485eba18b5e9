"""Makes a tiny LLaVA-NeXT that sees the demo world, imperfectly: a plain transformers folder, for runs without a GPU.

    python scripts/make_tiny_llava.py --out outputs/tiny/model

The architecture, tokenizer kind, processor, chat template and tensor names are those of
llava-hf/llava-v1.6-mistral-7b-hf; only the sizes differ. The same flags give the same weights (on the same machine
and thread count). A complete folder is kept, and a run that was stopped reuses the vision tower it had finished.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/tiny/model"))
    parser.add_argument("--images", type=int, default=5000, help="pictures drawn for both phases")
    parser.add_argument("--sight-steps", type=int, default=350, help="steps of the patch-label phase")
    parser.add_argument("--steps", type=int, default=300, help="steps of the instruction phase (8 pictures, 8 turns)")
    parser.add_argument(
        "--hallucination",
        type=float,
        default=0.55,
        help="chance that a color or shape is misnamed in an answer",
    )
    parser.add_argument("--habit-steps", type=int, default=40, help="steps of the last phase, on mostly false answers")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args(argv)
    from llava_orpo.tiny.model import make

    print(make(**vars(args)))
    return 0


if __name__ == "__main__":
    run(main)
