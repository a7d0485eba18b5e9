"""All forms of one model side by side: base, adapter, merged, quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..preference.writing import Evaluation
from . import generation
from .resume import evaluate_session
from .session import Session, open_session

HEAD = ["form", "on disk", "preference accuracy", "against the trained form", "answer"]


def measure(form: dict[str, Any], place: Path, own: dict[str, Any]) -> tuple[Evaluation, dict[str, str]]:
    """(its evaluation, its `one_answer`) of a form, which is loaded once and then released."""
    place.mkdir(parents=True, exist_ok=True)
    with open_session(form, str(place)) as session:
        evaluation = evaluate_session(session, place, own["restart"])
        return evaluation, one_answer(session, place, own)


def one_answer(session: Session, place: Path, own: dict[str, Any]) -> dict[str, str]:
    """{"question", "chosen", "answer"} of the asked prompt, greedy."""
    positions = generation.unique_prompts(session.rows)
    if not 0 <= own["prompt"] < len(positions):
        raise UserError(f"prompt={own['prompt']}: the held-out set has {len(positions)} prompts, counted from 0.")
    position = positions[own["prompt"]]
    settings = generation.Settings(own["max_new_tokens"])
    record = generation.answers(session, [position], place, "answer", settings, own["restart"])[position]
    line = generation.describe(session, position, record, place)
    return {"question": line["question"], "chosen": line["chosen"], "answer": record.get("answer", "")}


def row(
    name: str, form: dict[str, Any], metrics: dict[str, Any], compared: dict[str, Any], answer: dict[str, str]
) -> dict[str, Any]:
    """One form's line of the table. metrics: its summary; compared: `metrics.compare` with the trained form."""
    adapter = form.get("adapter_name_or_path")
    return {
        "form": name,
        "path": adapter or form["model_name_or_path"],
        "bytes": weight_bytes(Path(adapter or form["model_name_or_path"])),
        "n": metrics["n"],
        **{f"accuracy{bound}": metrics[f"preference_accuracy{bound}"] for bound in ("", "_low", "_high")},
        **{key: compared[key] for key in ("difference", "difference_low", "difference_high", "mcnemar_p")},
        **answer,
    }


def weight_bytes(folder: Path) -> int | None:
    """Bytes of a local folder's own weights, checkpoints below it not counted; None for a Hub id."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else None


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [f'{rows[0]["n"]} held-out pairs. "{rows[0]["question"]}" (chosen: "{rows[0]["chosen"]}")', ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for number, r in enumerate(rows):
        size = (
            "-"
            if r["bytes"] is None
            else f"{r['bytes'] / 1e6:.1f} MB"
            if r["bytes"] < 1e9
            else f"{r['bytes'] / 1e9:.1f} GB"
        )
        interval = f"{r['accuracy']:.1%} [{r['accuracy_low']:.1%}, {r['accuracy_high']:.1%}]"
        bounds = "" if r["difference_low"] is None else f" [{r['difference_low']:+.1%}, {r['difference_high']:+.1%}]"
        against = f"{r['difference']:+.1%}{bounds}" if number else "-"
        text = r["answer"].replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {r['form']} | {size} | {interval} | {against} | {text} |")
    return "\n".join(lines) + "\n"
