"""Converts LLaVA-1.6 checkpoints from the original layout to the published transformers one, or back.

    python scripts/convert_llava_checkpoint.py liuhaotian/llava-v1.6-mistral-7b-folder out/llava-v1.6-mistral-7b-hf
    python scripts/convert_llava_checkpoint.py out/merged out/merged-original

The layout of SOURCE (a local folder: mistral-7b, vicuna-7b, vicuna-13b, 34b) decides the direction. Weights
keep their dtype and are written shard by shard, so memory holds about one shard. Towards transformers, <image>
is added and the vocabulary is padded to a multiple of 64 (32,064 rows for Mistral and Vicuna, 64,064 for the
34b), as published; on the way back those rows are dropped. Whatever the other layout cannot hold is kept in
converted_from.json and converted_from.safetensors, so that converting back gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from llava_orpo.recipe import flags, run


def main(argv: list[str]) -> int:
    parser = flags(__doc__)
    parser.add_argument("source", type=Path, help="checkpoint folder, in either layout")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument(
        "--files-from", type=Path, help="take config, tokenizer and processor files from this folder (target layout)"
    )
    parser.add_argument("--vision-tower", type=Path, help="CLIP folder, for an original without its vision tower")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest shard to write (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already in OUT")
    parser.add_argument("--dry-run", action="store_true", help="check and print the mapping; write nothing")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        parser.error(f"{args.source} is not a folder: SOURCE is a checkpoint's folder, in either layout")
    from llava_orpo.checkpoint.files import check_output
    from llava_orpo.export.convert import convert, make_plan

    if not args.dry_run:
        check_output(args.out, args.overwrite)
    plan = make_plan(args.source, args.files_from, args.vision_tower)
    if args.dry_run:
        print_table(plan)
        return 0
    convert(args.source, args.out, plan, args.max_shard_gb, args.overwrite)
    print(f"{args.out}: {len(plan.names)} tensors in the {plan.target} layout")
    return 0


def print_table(plan) -> None:
    """Prints the mapping, one tensor per line, and what the run would write."""
    for name, (weights, there) in plan.names.items():
        before, after = weights.shapes[there], plan.shapes[name]
        note = f"  (from {list(before)})" if before != after else ""
        print(f"{there} -> {name} {list(after)}{note}")
    size = sum(tensor.nbytes for tensor in plan.planned().values())
    print(f"{len(plan.names)} tensors, {size / 1e9:.3f} GB, to the {plan.target} layout")
    print("files:", ", ".join(sorted(plan.files)))


if __name__ == "__main__":
    run(main)
