"""How llama-server answers from GGUF files, against the model in plain transformers: texts, and texts with images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .llama_server import ServedModel, serving
from .side_by_side import Answer, Reference, Row, ask_all, fingerprint, saved_answers, summarize_answers


class WithoutImages:
    """A side that is asked the questions alone."""

    def __init__(self, side: Any):
        self.side = side

    def ask(self, question: str, _image: Any) -> Answer:
        """As `Runner.ask`, without an image."""
        return self.side.ask(question, None)


def compare_served(
    model: Path, gguf: Path, projector: Path, rows: Sequence[Row], folder: Path, max_new_tokens: int, restart: bool
) -> dict[str, Any]:
    """Asks both sides every question with and without its image; returns the summaries of the two."""
    import torch

    threads = torch.get_num_threads()
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"model": str(model), "gguf": str(gguf), "mmproj": str(projector), "rows": len(rows)}
    summary |= {"threads": threads, "bytes": gguf.stat().st_size + projector.stat().st_size}
    kinds = {"texts": WithoutImages, "images": lambda side: side}
    theirs: dict[str, list[Answer]] = {}
    reference = Reference(model, max_new_tokens, threads, cut=True)  # as the GGUF file is
    for kind, view in kinds.items():
        key = f"{fingerprint(model)} cut {kind} {max_new_tokens}"
        saved = saved_answers(folder, str(model), key, restart, kind)
        theirs[kind] = ask_all(view(reference), rows, f"transformers, {kind}", saved)
    del reference
    with serving(gguf, projector, folder / "llama-server.log", threads) as base_url:
        served = ServedModel(base_url, max_new_tokens)
        for kind, view in kinds.items():
            times = f"{gguf.stat().st_mtime_ns} {projector.stat().st_mtime_ns}"
            key = f"{gguf} {projector} {times} {kind} {max_new_tokens}"
            saved = saved_answers(folder, str(gguf), key, restart, kind)
            summary[kind] = summarize_answers(
                ask_all(view(served), rows, f"llama-server, {kind}", saved), theirs[kind], rows
            )
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    lines = [
        f"{summary['rows']} questions, greedy, {summary['gguf']} against {summary['model']} in transformers, fp32",
        "| | prompt tokens equal | answers equal | answers as chosen | log-prob difference a token | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for kind in ("texts", "images"):
        entry = summary[kind]
        worst = entry["answer_logp_difference"]
        equal, chosen = (
            f"{one['count']}/{one['n']} [{one['interval'][0]:.1%}, {one['interval'][1]:.1%}]"
            for one in (entry["answers_equal"], entry["answers_chosen"])
        )
        cells = [kind, f"{entry['prompt_tokens_equal']}/{summary['rows']}", equal, chosen]
        cells += ["-" if worst is None else f"{worst:.1e}", f"{entry['tokens_per_second']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
