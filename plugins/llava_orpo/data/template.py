"""LLaMA-Factory templates that give exactly the checkpoint's own prompt (see `conversation`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llamafactory.data.data_utils import Role
from llamafactory.data.template import Template

from .conversation import CONVERSATIONS, Conversation, expand_image_token


@dataclass
class ExactTemplate(Template):
    """A template whose ids are those of the whole rendered conversation, never of pieces put together.

    Used by chat, webchat, api and export; pairwise training goes through `pairs.PairProcessor`, which calls the same
    conversation in batches.
    """

    conversation: Conversation | None = None

    def _encode(self, tokenizer, messages, system, tools):
        """Ids of each message (LLaMA-Factory 0.9.5: Template._encode): user, assistant, user, assistant, …"""
        if tools:
            raise ValueError(f"template {self.conversation.name} has no tool calls.")
        roles = [Role.USER.value, Role.ASSISTANT.value]
        if any(str(getattr(m["role"], "value", m["role"])) != roles[i % 2] for i, m in enumerate(messages)):
            raise ValueError("Messages must alternate: user, assistant, user, … Tool turns are not supported.")

        tokens = [n for m in messages for n in m.get("image_tokens", [])]
        turns = [(m["content"], a["content"]) for m, a in zip(messages[0::2], messages[1::2], strict=False)]
        encoded = self.conversation.encode_turns(
            tokenizer, turns, has_image=bool(tokens), system=(system or self.default_system) or None
        )
        image_id = tokenizer.convert_tokens_to_ids(self.mm_plugin.image_token)
        out = []
        for number, (prompt_ids, response_ids) in enumerate(encoded):
            if number == 0 and tokens:
                prompt_ids = expand_image_token(prompt_ids, image_id, tokens[0])
            out += [prompt_ids, response_ids]
        return out

    def fix_jinja_template(self, tokenizer) -> None:
        """Leaves the checkpoint's own chat template alone (it lives in the processor's files)."""


def exact_templates() -> dict[str, Callable[..., ExactTemplate]]:
    """What `register_template` takes as template_class, by template name: one for each LLaVA-1.6 conversation."""
    return {name: partial(ExactTemplate, conversation=conversation) for name, conversation in CONVERSATIONS.items()}
