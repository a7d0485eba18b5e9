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
from .mm_plugin import PLACEHOLDER

PAIR_FIELDS = ("pair_id", "dataset", "source", "question_type", "image_hash", "width", "height")


@dataclass
class PairProcessor(PairwiseDatasetProcessor):
    """Tokenizes pairs for the shared-prefix collator, or for LLaMA-Factory's own (`shared_prefix: false`).

    Output columns: prompt_ids (one image placeholder), chosen_ids, rejected_ids (response tokens with the end
    token), num_image_tokens, image (reference or None), the fields of `PAIR_FIELDS`, and skip (a reason, empty
    for a good pair: the caller drops and lists those rows). With `shared_prefix: false` also LLaMA-Factory's
    {chosen,rejected}_{input_ids,attention_mask,labels}, images, videos, audios.
    """

    shared_prefix: bool = True

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        conversation = self.template.conversation
        geometry = processor_geometry(self.processor)
        n = len(examples["_prompt"])
        prompts = [messages[-1]["content"] for messages in examples["_prompt"]]
        answers = [[response["content"] for response in pair] for pair in examples["_response"]]
        refs = [images[0] if images else None for images in examples["_images"]]
        infos = [_pair_info(examples, i) for i in range(n)]
        for i in range(n):  # other LLaMA-Factory formats mark the image's place in the text; ours never do
            if not infos[i]["pair_id"] and refs[i] is not None:
                prompts[i] = prompts[i].replace(PLACEHOLDER + "\n", "", 1).replace(PLACEHOLDER, "", 1)
        usable = [len(examples["_prompt"][i]) == 1 and len(answers[i]) == 2 for i in range(n)]

        encoded = conversation.encode_pairs(
            self.tokenizer,
            prompts,
            [pair[0] if pair else "" for pair in answers],
            [pair[1] if len(pair) > 1 else "" for pair in answers],
            [ref is not None for ref in refs],
        )
        out: dict[str, list[Any]] = {key: [] for key in self._columns()}
        for i, (prompt_ids, chosen_ids, rejected_ids) in enumerate(encoded):
            info = infos[i]
            count = 0
            if refs[i] is not None:
                width, height = (info["width"], info["height"]) if info["width"] else image_size(refs[i])
                count = geometry.num_image_tokens(width, height)
            prompt_len = len(prompt_ids) + max(count - 1, 0)
            limit = self.data_args.cutoff_len - prompt_len
            reason = ""
            if not usable[i]:
                reason = "not one question with two answers (multi-turn pairs are not supported)"
            elif limit < 1:
                reason = f"the prompt alone has {prompt_len} tokens, cutoff_len is {self.data_args.cutoff_len}"
            row = dict(
                info, prompt_ids=prompt_ids, chosen_ids=chosen_ids[: max(limit, 1)],
                rejected_ids=rejected_ids[: max(limit, 1)], num_image_tokens=count, image=refs[i], skip=reason,
            )  # fmt: skip
            if not self.shared_prefix:
                row.update(self._two_sequences(row))
            for key in out:
                out[key].append(row[key])
        return out

    def _columns(self) -> list[str]:
        columns = ["prompt_ids", "chosen_ids", "rejected_ids", "num_image_tokens", "image", "skip", *PAIR_FIELDS]
        if not self.shared_prefix:
            columns += [f"{side}_{key}" for side in ("chosen", "rejected") for key in _LLAMAFACTORY_KEYS]
            columns += ["images", "videos", "audios"]
        return columns

    def _two_sequences(self, row: dict[str, Any]) -> dict[str, Any]:
        """LLaMA-Factory's own columns: prompt + chosen and prompt + rejected, image tokens written out."""
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


def _pair_info(examples: dict[str, list[Any]], i: int) -> dict[str, Any]:
    """Identity of a pair; pairs from other LLaMA-Factory formats get one from their position."""
    pair = examples["_pair"][i] if "_pair" in examples else None
    if pair is not None and pair["pair_id"] is not None:
        return {key: pair[key] for key in PAIR_FIELDS}
    blank = {"pair_id": "", "dataset": "", "source": "unknown", "question_type": "unknown", "image_hash": ""}
    return {**blank, "width": 0, "height": 0}
