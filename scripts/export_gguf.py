"""LLaVA-1.6 for llama.cpp: language model and image projector as GGUF, quantized on request, and what that costs.

    bash scripts/gguf.sh outputs/tiny/merged outputs/tiny/gguf
    bash scripts/gguf.sh outputs/tiny/merged outputs/tiny/gguf q8_0 q4_k_m
    bash scripts/gguf.sh compare outputs/tiny/merged gguf=outputs/tiny/gguf data=outputs/tiny/data/demo_heldout.parquet

    MODEL OUT [TYPE …]   a merged 16- or 32-bit folder; writes OUT/model-<dtype>.gguf, OUT/mmproj-<dtype>.gguf and
                         OUT/model-<type>.gguf for every type of llama-quantize; the dtype is the model's own.
                         overwrite=true replaces what is in OUT
    compare   gguf       the folder; data, rows 20: questions from a parquet in RLAIF-V's schema
              model      the file in it (default: the unquantized one)
              max_new_tokens 256, output_dir (default outputs/evals/<model>-gguf: parity.json), restart

Texts are answered as by transformers. Images are not: see docs/serving.md, and `compare`, which starts llama-server and
asks it and transformers the same questions with and without their images.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import HELP, read_command, run

COMPARE_KEYS = {
    "gguf": Path,
    "model": str,
    "data": Path,
    "rows": 20,
    "max_new_tokens": 256,
    "output_dir": Path,
    "restart": False,
}
IMAGES = """\
Texts are answered as by transformers. Images are NOT: llama.cpp leaves out LLaVA-1.6's newline features and keeps the
padding, puts the overview last, and gives an image that is not larger than one tile no tiles. Of 400 answers of the
tiny demo model about images, 97 were those of transformers (sources of llama-cpp-python 0.3.36). Measure your model:
  bash scripts/gguf.sh compare {model} gguf={out} data=PAIRS.parquet
Where answers must be those of the aligned model, serve it by OpenVINO (scripts/openvino.sh) or vLLM."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        print(__doc__.strip())
        return 0 if argv else 2
    return compare(argv[1:]) if argv[0] == "compare" else export(argv)


def export(argv: list[str]) -> int:
    loose = [word for word in argv if "=" not in word]
    if len(loose) < 2:
        raise UsageError("Give MODEL OUT and, if wanted, types such as q4_k_m (-h shows the help).")
    keys = [word for word in argv if "=" in word]
    command = read_command(__doc__, [loose[0], *keys], {"overwrite": False}, file="the merged model's folder")
    model, out = Path(loose[0]), Path(loose[1])
    from llava_orpo.export.gguf_folder import write_folder

    files = write_folder(model, out, loose[2:], command.own["overwrite"])
    for file in files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    projector = next(file for file in files if file.name.startswith("mmproj"))
    chosen = files[-1] if loose[2:] else files[0]
    print("The chat template is in the file; llama-server adds BOS. Start it:")
    print(f"  .venv-gguf/llama.cpp/build/bin/llama-server -m {chosen} --mmproj {projector} \\")
    print("      --host 127.0.0.1 --port 8080 -c 8192 --temp 0 -fa off -ctk f32 -ctv f32")
    print(IMAGES.format(model=model, out=out))
    return 0


def compare(argv: list[str]) -> int:
    required = ("gguf", "data")
    command = read_command(__doc__, argv, COMPARE_KEYS, file="the merged model's folder", required=required)
    own = command.own
    from llava_orpo.export.gguf_folder import find_files
    from llava_orpo.files import write_json
    from llava_orpo.serving.llama_parity import compare_served, table
    from llava_orpo.serving.side_by_side import read_rows

    model, projector = find_files(own["gguf"], own["model"])
    rows = read_rows(own["data"], own["rows"])
    folder = own["output_dir"] or Path("outputs/evals") / f"{command.file.name}-gguf"
    options = (own["max_new_tokens"], own["restart"])
    summary = compare_served(command.file, model, projector, rows, folder, *options)
    write_json(folder / "parity.json", summary)
    print(table(summary))
    print(f"  {folder / 'parity.json'}")
    return 0


if __name__ == "__main__":
    run(main)
