"""The blind side-by-side page on which people vote, and the report of their votes."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import write_json
from .answer_pairs import AnswerPair, tally_text
from .votes import VoteStore, flipped, summarize


def next_unvoted(pairs: Sequence[AnswerPair], voted: dict[str, str], start: int = 0) -> int:
    """The index of the first pair from `start` on without a vote; len(pairs) when all have one."""
    return next((i for i in range(start, len(pairs)) if pairs[i].key not in voted), len(pairs))


def view(pairs: Sequence[AnswerPair], store: VoteStore, seed: int, rater: str, index: int) -> dict[str, Any]:
    """What this rater is shown of pairs[index]: progress, image, question, left, right, but no model's name."""
    voted = len(store.outcomes(rater, pairs))
    progress = f"{rater}: {voted} of {len(pairs)} voted"
    if index >= len(pairs):
        return {
            "progress": progress + ". All done, thank you.",
            "image": None,
            "question": "",
            "left": "",
            "right": "",
        }
    pair = pairs[index]
    left, right = (pair.b, pair.a) if flipped(seed, rater, pair) else (pair.a, pair.b)
    image = str(pair.image) if pair.image else None
    return {"progress": progress, "image": image, "question": pair.question, "left": left, "right": right}


class Booth:
    """What the page's buttons do. A handler gets the rater's name and the index of the pair of its browser session."""

    def __init__(self, pairs: Sequence[AnswerPair], store: VoteStore, seed: int):
        self.pairs, self.store, self.seed = pairs, store, seed

    def show(self, rater: str, index: int) -> list:
        """Everything on the page for one pair, in the order of `make_page`'s `shown`."""
        import gradio as gr

        seen = view(self.pairs, self.store, self.seed, rater, index)
        open_ = index < len(self.pairs)
        return [
            rater,
            index,
            seen["progress"],
            gr.update(value=seen["image"], visible=seen["image"] is not None),
            seen["question"],
            seen["left"],
            seen["right"],
            *[gr.update(interactive=open_)] * 3,
            gr.update(interactive=index > 0),
            gr.update(visible=False),
            gr.update(visible=True),
        ]

    def start(self, name: str) -> list:
        """The first pair without this rater's vote."""
        import gradio as gr

        try:
            voted = self.store.outcomes(name.strip(), self.pairs)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return self.show(name.strip(), next_unvoted(self.pairs, voted))

    def vote(self, choice: str, rater: str, index: int) -> list:
        """Keeps a vote and shows the next pair without one."""
        if index < len(self.pairs):  # a second click can arrive after the last pair
            self.store.add(rater, self.pairs[index], choice, flipped(self.seed, rater, self.pairs[index]))
        return self.show(rater, next_unvoted(self.pairs, self.store.outcomes(rater, self.pairs), index + 1))

    def back(self, rater: str, index: int) -> list:
        """The pair before."""
        return self.show(rater, max(index - 1, 0))


def make_page(pairs: Sequence[AnswerPair], store: VoteStore, seed: int):
    """The Gradio Blocks. The server keeps the rater's name and the index of the pair per browser session."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    booth = Booth(pairs, store, seed)
    # System fonts: the default theme would load fonts from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with gr.Blocks(title="Which answer is better?", theme=theme, analytics_enabled=False) as page:
        rater, index = gr.State(""), gr.State(0)
        with gr.Column(visible=True) as entrance:
            gr.Markdown(
                "## Which answer is better?\nYou will see an image, a question and two answers. Vote for the answer "
                "that is true of the image; if both are equally true, for the more helpful one."
            )
            name = gr.Textbox(label="Your name or initials (letters and digits)", elem_id="name")
            begin = gr.Button("Start", variant="primary", elem_id="start")
        with gr.Column(visible=False) as room:
            progress = gr.Markdown(elem_id="progress")
            image = gr.Image(type="filepath", interactive=False, show_label=False, height=420, elem_id="image")
            question = gr.Textbox(label="Question", interactive=False, lines=2, elem_id="question")
            with gr.Row():
                left = gr.Textbox(label="Left answer", interactive=False, lines=8, elem_id="left")
                right = gr.Textbox(label="Right answer", interactive=False, lines=8, elem_id="right")
            with gr.Row():
                buttons = [
                    gr.Button(text, variant="primary" if choice != "tie" else "secondary", elem_id=f"vote-{choice}")
                    for choice, text in (
                        ("left", "Left is better"),
                        ("tie", "No difference"),
                        ("right", "Right is better"),
                    )
                ]
            previous = gr.Button("Back to the pair before", size="sm", elem_id="back")
        shown = [rater, index, progress, image, question, left, right, *buttons, previous, entrance, room]
        begin.click(booth.start, name, shown, api_name="start")
        name.submit(booth.start, name, shown, api_name=False)
        for button, choice in zip(buttons, ("left", "tie", "right"), strict=True):
            button.click(functools.partial(booth.vote, choice), [rater, index], shown, api_name=f"vote_{choice}")
        previous.click(booth.back, [rater, index], shown, api_name="back")
    return page


def report(a: str, b: str, pairs: Sequence[AnswerPair], store: VoteStore, judge: Path | None) -> dict[str, Any]:
    """Prints and writes (report.json beside the votes) win rates and agreement."""
    people = store.raters()
    votes = {rater: store.outcomes(rater, pairs) for rater in people}
    people = [rater for rater in people if votes[rater]]
    votes = {rater: votes[rater] for rater in people}
    if not people:
        raise UserError(f"{store.folder} has no votes on these answers. Open the page first (without report=true).")
    if judge:
        outcomes = json.loads(judge.read_text(encoding="utf-8"))["outcomes"]
        keys = {pair.key for pair in pairs}
        votes["(judge)"] = {line["key"]: line["outcome"] for line in outcomes if line["key"] in keys}
        if not votes["(judge)"]:
            raise UserError(f"{judge} judges other answers, or has a and b the other way round.")
    summary = summarize(pairs, votes, people)
    summary.update(a=a, b=b)
    write_json(store.folder / "report.json", summary)
    print(f"majority of {len(people)} rater{'s' * (len(people) > 1)}: {tally_text(a, b, summary['majority'])}")
    for rater, counts in summary["raters"].items():
        print(f"{rater}: {tally_text(a, b, counts)}")
    for line in summary["agreement"]:
        kappa = "undefined" if line["kappa"] is None else f"{line['kappa']:.3f}"
        print(
            f"{' and '.join(line['raters'])}: agree on {line['agreement']:.1%} "
            f"[{line['agreement_low']:.1%}, {line['agreement_high']:.1%}] of {line['n']} pairs, kappa {kappa}"
        )
    print(f"  {store.folder / 'report.json'}")
    return summary
