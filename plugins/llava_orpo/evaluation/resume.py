"""One evaluation of one model, resumed where an earlier run stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..preference import metrics as preference
from ..preference import scoring as evaluation
from ..recipe import model_label
from ..step.batches import fill_batches, image_runs
from .session import Session, open_session

FROM_RECIPE = ("model_name_or_path", "adapter_name_or_path", "quantization_bit", "eval_dataset", "cutoff_len",
               "dataset_filter", "heldout_fraction", "anyres_max_tiles", "template", "max_samples", "bf16", "fp16",
               "quantize_vision", "quantization_type", "quantization_method", "double_quantization", "infer_dtype")  # fmt: skip
ROW_KEYS = ("image_hash", "num_image_tokens", "prompt_ids", "chosen_ids", "rejected_ids")  # what a score depends on


def evaluate(recipe: dict[str, Any], folder: Path, restart: bool = False) -> list[dict]:
    """Scores the recipe's model on its eval_dataset into `folder`; returns the pairs with their true image."""
    folder.mkdir(parents=True, exist_ok=True)
    return evaluate_session(open_session(recipe, str(folder)), folder, restart)


def evaluate_session(session: Session, folder: Path, restart: bool = False) -> list[dict]:
    """`evaluate` with a model that is loaded already."""
    conditions = evaluation.CONDITIONS if session.arguments.grounding_eval else ("true",)
    scored = {}
    for condition in conditions:
        records = score(session, folder, condition, restart)
        scored[condition], unusable = evaluation.merge([records])
        if not scored[condition]:
            raise SystemExit(f"No pair could be scored: {unusable[0]['bad_image'] if unusable else 'no rows'}")
        suffix = "" if condition == "true" else f"_{condition}"
        preference.write_pairs(folder / f"preference_pairs{suffix}.jsonl", evaluation.public(scored[condition]))
    summary = preference.summarize(scored["true"], session.beta, session.arguments.eval_min_subset)
    grounding = preference.grounding(*(scored[c] for c in conditions)) if len(conditions) > 1 else None
    names = ",".join(sorted(set(session.rows["dataset"])))
    entry = {"step": 0, "epoch": 0.0, "dataset": names, "metrics": summary, "grounding": grounding}
    preference.append_history(folder / "preference_eval.json", entry)
    evaluation.write_examples(
        folder, session.rows, scored["true"], session.tokenizer, session.arguments.eval_examples
    )
    print_summary(model_label(session.recipe), names, summary, grounding)
    print(f"  {folder}/preference_eval.json, preference_pairs.jsonl, preference_examples.jsonl")
    return evaluation.public(scored["true"])


def score(session: Session, folder: Path, condition: str, restart: bool) -> list[dict]:
    """Records of all rows; those in `<folder>/.scored_<condition>.jsonl` from an earlier run are not scored again."""
    saved = folder / f".scored_{condition}.jsonl"
    key = fingerprint(session)
    done = [] if restart else read_saved(saved, key)
    seen = {record["position"] for record in done}
    positions = [i for i in range(len(session.rows)) if i not in seen]
    size = int(session.recipe.get("per_device_eval_batch_size", 8))
    if session.arguments.group_pairs_by_image and condition != "other":
        runs = image_runs(session.rows["image_hash"], positions, session.arguments.max_pairs_per_image)
        positions = fill_batches(runs, size)
    beside = saved.with_name(saved.name + ".new")  # drops a cut last line, or another model's records
    beside.write_text("".join(json.dumps(line) + "\n" for line in [{"key": key}, *done]))
    beside.replace(saved)
    if not positions:
        return done
    with saved.open("a") as out, tqdm(total=len(session.rows), initial=len(done), unit="pair", desc=condition) as bar:

        def keep(records: list[dict]) -> None:
            out.writelines(json.dumps(record) + "\n" for record in records)
            out.flush()
            bar.update(len(records))

        fresh = evaluation.score(
            session.score_batch, session.rows, positions, session.collator, size, condition,
            num_workers=int(session.recipe.get("dataloader_num_workers", 0)), on_batch=keep,
        )  # fmt: skip
    return done + fresh


def fingerprint(session: Session) -> str:
    """Names what was scored: model, adapter files, data and every key that changes a score."""
    parts: dict[str, Any] = {key: session.recipe.get(key) for key in FROM_RECIPE}
    for key in ("model_name_or_path", "adapter_name_or_path"):
        root = Path(str(parts[key]))
        if root.is_dir():
            parts[key + "/files"] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(root.glob("*.safetensors"))]
    rows = hashlib.sha256()
    for row, name in zip(session.rows.select_columns(list(ROW_KEYS)), evaluation.unique_ids(session.rows)):
        rows.update(json.dumps([name, *row.values()]).encode())
    parts["rows"] = rows.hexdigest()
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_saved(path: Path, key: str) -> list[dict]:
    """Records of an interrupted run with the same fingerprint; a last line that was cut off is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    try:
        if json.loads(lines[0]).get("key") != key:
            return []
    except json.JSONDecodeError:
        return []
    return [json.loads(line) for line in lines[1:-1] if line]  # after the last newline: nothing, or a cut line


def print_summary(model: str, dataset: str, summary: dict, grounding: dict | None) -> None:
    """The numbers as a table."""
    rows = [
        ("preference accuracy", f"{summary['preference_accuracy']:.1%}  "
         f"[{summary['preference_accuracy_low']:.1%}, {summary['preference_accuracy_high']:.1%}]"),
        ("  by summed log-prob", f"{summary['preference_accuracy_sum']:.1%}"),
        ("margin (nats per token)", f"{summary['logps/margin']:.4f}"),
        ("log-prob chosen / rejected", f"{summary['logps/chosen']:.4f} / {summary['logps/rejected']:.4f}"),
        ("SFT loss", f"{summary['sft_loss']:.4f}"),
        ("odds-ratio loss", f"{summary['odds_ratio_loss']:.4f}"),
    ]  # fmt: skip
    for name in ("grey", "other"):
        if grounding:
            rows.append((f"accuracy, {name} image", f"{grounding[name]['preference_accuracy']:.1%}"))
    for group in ("source", "question_type"):
        if len(summary["subsets"][group]) > 1:
            rows += [(f"  {k}", f"{m['preference_accuracy']:.1%}  (n={m['n']})") for k, m in summary["subsets"][group].items()]
    print(f"\n{model} on {dataset}, {summary['n']} pairs")
    for label, value in rows:
        print(f"  {label:<28}{value}")
