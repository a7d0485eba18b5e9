"""Exact prompt and response text, and token ids, of each LLaVA-1.6 checkpoint.

The text is what the checkpoint's own chat template renders; the ids are what its tokenizer gives for that text. Two
things need care:

- A literal "<image>" or "</s>" in a question or an answer must stay text. So the ids come from a copy of the tokenizer
  in which every special token has a private random name; only the format itself, never a text, uses those names.
- The prompt must end where the response begins. Prompt and responses are tokenized apart, hence the prompt once per
  pair, only where this provably gives the ids of the whole strings (`PrivateTokenizer.joined_to_the_end`). Elsewhere
  whole strings are tokenized and then cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .private_tokenizer import private_tokenizer


@dataclass(frozen=True)
class Conversation:
    """One checkpoint family's chat format: the texts (before, after) around each kind of message."""

    name: str
    checkpoints: tuple[str, ...]
    source: str  # where the format was taken from
    special_tokens: tuple[str, ...]  # tokens the format needs; the tokenizer must have them as added tokens
    system: tuple[str, str]  # a system message; no LLaVA-1.6 chat template has a default one
    user: tuple[str, str]
    answered: tuple[str, str]  # an earlier answer, with another user turn to follow
    generation: str  # opens the answer to come and ends the prompt
    response: tuple[str, str]  # the answer itself; the loss covers all of it, end token included
    image: str = "<image>\n"  # opens the first user turn

    def render_prompt(
        self,
        question: str,
        has_image: bool,
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> str:
        """The text before the answer, without BOS (the tokenizer adds it).

        Args:
            question: the last user turn.
            has_image: put the image placeholder before the first user turn, as the chat templates do.
            system: a system message, None for none.
            history: earlier (question, answer) turns.
        """
        text = "" if system is None else self.system[0] + system + self.system[1]
        image = self.image if has_image else ""
        for asked, answer in history:
            text += self.user[0] + image + asked + self.user[1] + self.answered[0] + answer + self.answered[1]
            image = ""
        return text + self.user[0] + image + question + self.user[1] + self.generation

    def render_response(self, answer: str) -> str:
        """The answer as it follows the prompt, end token included: the text the loss is taken on."""
        return self.response[0] + answer + self.response[1]

    def encode_prompt(
        self,
        tokenizer,
        question: str,
        has_image: bool,
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
    ) -> list[int]:
        """Token ids of `render_prompt`: BOS as the tokenizer adds it, the image as exactly one placeholder id.

        Equals tokenizer(render_prompt(...)).input_ids, except that special-token literals in the texts stay text.

        Raises:
            ValueError: as `encode_pairs`.
        """
        private = private_tokenizer(self, tokenizer, len(tokenizer))
        return private.whole.encode(private.conversation.render_prompt(question, has_image, system, history)).ids

    def encode_pairs(
        self,
        tokenizer,
        questions: Sequence[str],
        chosen: Sequence[str],
        rejected: Sequence[str],
        has_image: Sequence[bool],
        contexts: Sequence[str] | None = None,
    ) -> list[tuple[list[int], list[int], list[int]]]:
        """Token ids of preference pairs, as a list of (prompt_ids, chosen_ids, rejected_ids).

        prompt_ids + chosen_ids equals tokenizer(prompt + response text).input_ids, and likewise for rejected_ids,
        except that special-token literals in the texts stay text. prompt_ids has the image as exactly one placeholder
        id (see `expand_image_token`) and equals `encode_prompt`, unless the tokenizer has a piece that joins the end
        of the prompt with the start of an answer (possible in chatml, when an answer opens with a newline): such a
        piece, and whatever differs before it because of it, then belongs to the responses.

        A context is the beginning of an answer that comes before both responses. It ends prompt_ids, under the same
        rule: the joined ids are those of the whole text, in which one space parts context and response unless there is
        whitespace between them.

        Args:
            tokenizer: a fast transformers tokenizer with a BPE model.
            questions, chosen, rejected, has_image, contexts: one entry per pair; a context may be "".
        Raises:
            ValueError: lengths differ, or the tokenizer does not fit the format.
        """
        private = private_tokenizer(self, tokenizer, len(tokenizer))
        contexts = [""] * len(questions) if contexts is None else contexts
        rows = [
            (
                private.conversation.render_prompt(question, image),
                *(private.conversation.render_response(with_context(context, answer)) for answer in answers),
            )
            for question, image, context, *answers in zip(questions, has_image, contexts, chosen, rejected, strict=True)
        ]
        apart = [
            not context and private.begins_apart(good) and private.begins_apart(bad)
            for context, (_, good, bad) in zip(contexts, rows, strict=True)
        ]
        out: list = [None] * len(rows)

        once = [i for i, alone in enumerate(apart) if alone]
        prompts = private.whole.encode_batch([rows[i][0] for i in once])
        responses = private.response.encode_batch(
            [text for i in once for text in rows[i][1:]], add_special_tokens=False
        )
        for i, prompt, good, bad in zip(once, prompts, responses[0::2], responses[1::2], strict=True):
            out[i] = (prompt.ids, good.ids, bad.ids)

        twice = [i for i, alone in enumerate(apart) if not alone]
        encoded = private.whole.encode_batch([rows[i][0] + text for i in twice for text in rows[i][1:]])
        for i, good, bad in zip(twice, encoded[0::2], encoded[1::2], strict=True):
            begun = len(private.conversation.response[0] + contexts[i]) if contexts[i] else 0
            out[i] = _cut(len(rows[i][0]) + begun, good, bad)
        return out

    def encode_turns(
        self, tokenizer, turns: Sequence[tuple[str, str]], has_image: bool, system: str | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of a whole conversation as one (prompt_ids, response_ids) per (question, answer) turn.

        All of them joined equal the ids of the rendered conversation; a turn's prompt_ids starts where the answer
        before it ended. The image is one placeholder in the first prompt. Special-token literals stay text.

        Raises:
            ValueError: as `encode_pairs`, or there is no turn.
        """
        if not turns:
            raise ValueError("a conversation needs at least one turn")
        private = private_tokenizer(self, tokenizer, len(tokenizer))
        marked = private.conversation
        bounds = []  # characters: where each answer starts, where the next prompt starts
        for number, (question, answer) in enumerate(turns):
            start = len(marked.render_prompt(question, has_image, system, turns[:number]))
            bounds.append((start, start + len(marked.response[0] + answer)))
        history, (question, answer) = turns[:-1], turns[-1]
        text = marked.render_prompt(question, has_image, system, history) + marked.render_response(answer)
        encoding = private.whole.encode(text)
        out, position = [], 0
        for number, (start, end) in enumerate(bounds):
            cut = _tokens_before(encoding, start)
            last = number == len(bounds) - 1
            stop = len(encoding.ids) if last else _tokens_before(encoding, end)
            if not last and text.startswith(marked.response[1], end):  # the end token belongs to the answer
                stop += 1
            out.append((encoding.ids[position:cut], encoding.ids[cut:stop]))
            position = stop
        return out


def with_context(context: str, response: str) -> str:
    """The whole answer that a context begins and a response ends, with a space between two words."""
    parted = not context or context[-1].isspace() or response[:1].isspace()
    return context + ("" if parted else " ") + response


def expand_image_token(prompt_ids: Sequence[int], image_token_id: int, n: int) -> list[int]:
    """prompt_ids with its one image placeholder repeated n times (AnyresGeometry.num_image_tokens).

    Raises:
        ValueError: prompt_ids does not hold exactly one placeholder.
    """
    ids = list(prompt_ids)
    if ids.count(image_token_id) != 1:
        raise ValueError(f"expected one image placeholder, id {image_token_id}; found {ids.count(image_token_id)}")
    at = ids.index(image_token_id)
    return ids[:at] + [image_token_id] * n + ids[at + 1 :]


def _cut(end: int, chosen, rejected) -> tuple[list[int], list[int], list[int]]:
    """Cuts two encodings of the same prompt where the prompt ends, at character `end`."""
    a, b = chosen.ids, rejected.ids
    n = min(_tokens_before(chosen, end), _tokens_before(rejected, end))
    # A piece across the end of the prompt in one of the two may have changed the pieces before it.
    while a[:n] != b[:n]:
        n -= 1
    return a[:n], a[n:], b[n:]


def _tokens_before(encoding, end: int) -> int:
    """The number of tokens before the one that holds character `end`."""
    token = encoding.char_to_token(end)
    while token is None:  # the tokenizer drops this character; the end token, at the latest, is kept
        end += 1
        token = encoding.char_to_token(end)
    return token


CONVERSATIONS = {
    conversation.name: conversation
    for conversation in (
        Conversation(
            name="llava_v16_mistral",
            checkpoints=("llava-hf/llava-v1.6-mistral-7b-hf",),
            source="chat_template.json of the checkpoint (since its discussion 43, which corrected the end "
            "token to </s>); LLaVA's conv_mistral_instruct, which has one more space before </s>",
            special_tokens=("<image>", "</s>"),
            system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
            user=("[INST] ", " [/INST]"),
            answered=(" ", "</s> "),
            generation="",
            response=(" ", "</s>"),
        ),
        Conversation(
            name="llava_v16_vicuna",
            checkpoints=("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-vicuna-13b-hf"),
            source="chat_template.json of the checkpoints (llava-1.5's). It writes no end token, so the end "
            "of the response is that of LLaVA's conv_vicuna_v1, which also opens with the system message 'A "
            "chat between a curious user and an artificial intelligence assistant. The assistant gives "
            "helpful, detailed, and polite answers to the user's questions.'",
            special_tokens=("<image>", "</s>"),
            system=("", " "),
            user=("USER: ", " "),
            answered=("ASSISTANT: ", " "),
            generation="ASSISTANT:",
            response=(" ", "</s>"),
        ),
        Conversation(
            name="llava_v16_34b",
            checkpoints=("llava-hf/llava-v1.6-34b-hf",),
            source="chat_template.json of the checkpoint; LLaVA's conv_chatml_direct has no newline "
            "after <|im_end|> and opens with the system message 'Answer the questions.'",
            special_tokens=("<image>", "<|im_start|>", "<|im_end|>"),
            system=("<|im_start|>system\n", "<|im_end|>\n"),
            user=("<|im_start|>user\n", "<|im_end|>\n"),
            answered=("<|im_start|>assistant\n", "<|im_end|>\n"),
            generation="<|im_start|>assistant\n",
            response=("", "<|im_end|>"),
        ),
    )
}


def full_prompt_ids(row: dict[str, Any], image_token_id: int) -> list[int]:
    """prompt_ids with the image placeholder repeated for every image token."""
    if row["image"] is None:
        return list(row["prompt_ids"])
    return expand_image_token(row["prompt_ids"], image_token_id, row["num_image_tokens"])
