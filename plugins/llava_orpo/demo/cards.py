"""HTML of the demo's answers and scores. Every text from a user, a dataset or a model is escaped."""

from __future__ import annotations

import difflib
import math
import re
from html import escape

from .models import Comparison, ScoredAnswer

FULL_COLOUR = 6.0  # nats: a token with a probability of 0.25 % or less is fully coloured


def header(base: str, aligned: str) -> str:
    """The page's title and the two models."""
    return (
        '<header class="top"><h1>Before and after alignment</h1>'
        f"<p>The same question to the base model, <b>{escape(base)}</b>, and to the aligned one, "
        f"<b>{escape(aligned)}</b>.</p></header>"
    )


def answer_card(role: str, label: str, text: str, state: str = "done", other: str | None = None) -> str:
    """One model's answer. state: empty, waiting, writing or done. Words that `other` does not have are marked."""
    body = marked(text, other) if other is not None else escape(text)
    if state == "empty":
        body = '<span class="hint">The answer appears here.</span>'
    elif state == "waiting":
        body = '<span class="hint">Waiting for its turn …</span>'
    elif state == "writing":
        body += '<span class="caret"></span>'
    elif not text:
        body = '<span class="hint">The model ended its answer at once.</span>'
    return (
        f'<article class="answer {role.lower()}" data-state="{state}"><h3>{role}<small>{escape(label)}</small></h3>'
        f'<p class="said">{body}</p></article>'
    )


def marked(text: str, other: str) -> str:
    """The escaped text; words that `other` does not have, in order, are in <mark>."""
    words, others = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", other)
    out = []
    for kind, start, end, _, _ in difflib.SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        piece = "".join(words[start:end])
        out.append(escape(piece) if kind == "equal" or not piece.strip() else f"<mark>{escape(piece)}</mark>")
    return "".join(out)


def comparison_card(role: str, label: str, comparison: Comparison | None) -> str:
    """One model's preference between answers A and B, with both texts coloured by log-prob."""
    head = f"<h3>{role}<small>{escape(label)}</small></h3>"
    if comparison is None:
        hint = '<p class="said"><span class="hint">Its preference appears here.</span></p>'
        return f'<article class="answer {role.lower()}" data-state="empty">{head}{hint}</article>'
    margin = comparison.margin
    verdict = "No preference" if margin == 0 else f"Prefers {'A' if margin > 0 else 'B'}"
    return (
        f'<article class="answer {role.lower()}" data-state="done" data-margin="{margin!r}">{head}'
        f'<p class="verdict">{verdict}<span>by {abs(margin):.3f} nats per token</span></p>'
        + scored_text("A", comparison.a, margin > 0)
        + scored_text("B", comparison.b, margin < 0)
        + "</article>"
    )


def scored_text(name: str, answer: ScoredAnswer, preferred: bool) -> str:
    """One answer; the less likely a token is, the stronger its background."""
    worst_text, worst, _ = min(answer.tokens, key=lambda token: token[1])
    tokens = "".join(token_span(*token, last=i == len(answer.tokens) - 1) for i, token in enumerate(answer.tokens))
    return (
        f'<section class="scored{" preferred" if preferred else ""}" data-answer="{name}">'
        f'<h4>{name}<span class="mean" data-mean="{answer.mean!r}">{number(answer.mean)} nats per token</span></h4>'
        f'<p class="tokens">{tokens}</p>'
        f'<p class="least">Least likely: <q>{escape(worst_text.strip())}</q>, {probability(worst)}</p></section>'
    )


def token_span(text: str, logp: float, count: int, last: bool) -> str:
    """One token as a span; its strength, from 0 to 1, is a CSS variable."""
    strength = min(-logp / FULL_COLOUR, 1.0)
    title = f"{number(logp)} nats, {probability(logp)}" + (f", {count} tokens" if count > 1 else "")
    kind = "token end" if last else "token"
    word = text.lstrip()
    space = text[: len(text) - len(word)]  # stays outside: a line may break there
    return f'{space}<span class="{kind}" style="--s:{strength:.3f}" title="{title}">{escape(word)}</span>'


def number(value: float) -> str:
    """The value with three decimals and a real minus sign."""
    return f"{value:.3f}".replace("-", "−")


def probability(logp: float) -> str:
    """A log-prob as a percentage."""
    percent = 100 * math.exp(logp)
    return f"p = {percent:.0f} %" if percent >= 10 else f"p = {percent:.2g} %" if percent >= 0.01 else "p < 0.01 %"


LEGEND = (
    '<p class="legend"><span class="scale"></span>likely to unlikely; hover a word for its log-prob. '
    "A model prefers the answer with the higher mean.</p>"
)
