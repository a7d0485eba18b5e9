"""How a model's OpenVINO forms answer, against the model itself in plain transformers on the same CPU.

Both sides answer the same held-out questions greedily, one at a time, with the same number of threads. Optionally both
also score the rows' two answers, which gives the preference accuracy of every form.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from .. import progress
from ..errors import UserError
from ..files import json_line, whole_lines
from ..preference.metrics import wilson_interval
from .openvino_runner import EXACT, Answer, Runner

COLUMNS = ("question", "chosen", "rejected", "image")


@dataclass(frozen=True)
class Row:
    """One question about one image, with the dataset's two answers."""

    question: str
    chosen: str
    rejected: str
    image: Image.Image


def read_rows(data: Path, count: int) -> list[Row]:
    """The first `count` rows (0: all) of a parquet file in RLAIF-V's schema. Raises UserError for another file."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(data)
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise UserError(f"{data} has no column {', '.join(missing)}: it is not in RLAIF-V's schema.")
        batches = file.iter_batches(batch_size=64, columns=list(COLUMNS))
        rows: list[Row] = []
        for batch in batches:
            for record in batch.to_pylist():
                picture = Image.open(io.BytesIO(record["image"]["bytes"])).convert("RGB")
                rows.append(Row(record["question"], record["chosen"], record["rejected"], picture))
                if len(rows) == count:
                    return rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{data} cannot be read: {str(error).splitlines()[0]}.") from error
    return rows


class Reference:
    """The model in plain transformers, fp32, with its own chat template; nothing of this package is in the way.

    cut: take probabilities over the tokenizer's tokens alone, without the embedding's padding rows.
    """

    def __init__(self, folder: Path, max_new_tokens: int, threads: int, cut: bool = False):
        import torch
        from transformers import AutoProcessor

        from ..checkpoint.published import load_checked

        torch.set_num_threads(threads)
        self.torch = torch
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = load_checked(folder, dtype=torch.float32).eval()
        self.max_new_tokens = max_new_tokens
        self.rows = len(self.processor.tokenizer) if cut else None

    def ask(self, question: str, image: Any) -> Answer:
        """As `Runner.ask`."""
        started = time.perf_counter()
        inputs = self._inputs(question, image, "")
        out = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        seconds = time.perf_counter() - started
        made = out.sequences[0, inputs["input_ids"].shape[1] :]
        logits = self.torch.cat(out.logits)[:, : self.rows].log_softmax(-1)
        logp = logits.gather(1, made[:, None]).sum().item()
        text = self.processor.tokenizer.decode(made, skip_special_tokens=True).strip()
        return Answer(text, inputs["input_ids"].shape[1], len(made), logp, seconds)

    def logps(self, question: str, image: Any, answer: str) -> np.ndarray:
        """Log-probability of each token of an answer and its end token."""
        start = self._inputs(question, image, "")["input_ids"].shape[1]
        inputs = self._inputs(question, image, f" {answer}{self.processor.tokenizer.eos_token}")
        with self.torch.no_grad():
            logits = self.model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
        return logits.gather(1, inputs["input_ids"][0, start:, None])[:, 0].numpy()

    def _inputs(self, question: str, image: Any, then: str):
        content = ([] if image is None else [{"type": "image"}]) + [{"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(images=image, text=prompt + then, return_tensors="pt")


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


class Kept:
    """Records of an interrupted comparison: what has been answered or scored is not asked again."""

    def __init__(self, path: Path, restart: bool):
        self.path, self.records = path, {}
        if path.is_file() and not restart:
            import json

            for line in whole_lines(path.read_bytes()).decode("utf-8").splitlines():
                record = json.loads(line)
                self.records[tuple(record.pop("key"))] = record
        path.write_text("".join(json_line({"key": list(k), **v}) for k, v in self.records.items()), encoding="utf-8")

    @contextmanager
    def adding(self) -> Iterator[Any]:
        """A function (key, make) that gives a kept record, or makes it and keeps it."""
        with self.path.open("a", encoding="utf-8") as file:

            def get(key: tuple, make) -> dict[str, Any]:
                if key not in self.records:
                    self.records[key] = make()
                    file.write(json_line({"key": list(key), **self.records[key]}))
                    file.flush()
                return self.records[key]

            yield get


def fingerprint(folder: Path) -> str:
    """Names a folder's weights, so that a folder written anew is asked anew."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return " ".join([folder.name, *(f"{f.stat().st_size}-{f.stat().st_mtime_ns}" for f in sorted(files))])


