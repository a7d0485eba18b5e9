"""Writes a LLaVA-NeXT with random weights and the real geometry, for benchmarks, tests and dry runs without a download.

    python scripts/make_random_llava.py --geometry mid --out outputs/random/mid

As in llava-hf/llava-v1.6-mistral-7b-hf, tiles have 336 pixels and patches 14, there are five grids, the feature layer
is -2, and the Mistral v1 tokenizer (it ships in the package mistral-common) has <image> = 32000 and a vocabulary of
32,064. Only widths and depths differ. The same flags give the same weights.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run

GEOMETRIES = ("tiny", "mid", "slice7b")


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.out / "model.safetensors").exists():
        parser.error(f"{args.out} holds a model already; remove it or choose another --out.")
    from llava_orpo.tiny import random_model

    print(random_model.write(random_model.GEOMETRIES[args.geometry], args.out, args.seed))
    return 0


if __name__ == "__main__":
    run(main)
