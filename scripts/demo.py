"""A page that shows the difference: ask the base and the aligned model, or let both score two answers.

    python scripts/demo.py recipes/llava16_orpo_qlora.yaml aligned=outputs/llava16_orpo_qlora
    python scripts/demo.py recipes/tiny/llava16_orpo_qlora.yaml aligned=outputs/tiny/orpo_qlora \\
        examples=outputs/tiny/data/demo_heldout.parquet

Takes a recipe and overrides like llamafactory-cli: model, precision and prompt are the recipe's. Serves only
http://127.0.0.1:7860 unless told otherwise. Own keys:

    aligned         an adapter folder (the base model is loaded once), or a merged model's folder or Hub id
    examples        a parquet in RLAIF-V's schema; its first images are offered as examples
    max_new_tokens  256
    max_upload_mb   largest image that is taken (10)
    host            127.0.0.1; 0.0.0.0 lets other machines in
    port            7860
    share           true: also open a public address through gradio.live
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

from llava_orpo.recipe import MODEL, read_command, run

OWN_KEYS = {
    "aligned": str,
    "examples": Path,
    "max_new_tokens": 256,
    "max_upload_mb": 10,
    "host": "127.0.0.1",
    "port": 7860,
    "share": False,
}
OLD_FLAGS = {f"--{key.replace('_', '-')}": key for key in OWN_KEYS}


def main(argv: list[str]) -> int:
    command = read_command(__doc__, argv, OWN_KEYS, required=("aligned",), uses=MODEL, old=OLD_FLAGS)
    own = command.own
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", "The '.*' parameter in", DeprecationWarning)  # 5.50 announces Gradio 6
    from llava_orpo.demo.models import load_candidates
    from llava_orpo.demo.page import build, read_examples

    with tempfile.TemporaryDirectory(prefix="llava-orpo-demo-") as scratch:
        examples = read_examples(own["examples"], 12, Path(scratch)) if own["examples"] else []
        candidates = load_candidates(command.recipe, own["aligned"], scratch)
        build(candidates, examples, own["max_new_tokens"]).launch(
            server_name=own["host"],
            server_port=own["port"],
            share=own["share"],
            show_api=False,
            show_error=True,
            max_file_size=f"{own['max_upload_mb']}mb",
            allowed_paths=[scratch],
        )
    return 0


if __name__ == "__main__":
    run(main)