def ask_all(side: Any, rows: Sequence[Row], name: str, keep, what: tuple) -> list[Answer]:
    """Every row's answer of one side (`Reference` or `Runner`)."""
    out = []
    with progress.bar(len(rows), name, unit="answer") as bar:
        for number, row in enumerate(rows):
            key = (*what, "answer", number, row.question)
            out.append(Answer(**keep(key, lambda row=row: asdict(side.ask(row.question, row.image)))))
            bar.update()
    return out


def score_all(side: Any, rows: Sequence[Row], name: str, keep, what: tuple) -> list[tuple[np.ndarray, np.ndarray]]:
    """(chosen, rejected) token log-probs of every row."""

    def make(row: Row) -> dict[str, Any]:
        both = (side.logps(row.question, row.image, text).tolist() for text in (row.chosen, row.rejected))
        return dict(zip(("chosen", "rejected"), both, strict=True))

    out = []
    with progress.bar(len(rows), f"{name}, pairs", unit="pair") as bar:
        for number, row in enumerate(rows):
            record = keep((*what, "pair", number, row.question), lambda row=row: make(row))
            out.append((np.array(record["chosen"]), np.array(record["rejected"])))
            bar.update()
    return out


def share(successes: int, n: int) -> dict[str, Any]:
    """A count with its share and 95 % Wilson interval."""
    return {"count": successes, "n": n, "share": successes / n, "interval": list(wilson_interval(successes, n))}


def summarize_answers(answers: Sequence[Answer], theirs: Sequence[Answer], rows: Sequence[Row]) -> dict[str, Any]:
    """One side's answers against the reference's, and against the chosen answers of data in a fixed form."""
    n = len(rows)
    same = [mine.text == other.text for mine, other in zip(answers, theirs, strict=True)]
    differences = [
        abs(mine.logp - other.logp) / other.tokens
        for mine, other, equal in zip(answers, theirs, same, strict=True)
        if equal
    ]
    return {
        "prompt_tokens_equal": sum(a.prompt_tokens == b.prompt_tokens for a, b in zip(answers, theirs, strict=True)),
        "answers_equal": share(sum(same), n),
        "answers_chosen": share(sum(a.text == row.chosen.strip() for a, row in zip(answers, rows, strict=True)), n),
        "answer_logp_difference": max(differences, default=None),  # nats a token, the worst of the equal answers
        "tokens_per_second": sum(a.tokens for a in answers) / sum(a.seconds for a in answers),
        "different": [
            {"row": i, "question": rows[i].question, "answer": answers[i].text, "transformers": theirs[i].text}
            for i, equal in enumerate(same)
            if not equal
        ],
    }


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
    """Writes <folder>/answers.jsonl as it goes, and returns the summary: transformers' side and one entry a form.

    score: also score every row's chosen and rejected answer.
    """
    import torch

    threads = torch.get_num_threads()
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / "answers.jsonl", restart)
    summary: dict[str, Any] = {
        "model": str(model),
        "rows": len(rows),
        "max_new_tokens": max_new_tokens,
        "threads": threads,
        "forms": {},
    }
    with kept.adding() as keep:
        reference = Reference(model, max_new_tokens, threads)
        what = (fingerprint(model), max_new_tokens)
        theirs = ask_all(reference, rows, "transformers", keep, what)
        their_scores = score_all(reference, rows, "transformers", keep, what) if score else []
        del reference
        summary["transformers"] = summarize_answers(theirs, theirs, rows) | {"bytes": folder_bytes(model)}
        if score:
            summary["transformers"] |= summarize_scores(their_scores, their_scores)
        for form in forms:
            runner = Runner(form, max_new_tokens, threads)
            what = (fingerprint(form), max_new_tokens)
            found = summarize_answers(ask_all(runner, rows, form.name, keep, what), theirs, rows)
            found["bytes"] = folder_bytes(form)
            if score:
                scores = score_all(Scorer(runner, threads), rows, form.name, keep, what)
                found |= summarize_scores(scores, their_scores)
            found["speed_ratio"] = found["tokens_per_second"] / summary["transformers"]["tokens_per_second"]
            summary["forms"][str(form)] = found
    return summary


def folder_bytes(folder: Path) -> int:
    """The size of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
