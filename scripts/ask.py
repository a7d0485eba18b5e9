"""Asks a LLaVA-NeXT one question about one image, in plain transformers, without LLaMA-Factory and the plugin.

    python scripts/ask.py outputs/tiny/merged --data outputs/tiny/data/demo_heldout.parquet --row 0
    python scripts/ask.py outputs/llava16_orpo_merged --image photo.jpg --question "What is in the picture?"

Stops with an error if any weight of the folder is missing or unexpected.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

from llava_orpo.errors import UserError
from llava_orpo.recipe import flags, run


def load(folder: str, dtype: str = "auto"):
    """(model, processor) of a folder or Hub id; UserError when a weight is missing, unexpected or of another shape."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    if problems:
        raise UserError(f"{folder} did not load completely: {problems}")
    return model.eval(), AutoProcessor.from_pretrained(folder)


def answer(model, processor, image, question: str, max_new_tokens: int = 128) -> str:
    """The greedy answer in the checkpoint's own chat template. image: a PIL picture, or None."""
    content = ([{"type": "image"}] if image is not None else []) + [{"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("model")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--question")
    parser.add_argument("--data", type=Path, help="a parquet in RLAIF-V's schema to take image and question from")
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="also write question and answer as JSON")
    args = parser.parse_args(argv)
    row = {}
    if args.data:
        import pyarrow.parquet as pq

        row = pq.read_table(args.data).slice(args.row, 1).to_pylist()[0]
    if args.image and not args.image.is_file():
        parser.error(f"there is no image {args.image}")
    if not (args.question or row):
        parser.error("give --question (with --image), or --data")
    question = args.question or row["question"]
    from PIL import Image

    source = args.image or (io.BytesIO(row["image"]["bytes"]) if row else None)
    image = Image.open(source).convert("RGB") if source else None
    model, processor = load(args.model)
    text = answer(model, processor, image, question, args.max_new_tokens)
    print(f"Q: {question}\nA: {text}")
    if args.out:
        result = {"model": args.model, "question": question, "answer": text}
        result.update({key: row[key] for key in ("chosen", "rejected") if key in row})
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    run(main)
