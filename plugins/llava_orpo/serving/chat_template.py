"""The chat template that a server needs so that tokenizing what it renders gives the checkpoint's own prompt ids.

LLaVA-1.6's templates hold no BOS: transformers' processor lets the tokenizer add it. Servers that tokenize a rendered
template without special tokens (vLLM since its PR 4688) then leave it out. What has to stand in front depends on the
tokenizer: one with `legacy: true` starts a text behind `<s>` as it starts a string, one with `legacy: false` needs a
blank there. So both are tried, and the ids decide.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError

BOS, BOS_AND_BLANK = "{{- bos_token -}}", "{{- bos_token + ' ' -}}"
FRONTS = ("", BOS, BOS_AND_BLANK)
FRONT_WORDS = {
    "": "as it is",
    BOS: "with the BOS token in front",
    BOS_AND_BLANK: "with the BOS token and a blank in front",
}
QUESTION, ANSWER = "What is in the picture? Say it in one word.", "A cat."


def _user(text: str, image: bool = False) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


# (messages, add_generation_prompt): a question with an image and without, a system message, two turns, a whole answer.
PROBES = (
    ([_user(QUESTION, image=True)], True),
    ([_user(QUESTION)], True),
    ([_user("\n  two blanks and a newline before")], True),
    ([_system("Be brief."), _user(QUESTION, image=True)], True),
    ([_user(QUESTION, image=True), _assistant(ANSWER), _user("Which colour?")], True),
    ([_user(QUESTION, image=True), _assistant(ANSWER)], False),
)


def served_template(folder: str | Path) -> tuple[str, str]:
    """(template, front): the template to serve a folder with, and what was put in front of the folder's own.

    Its rendered text, tokenized without special tokens, has for every one of `PROBES` the ids that the folder's
    processor gives. Raises UserError if the folder has no chat template, or if none of `FRONTS` does this.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    tokenizer, own = processor.tokenizer, processor.chat_template
    if not own:
        raise UserError(f"{folder} has no chat template (chat_template.jinja); get the base model's whole folder.")

    def render(template: str, messages: list, opened: bool) -> str:
        variables = tokenizer.special_tokens_map
        return processor.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=opened, tokenize=False, **variables
        )

    def as_the_processor_does(text: str) -> list[int]:
        """But for the image, whose placeholder is one token here: no second BOS before a template's own."""
        return tokenizer(text, add_special_tokens=not text.startswith(tokenizer.bos_token or "\0")).input_ids

    wanted = [as_the_processor_does(render(own, *probe)) for probe in PROBES]
    wrong = ""
    for front in FRONTS:
        found = [tokenizer(render(front + own, *probe), add_special_tokens=False).input_ids for probe in PROBES]
        if found == wanted:
            return front + own, front
        wrong = next(
            f"{got[:4]} … instead of {want[:4]} …" for got, want in zip(found, wanted, strict=True) if got != want
        )
    raise UserError(
        f"{folder}: no chat template gives a server the processor's own prompt ids, neither the folder's nor one with "
        f"the BOS token in front (the last one tried gives {wrong}); its tokenizer does not fit its template."
    )
