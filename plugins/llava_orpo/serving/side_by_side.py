"""The same held-out questions, asked of a model in plain transformers and of a form of it, one at a time.

What comparisons of OpenVINO and of llama.cpp share. Importing this module needs none of the runtimes.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..evaluation.saved import Saved
from ..preference.metrics import wilson_interval

COLUMNS = ("question", "chosen", "rejected", "image")


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: without special tokens and outer blanks.
        prompt_tokens: as the runtime counted them, image tokens included.
        tokens: generated, the end token included.
        logp: log-probability of the whole answer, in nats.
        seconds: from the decoded image to the text.
    """

    text: str
    prompt_tokens: int
    tokens: int
    logp: float
    seconds: float


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


def fingerprint(folder: Path) -> str:
    """Names a folder's weights, so that a folder written anew is asked anew."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return " ".join([folder.name, *(f"{f.stat().st_size}-{f.stat().st_mtime_ns}" for f in sorted(files))])


def saved_answers(folder: Path, model: str, key: str, restart: bool, kind: str = "answers") -> Saved:
    """The file of one model's records in `folder`. key: of its weights and of whatever else its answers depend on."""
    digest = hashlib.sha256(model.encode()).hexdigest()[:8]
    return Saved(folder / f"{kind}_{Path(model).name}_{digest}.jsonl", key, restart)


def each_row(saved: Saved, rows: Sequence[Any], unit: str, name: str, make: Callable) -> list[dict[str, Any]]:
    """What `make` gives for every row; what an earlier run has saved is not made again."""
    done = {(record["row"], record["question"]): record for record in saved.records}
    keys = [(number, row.question) for number, row in enumerate(rows)]
    waiting = [key for key in keys if key not in done]
    with saved.appending(len(rows), len(rows) - len(waiting), unit, name) as add:
        for key in waiting:
            done[key] = {"row": key[0], "question": key[1], **make(rows[key[0]])}
            add([done[key]])
    return [done[key] for key in keys]


def ask_all(side: Any, rows: Sequence[Row], name: str, saved: Saved) -> list[Answer]:
    """Every row's answer of one side, which has `Reference.ask`."""
    found = each_row(saved, rows, "answer", name, lambda row: asdict(side.ask(row.question, row.image)))
    return [Answer(**{field.name: record[field.name] for field in fields(Answer)}) for record in found]


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


def folder_bytes(folder: Path) -> int:
    """The size of a folder's files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
