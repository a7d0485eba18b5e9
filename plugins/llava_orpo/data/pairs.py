"""Rows to tokenized pairs: the prompt once, two responses, the image as one placeholder and a count.

Takes the place of LLaMA-Factory's PairwiseDatasetProcessor (0.9.5: data/processor/pairwise.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.extras.constants import IGNORE_INDEX

from .anyres import processor_geometry
from .conversation import full_prompt_ids
from .image_store import image_size
from .images import ImageError
from .mm_plugin import without_placeholder

IDENTITY = ("pair_id", "row", "dataset", "source", "question_type", "image_hash")
OTHER_FORMATS = {
    "pair_id": "",
    "row": -1,  # not known
    "dataset": "",
    "source": "unknown",
    "question_type": "unknown",
    "image_hash": "",
}


@dataclass
class PairProcessor(PairwiseDatasetProcessor):
    """Tokenizes pairs for the shared-prefix collator, or for the stock one (`shared_prefix: false`).

    Output columns: question (the user's words), prompt_ids (one image placeholder; a pair's context ends them),
    chosen_ids, rejected_ids (response tokens with the end token), num_image_tokens, image (reference or None) with its
    width and height, the fields of `IDENTITY` (blank for other LLaMA-Factory formats), and skip (a reason; empty for a
    good pair). The caller drops and lists the rows with a reason. With `shared_prefix: false` also the stock columns:
    {chosen,rejected}_{input_ids,attention_mask,labels}, images, videos, audios.
    """

    shared_prefix: bool = True

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        n = len(examples["_prompt"])
        identities = [_identity(examples, i) for i in range(n)]
        questions = [messages[-1]["content"] for messages in examples["_prompt"]]
        answers = [[response["content"] for response in pair] for pair in examples["_response"]]
        refs = [images[0] if images else None for images in examples["_images"]]
        for i in range(n):  # other LLaMA-Factory formats mark the image's place in the text; ours never does
            if identities[i] is None and refs[i] is not None:
                questions[i] = without_placeholder(questions[i])
        usable = [len(examples["_prompt"][i]) == 1 and len(answers[i]) == 2 for i in range(n)]

        encoded = self.template.conversation.encode_pairs(
            self.tokenizer,
            questions,
            [pair[0] if pair else "" for pair in answers],
            [pair[1] if len(pair) > 1 else "" for pair in answers],
            [ref is not None for ref in refs],
            [(identity or {}).get("context") or "" for identity in identities],
        )
        out: dict[str, list[Any]] = {key: [] for key in self._columns()}
        for i, (prompt_ids, chosen_ids, rejected_ids) in enumerate(encoded):
            size, count, reason = self._image_tokens(refs[i], identities[i])
            prompt_len = len(prompt_ids) + max(count - 1, 0)
            limit = self.data_args.cutoff_len - prompt_len
            if not usable[i]:
                reason = "not one question with two answers (multi-turn pairs are not supported)"
            elif len(examples["_images"][i] or ()) > 1:
                reason = f"{len(examples['_images'][i])} images: LLaVA-1.6 was trained with one image per conversation"
            elif limit < 1:
                reason = f"the prompt alone has {prompt_len} tokens, cutoff_len is {self.data_args.cutoff_len}"
            identity = identities[i] or OTHER_FORMATS
            row = dict(
                {key: identity[key] for key in IDENTITY},
                width=size[0],
                height=size[1],
                question=questions[i],
                prompt_ids=prompt_ids,
                chosen_ids=chosen_ids[: max(limit, 1)],
                rejected_ids=rejected_ids[: max(limit, 1)],
                num_image_tokens=count,
                image=refs[i],
                skip=reason,
            )
            if not self.shared_prefix:
                row.update(self._two_sequences(row))
            for key in out:
                out[key].append(row[key])
        return out

    def _image_tokens(self, ref: Any, identity: dict[str, Any] | None) -> tuple[tuple[int, int], int, str]:
        """((width, height), number of image tokens, why the image cannot be used) of a row's image."""
        if ref is None:
            return (0, 0), 0, ""
        try:
            size = (identity["width"], identity["height"]) if identity else image_size(ref)
        except (ImageError, OSError) as err:
            return (0, 0), 1, f"bad image: {err}"
        return size, processor_geometry(self.processor).num_image_tokens(*size), ""

    def _columns(self) -> list[str]:
        columns = [
            "question",
            "prompt_ids",
            "chosen_ids",
            "rejected_ids",
            "num_image_tokens",
            "image",
            "width",
            "height",
        ]
        columns += ["skip", *IDENTITY]
        if not self.shared_prefix:
            columns += [f"{side}_{key}" for side in ("chosen", "rejected") for key in _LLAMAFACTORY_KEYS]
            columns += ["images", "videos", "audios"]
        return columns

    def _two_sequences(self, row: dict[str, Any]) -> dict[str, Any]:
        """The stock columns: prompt + chosen and prompt + rejected, image tokens written out."""
        prompt = full_prompt_ids(row, self.tokenizer.convert_tokens_to_ids(self.template.mm_plugin.image_token))
        out = {"images": [row["image"]] if row["image"] else [], "videos": [], "audios": []}
        for side in ("chosen", "rejected"):
            response = row[f"{side}_ids"]
            out[f"{side}_input_ids"] = prompt + response
            out[f"{side}_attention_mask"] = [1] * (len(prompt) + len(response))
            out[f"{side}_labels"] = [IGNORE_INDEX] * len(prompt) + response
        return out

    def print_data_example(self, example: dict[str, Any]) -> None:
        print(f"pair_id: {example['pair_id']}  image tokens: {example['num_image_tokens']}")
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            print(f"{key}: {example[key]}")
            print(repr(self.tokenizer.decode(example[key], skip_special_tokens=False)))


_LLAMAFACTORY_KEYS = ("input_ids", "attention_mask", "labels")


def _identity(examples: dict[str, list[Any]], i: int) -> dict[str, Any] | None:
    """Row i's `_identity` (see `rlaif_v.RlaifVConverter`); None for a pair of another LLaMA-Factory format."""
    identity = examples["_identity"][i] if "_identity" in examples else None
    return None if identity is None or identity["pair_id"] is None else identity
