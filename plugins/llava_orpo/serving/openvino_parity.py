"""How a model's OpenVINO forms answer, against the model itself in plain transformers on the same CPU.

Both sides answer the same held-out questions greedily, one at a time, with the same number of threads. Optionally both
also score the rows' two answers, which gives the preference accuracy of every form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..evaluation.saved import Saved
from .openvino_runner import EXACT, Runner
from .side_by_side import (
    Reference,
    Row,
    ask_all,
    each_row,
    fingerprint,
    folder_bytes,
    saved_answers,
    share,
    summarize_answers,
)


class Scorer:
    """Log-probs of given answers under an exported folder, by its parts (GenAI scores only what it generates)."""

    def __init__(self, runner: Runner, threads: int):
        import openvino
        import torch
        from transformers import AutoConfig

        core = openvino.Core()
        properties = {**EXACT, "INFERENCE_NUM_THREADS": threads}
        self.torch, self.runner = torch, runner
        self.parts = {
            name: core.compile_model(
                runner.folder / f"openvino_{name}_model.xml", "CPU", properties
            ).create_infer_request()
            for name in ("vision_embeddings", "text_embeddings", "language")
        }
        self.config = AutoConfig.from_pretrained(runner.folder)
        self.newline = torch.tensor(self.config.image_newline)

    def logps(self, question: str, image: Any, answer: str) -> np.ndarray:
        """As `Reference.logps`, with the ids of `Conversation.encode_pairs`."""
        runner = self.runner
        texts = ([question], [answer], [answer], [True])
        ((_, response, _),) = runner.conversation.encode_pairs(runner.processor.tokenizer, *texts)
        prompt = runner.prompt_ids(question, image.size)
        ids = np.array([prompt + response])
        embeds = self.parts["text_embeddings"].infer([ids])[0].copy()
        embeds[ids == runner.image_token_id] = self._features(image)
        language = self.parts["language"]
        language.reset_state()
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = self.torch.from_numpy(language.infer(inputs)["logits"][0, len(prompt) - 1 : -1].copy())
        return logits.log_softmax(-1).gather(1, self.torch.tensor(response)[:, None])[:, 0].numpy()

    def _features(self, image: Any) -> np.ndarray:
        """The image's features in the order of the prompt, (tokens, hidden), laid out by transformers itself."""
        from transformers import LlavaNextModel

        inputs = self.runner.processor.image_processor([image], return_tensors="pt")
        tiles = self.parts["vision_embeddings"].infer([inputs["pixel_values"][0].numpy()])[0]
        packed = LlavaNextModel.pack_image_features(  # reads nothing of the model but its config
            SimpleNamespace(config=self.config),
            [self.torch.from_numpy(tiles.copy())],
            inputs["image_sizes"],
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=self.newline,
        )
        return packed[0][0].numpy()


def score_all(side: Any, rows: Sequence[Row], name: str, saved: Saved) -> list[tuple[np.ndarray, np.ndarray]]:
    """(chosen, rejected) token log-probs of every row, by `side.logps`."""

    def make(row: Row) -> dict[str, Any]:
        both = (side.logps(row.question, row.image, text).tolist() for text in (row.chosen, row.rejected))
        return dict(zip(("chosen", "rejected"), both, strict=True))

    found = each_row(saved, rows, "pair", f"{name}, pairs", make)
    return [(np.array(record["chosen"]), np.array(record["rejected"])) for record in found]


def summarize_scores(scores: Sequence[tuple], theirs: Sequence[tuple]) -> dict[str, Any]:
    """Preference accuracy by mean log-prob per token, and the largest difference of one token's from the reference."""
    right = sum(bool(chosen.mean() > rejected.mean()) for chosen, rejected in scores)
    pairs = [(a, b) for mine, other in zip(scores, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    return {
        "preference_accuracy": share(right, len(scores)),
        "token_logp_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
    }


def compare(
    model: Path,
    forms: Sequence[Path],
    rows: Sequence[Row],
    folder: Path,
    max_new_tokens: int,
    score: bool,
    restart: bool,
) -> dict[str, Any]:
    """Saves answers in `folder` as they come, and returns the summary: transformers' side and one entry per form.

    score: also score every row's chosen and rejected answer.
    """
    import torch

    threads = torch.get_num_threads()
    folder.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "model": str(model),
        "rows": len(rows),
        "max_new_tokens": max_new_tokens,
        "threads": threads,
        "forms": {},
    }

    def saved(of: Path, kind: str) -> Saved:
        return saved_answers(folder, str(of), f"{fingerprint(of)} {max_new_tokens}", restart, kind)

    reference = Reference(model, max_new_tokens, threads)
    theirs = ask_all(reference, rows, "transformers", saved(model, "answers"))
    their_scores = score_all(reference, rows, "transformers", saved(model, "pairs")) if score else []
    del reference
    summary["transformers"] = summarize_answers(theirs, theirs, rows) | {"bytes": folder_bytes(model)}
    if score:
        summary["transformers"] |= summarize_scores(their_scores, their_scores)
    for form in forms:
        runner = Runner(form, max_new_tokens, threads)
        found = summarize_answers(ask_all(runner, rows, form.name, saved(form, "answers")), theirs, rows)
        found["bytes"] = folder_bytes(form)
        if score:
            scores = score_all(Scorer(runner, threads), rows, form.name, saved(form, "pairs"))
            found |= summarize_scores(scores, their_scores)
        found["speed_ratio"] = found["tokens_per_second"] / summary["transformers"]["tokens_per_second"]
        summary["forms"][str(form)] = found
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""

    def part(value: dict[str, Any]) -> str:
        low, high = value["interval"]
        return f"{value['count']}/{value['n']} [{low:.1%}, {high:.1%}]"

    n = summary["rows"]
    lines = [f"{n} questions, greedy, {summary['threads']} thread(s), against {summary['model']} in transformers, fp32"]
    lines.append(
        "| form | size | prompt tokens equal | answers equal | answers as chosen | preference accuracy "
        "| largest token log-prob difference | tokens/s |"
    )
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, entry in {"transformers": summary["transformers"], **summary["forms"]}.items():
        accuracy = part(entry["preference_accuracy"]) if "preference_accuracy" in entry else "-"
        worst = entry.get("token_logp_difference", entry["answer_logp_difference"])
        speed = f"{entry['tokens_per_second']:.0f}"
        if "speed_ratio" in entry:
            speed += f" ({entry['speed_ratio']:.1f}x)"
        cells = [
            Path(name).name,
            f"{entry['bytes'] / 1e6:.1f} MB",
            f"{entry['prompt_tokens_equal']}/{n}",
            part(entry["answers_equal"]),
            part(entry["answers_chosen"]),
            accuracy,
            "-" if worst is None else f"{worst:.1e}",
            speed,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
