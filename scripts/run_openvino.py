"""LLaVA-1.6 on a CPU without PyTorch at work: exports a merged model to OpenVINO, asks it, compares it.

    bash scripts/openvino.sh outputs/tiny/merged outputs/tiny/openvino               # fp32
    bash scripts/openvino.sh outputs/tiny/merged outputs/tiny/openvino-8bit 8bit     # or 16bit, 4bit
    bash scripts/openvino.sh ask outputs/tiny/openvino image=photo.jpg question="What is in the picture?"
    bash scripts/openvino.sh compare outputs/tiny/merged forms=outputs/tiny/openvino,outputs/tiny/openvino-8bit \\
        data=outputs/tiny/data/demo_heldout.parquet

The answers of `ask` are those of transformers' greedy generation: the prompt is the checkpoint's own, BOS included,
and everything is computed in fp32 whatever the weights are stored in. Keys of the three:

    MODEL OUT [16bit|8bit|4bit]   a merged 16- or 32-bit folder; OUT must not hold files (overwrite=true replaces)
    ask      image, question      or data= with row= of a parquet in RLAIF-V's schema
             max_new_tokens 256, threads (default: OpenVINO's choice), out= also writes JSON
    compare  forms                exported folders, comma-separated
             data, rows 20        questions from a parquet in RLAIF-V's schema; rows=0 takes all
             score                true: also score both answers of every row (preference accuracy, token log-probs)
             output_dir           default outputs/evals/<model>-openvino: parity.json, and every side's answers
             max_new_tokens 256, restart

`compare` runs transformers and OpenVINO in one process with the same number of threads (OMP_NUM_THREADS decides).
An interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.errors import UsageError
from llava_orpo.recipe import HELP, read_command, run

ASK_KEYS = {
    "image": Path,
    "question": str,
    "data": Path,
    "row": 0,
    "max_new_tokens": 256,
    "threads": 0,
    "out": Path,
}
COMPARE_KEYS = {
    "forms": str,
    "data": Path,
    "rows": 20,
    "score": False,
    "max_new_tokens": 256,
    "output_dir": Path,
    "restart": False,
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in HELP:
        print(__doc__.strip())
        return 0 if argv else 2
    verbs = {"ask": ask, "compare": compare}
    return verbs[argv[0]](argv[1:]) if argv[0] in verbs else export(argv)


def export(argv: list[str]) -> int:
    from llava_orpo.export.openvino import FORMATS
    from llava_orpo.export.openvino import export as write

    loose = [word for word in argv if "=" not in word]
    if len(loose) < 2 or (len(loose) == 3 and loose[2] not in FORMATS) or len(loose) > 3:
        raise UsageError("Give MODEL OUT and, if wanted, 16bit, 8bit or 4bit (-h shows the help).")
    model, out, bits = Path(loose[0]), Path(loose[1]), loose[2] if len(loose) == 3 else ""
    keys = [word for word in argv if "=" in word]
    command = read_command(__doc__, [str(model), *keys], {"overwrite": False}, file="the merged model's folder")
    size = write(model, out, bits, command.own["overwrite"])
    print(f"{out}: {size / 1e6:.1f} MB. Ask it:")
    print(f'  bash scripts/openvino.sh ask {out} image=photo.jpg question="What is in the picture?"')
    return 0


def ask(argv: list[str]) -> int:
    command = read_command(__doc__, argv, ASK_KEYS, file="the exported folder")
    own = command.own
    if own["data"] is None and own["question"] is None:
        raise UsageError("Give question= (with image=), or data=.")
    from PIL import Image

    from llava_orpo.data.images import decode_rgb
    from llava_orpo.files import write_json
    from llava_orpo.serving.openvino_runner import Runner
    from llava_orpo.serving.side_by_side import read_rows

    question, image = own["question"], None
    if own["data"]:
        rows = read_rows(own["data"], own["row"] + 1)
        if len(rows) <= own["row"]:
            raise UsageError(f"{own['data']} has {len(rows)} rows; row={own['row']} is none of them (they start at 0).")
        question, image = question or rows[-1].question, rows[-1].image
    if own["image"]:
        image: Image.Image = decode_rgb(own["image"])
    answer = Runner(command.file, own["max_new_tokens"], own["threads"]).ask(question, image)
    print(f"Q: {question}\nA: {answer.text}")
    if own["out"]:
        write_json(own["out"], {"model": str(command.file), "question": question, "answer": answer.text})
    return 0


def compare(argv: list[str]) -> int:
    command = read_command(__doc__, argv, COMPARE_KEYS, file="the merged model's folder", required=("forms", "data"))
    own = command.own
    from llava_orpo.files import write_json
    from llava_orpo.serving import openvino_parity as parity
    from llava_orpo.serving.openvino_runner import check_folder
    from llava_orpo.serving.side_by_side import read_rows

    forms = [Path(name) for name in own["forms"].split(",")]
    for form in forms:
        check_folder(form)
    rows = read_rows(own["data"], own["rows"])
    folder = own["output_dir"] or Path("outputs/evals") / f"{command.file.name}-openvino"
    options = (own["max_new_tokens"], own["score"], own["restart"])
    summary = parity.compare(command.file, forms, rows, folder, *options)
    write_json(folder / "parity.json", summary)
    print(parity.table(summary))
    for form, entry in summary["forms"].items():
        for one in entry["different"][:5]:
            print(
                f"{form}, row {one['row']}: {one['question']}\n  {one['answer']}\n  transformers: {one['transformers']}"
            )
    print(f"  {folder / 'parity.json'}")
    return 0


if __name__ == "__main__":
    run(main)
