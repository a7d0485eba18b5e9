"""The demo's Gradio page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path

import gradio as gr
import pyarrow.parquet as pq

from ..data.images import ImageError, content_hash
from . import cards
from .models import Candidate, read_image
from .served import ServedCandidate

MAX_QUESTION, MAX_ANSWER = 2000, 4000  # characters
WAITING_USERS = 32
ROLES = ("Base", "Aligned")
FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # no web fonts
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


class Actions:
    """What the page's buttons do with the two models. candidates: (base, aligned)."""

    def __init__(self, candidates: tuple[Candidate | ServedCandidate, ...], examples: list[dict], max_new_tokens: int):
        self.candidates, self.examples, self.max_new_tokens = candidates, examples, max_new_tokens
        self.labels = [candidate.label for candidate in candidates]

    def ask(self, path: str | None, question: str) -> Iterator[tuple[str, str]]:
        """The cards of both answers, again and again while they are written."""
        with messages():
            image, question = checked(path, question)
            said = ["", ""]
            for turn, candidate in enumerate(self.candidates):
                for said[turn] in candidate.stream_answer(image, question, self.max_new_tokens):
                    states = ("writing", "waiting") if turn == 0 else ("done", "writing")
                    yield tuple(map(cards.answer_card, ROLES, self.labels, said, states))
            others = [said[1], said[0]]
            yield tuple(
                cards.answer_card(*card, "done", other)
                for *card, other in zip(ROLES, self.labels, said, others, strict=True)
            )
            return
        yield gr.skip(), gr.skip()  # what was on the page stays

    def judge(self, path: str | None, question: str, a: str, b: str) -> list[str]:
        """The cards that say which answer each model prefers."""
        with messages():
            image, question = checked(path, question)
            a, b = a.strip(), b.strip()
            if not a or not b or max(len(a), len(b)) > MAX_ANSWER:
                raise ValueError(f"Write two answers, A and B, of up to {MAX_ANSWER} characters each.")
            scores = [candidate.compare(image, question, a, b) for candidate in self.candidates]
            return [cards.comparison_card(*card) for card in zip(ROLES, self.labels, scores, strict=True)]
        return [gr.skip(), gr.skip()]

    def empty(self) -> list[str]:
        """All four cards before anything was asked."""
        named = list(zip(ROLES, self.labels, strict=True))
        return [cards.answer_card(*card, "", "empty") for card in named] + [
            cards.comparison_card(*card, None) for card in named
        ]

    def pick(self, index: int) -> list:
        """An example in the fields, and empty cards."""
        row = self.examples[index]
        return [row["image"], row["question"], row["chosen"], row["rejected"], *self.empty()]


