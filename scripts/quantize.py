"""Quantizes a merged LLaVA-1.6 to 4 bits (GPTQ or AWQ, W4A16), calibrated on preference pairs and images.

    bash scripts/quantize.sh --method gptq --model outputs/tiny/merged --data demo_train \\
        --out outputs/tiny/gptq
    bash scripts/quantize.sh --method awq --model outputs/tiny/merged --data demo_train \\
        --out outputs/tiny/awq

Only the linear layers of the language model's blocks are quantized; vision tower, projector, embeddings and
LM head keep their weights, and processor and chat-template files their bytes, unchanged. The folder is in the
compressed-tensors format under the published llava-hf tensor names. Plain transformers 5.5 and newer with
the package compressed-tensors loads it, so `evals/preference.py … model_name_or_path=outputs/tiny/gptq`
measures it like any other model. It is written beside --out, loaded again, compared with the model in
memory, and only then renamed.

llm-compressor 0.14 is given the language model alone, a plain text decoder, because AWQ's default mappings
also match the vision tower of a whole LLaVA-NeXT. config.json is written here, because compressed-tensors 0.19
lists what is not quantized by checkpoint names where transformers looks for module names: vision tower,
projector and head would be loaded as 4-bit layers and stay random.

This was run on a CPU with llm-compressor 0.14.0.1. With an accelerator llm-compressor puts one block at a time
on it (not run).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_orpo import keys
from llava_orpo.recipe import flags, run

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str]) -> int:
    args = parse(argv)
    from llava_orpo.export.quantize import quantize

    quantize(args)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; SystemExit, in one line, for what is wrong already without reading a file's content."""
    heldout = keys.known()["heldout_fraction"]["default"]
    parser = flags(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a merged 16- or 32-bit LLaVA-1.6")
    parser.add_argument("--method", choices=("gptq", "awq"), required=True)
    parser.add_argument(
        "--data", required=True, help="parquet file or folder in RLAIF-V's schema, or a registered name"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dataset-dir", type=Path, default=ROOT / "data_registry", help="where dataset_info.json is")
    parser.add_argument("--samples", type=int, default=128, help="calibration pairs (default 128)")
    parser.add_argument("--group-size", type=int, default=128, help="weights that share a scale (default 128)")
    parser.add_argument(
        "--heldout-fraction",
        type=float,
        default=heldout,
        help=f"heldout_fraction of the training recipe, so that no held-out image is seen (default {heldout})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint in --out")
    args = parser.parse_args(argv)
    if args.samples < 1 or args.group_size < 1:
        parser.error("--samples and --group-size must be positive")
    if not 0 < args.heldout_fraction < 1:
        parser.error("--heldout-fraction must be between 0 and 1")
    if not args.model.is_dir():
        parser.error(f"{args.model} is not a folder: --model is the folder of a merged model")
    return args


if __name__ == "__main__":
    run(main)
