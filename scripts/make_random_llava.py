"""Write a LLaVA-NeXT with random weights and the real geometry: for benchmarks, tests and dry runs without a download.

    python scripts/make_random_llava.py --geometry mid --out outputs/random/mid

336-pixel tiles of 14-pixel patches, the published five grids, feature layer -2, the Mistral v1 tokenizer (it ships in
the package mistral-common) with <image> = 32000, vocabulary 32,064: as llava-hf/llava-v1.6-mistral-7b-hf. Only widths
and depths differ. Deterministic: same flags, same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_orpo.tiny.random_model import GEOMETRIES, write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.out / "model.safetensors").exists():
        raise SystemExit(f"{args.out} holds a model already; remove it or choose another --out.")
    print(write(GEOMETRIES[args.geometry], args.out, args.seed))


if __name__ == "__main__":
    main()