def build(candidates: tuple[Candidate | ServedCandidate, ...], examples: list[dict], max_new_tokens: int) -> gr.Blocks:
    """The page. candidates: (base, aligned). examples: each {"image": path, "question", "chosen", "rejected"}."""
    actions = Actions(candidates, examples, max_new_tokens)
    # As many requests as the models take at a time, on either tab; the others wait and see their place in line.
    at_once = min(candidate.at_once for candidate in candidates)
    queued = {"concurrency_id": "models", "concurrency_limit": at_once, "show_progress": "minimal"}
    css = (Path(__file__).parent / "demo.css").read_text(encoding="utf-8")
    with gr.Blocks(
        title="LLaVA-ORPO", theme=_theme(), css=css, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as blocks:
        gr.HTML(cards.header(*actions.labels), padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                picture, question, gallery = _inputs(examples)
            with gr.Column(scale=8, min_width=360), gr.Tabs():
                blank = actions.empty()
                with gr.Tab("Ask"):
                    ask_button = gr.Button("Ask both", variant="primary", elem_id="ask")
                    with gr.Row(equal_height=True):
                        answers = [panel(html) for html in blank[:2]]
                with gr.Tab("Compare two answers"):
                    with gr.Row():
                        first = gr.Textbox(label="Answer A", lines=3, max_length=MAX_ANSWER)
                        second = gr.Textbox(label="Answer B", lines=3, max_length=MAX_ANSWER)
                    judge_button = gr.Button("Which one does each model prefer?", variant="primary", elem_id="judge")
                    with gr.Row(equal_height=True):
                        verdicts = [panel(html) for html in blank[2:]]
                    note = "An example fills in its chosen answer as A and its rejected one as B." if examples else ""
                    gr.HTML(cards.LEGEND + f'<p class="note">{note}</p>', padding=False)
        picture.upload(check_upload, picture, picture, show_progress="hidden")
        gr.on([ask_button.click, question.submit], actions.ask, [picture, question], answers, **queued)
        judge_button.click(actions.judge, [picture, question, first, second], verdicts, **queued)
        if gallery is not None:
            filled = [picture, question, first, second, *answers, *verdicts]
            gallery.click(actions.pick, gallery, filled, queue=False, show_progress="hidden")
    return blocks.queue(max_size=WAITING_USERS)


def _theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="slate", radius_size="lg", font=list(FONTS), font_mono=list(MONO)
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color_subdued="*neutral_500",  # the default is too pale to read on white
    )


def _inputs(examples: list[dict]) -> tuple[gr.Image, gr.Textbox, gr.Dataset | None]:
    """The image, the question and, if there are examples, their gallery."""
    picture = gr.Image(
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        label="Image",
        height=280,
        show_download_button=False,
        show_share_button=False,
        elem_id="picture",
    )
    picture.preprocess = uploaded_path
    question = gr.Textbox(label="Question", lines=2, max_length=MAX_QUESTION, placeholder="What is in the picture?")
    if not examples:
        return picture, question, None
    gallery = gr.Dataset(
        components=[picture],
        samples=[[row["image"]] for row in examples],
        type="index",
        label="Examples",
        layout="gallery",
        samples_per_page=12,
    )
    return picture, question, gallery


def panel(html: str) -> gr.HTML:
    """The place where one model's answer or preference is shown."""
    return gr.HTML(html, min_height=132, padding=False, elem_classes="answers")


def uploaded_path(payload) -> str | None:
    """Takes the place of gr.Image.preprocess, which opens, turns and may convert the file: `read_image` does that."""
    return None if payload is None else payload.path


def checked(path: str | None, question: str) -> tuple[bytes, str]:
    """The image's bytes and the question, or a ValueError that says what is missing."""
    if path is None:
        raise ValueError("Upload an image, or pick an example, first.")
    question = question.strip()
    if not question or len(question) > MAX_QUESTION:
        raise ValueError(f"Write a question of up to {MAX_QUESTION} characters.")
    return read_image(path), question


@contextmanager
def messages() -> Iterator[None]:
    """Errors the user can fix become a message on the page; all others stay errors, printed with their traceback."""
    try:
        yield
    except (ValueError, ImageError) as error:
        gr.Warning(escape(str(error)), duration=8, title="Not possible")


def check_upload(path: str) -> str | None:
    """Removes a file that is not an image, or too large an image, from the page and says why."""
    with messages():
        read_image(path)
        return gr.skip()
    return None


def read_examples(path: Path, count: int, folder: Path) -> list[dict]:
    """One pair per image for the first `count` images of a parquet in RLAIF-V's schema; writes the images to `folder`.

    Where an image has several pairs, image i shows its pair i (cyclic), so that all kinds of questions occur.
    """
    pairs: dict[str, list[dict]] = {}
    for batch in pq.ParquetFile(path).iter_batches(64, columns=["image", "question", "chosen", "rejected"]):
        for row in batch.to_pylist():
            image = row["image"]
            key = content_hash(image["bytes"])
            if key not in pairs and len(pairs) == count:
                return [rows[i % len(rows)] for i, rows in enumerate(pairs.values())]
            target = folder / (key + (Path(image["path"] or "").suffix or ".png"))
            target.write_bytes(image["bytes"])
            pairs.setdefault(key, []).append({**row, "image": str(target)})
    return [rows[i % len(rows)] for i, rows in enumerate(pairs.values())]
