"""A page where anyone sees the difference: ask the base and the aligned model, or let both judge two answers.

    python scripts/demo.py recipes/llava16_orpo_qlora.yaml --aligned outputs/llava16_orpo_qlora
    python scripts/demo.py recipes/tiny/llava16_orpo_qlora.yaml --aligned outputs/tiny/orpo_qlora \
        --examples outputs/tiny/data/demo_heldout.parquet

Model, precision and prompt are the recipe's; `key=value` overrides it. --aligned is an adapter folder (the base model
is loaded once) or a merged model's folder. Serves http://127.0.0.1:7860 and nothing else unless told to.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", "The '.*' parameter in", DeprecationWarning)  # 5.50 announces Gradio 6

from llava_orpo.checkpoint.files import CheckpointError
from llava_orpo.demo.models import load_candidates
from llava_orpo.demo.page import build, read_examples
from llava_orpo.recipe import read_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--aligned", required=True, help="an adapter folder, or a merged model's folder or Hub id")
    parser.add_argument("--examples", type=Path, help="a parquet in RLAIF-V's schema; its first images are offered")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-upload-mb", type=int, default=10)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="also open a public address through gradio.live")
    args = parser.parse_intermixed_args()
    recipe, _ = read_recipe([args.recipe, *args.overrides], {})
    with tempfile.TemporaryDirectory(prefix="llava-orpo-demo-") as scratch:
        examples = read_examples(args.examples, 12, Path(scratch)) if args.examples else []
        try:
            candidates = load_candidates(recipe, args.aligned, scratch)
        except CheckpointError as error:
            raise SystemExit(str(error)) from None
        build(candidates, examples, args.max_new_tokens).launch(
            server_name=args.host, server_port=args.port, share=args.share, show_api=False, show_error=True,
            max_file_size=f"{args.max_upload_mb}mb", allowed_paths=[scratch],
        )  # fmt: skip


if __name__ == "__main__":
    main()
