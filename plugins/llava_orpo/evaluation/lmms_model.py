"""A loaded recipe as a model of lmms-eval: exact training prompts, batches, adapters and quantized models.

lmms-eval 0.7.3's own llava_hf offers none of these: it has neither adapters nor batches, falls back to Vicuna's prompt
when the tokenizer has no chat template of its own (llava-hf keeps it with the processor), and turns an error during
generation into an empty answer.
"""

from __future__ import annotations

import hashlib
import itertools
import json

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..data.anyres import processor_geometry
from ..data.conversation import expand_image_token
from ..errors import UserError
from ..step.attention import unwrap
from .generation import answer_batch, batch_inputs
from .sampling import SeededSampling
from .session import Session


class SessionModel(lmms):
    """lmms-eval's simple interface (text and one image) on a `Session`.

    Like those of lmms-eval's llava_hf, answers are not cut at the task's `until` strings; they end at the end token or
    max_new_tokens. Tasks with do_sample draw per question (see `SeededSampling`).
    """

    is_simple = True

    def __init__(self, session: Session):
        super().__init__()
        self.session = session
        self.batch_size = int(session.recipe.get("per_device_eval_batch_size", 8))
        self.device = session.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """One answer per request, in their order. Raises UserError for a question with several images."""
        settings = [json.dumps(_settings(request.args[1]), sort_keys=True) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(requests[i].args[0])))
        answers: list[str] = [""] * len(requests)
        with tqdm(total=len(requests), unit="question") as bar:
            for same, group in itertools.groupby(order, key=lambda i: settings[i]):
                while batch := list(itertools.islice(group, self.batch_size)):
                    texts = self._answer([requests[i] for i in batch], json.loads(same))
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                    bar.update(len(batch))
        return answers

    @torch.no_grad()
    def _answer(self, requests: list[Instance], settings: dict) -> list[str]:
        session = self.session
        image_token = unwrap(session.model).config.image_token_id
        geometry = processor_geometry(session.processor)
        sequences, pictures, seeds = [], [], []
        for request in requests:
            question, _, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            if len(visuals) > 1:
                raise UserError(f"{task}, document {doc_id}: {len(visuals)} images; LLaVA-1.6 was trained with one.")
            ids = session.template.conversation.encode_prompt(session.tokenizer, question, bool(visuals))
            for picture in visuals:
                picture = picture.convert("RGB")
                ids = expand_image_token(ids, image_token, geometry.num_image_tokens(*picture.size))
                pictures.append(picture)
            sequences.append(ids)
            seeds.append(int.from_bytes(hashlib.blake2b(f"{task}/{doc_id}".encode(), digest_size=7).digest(), "big"))
        processors = []
        if settings["temperature"]:
            processors = [SeededSampling(seeds, settings["temperature"], settings["top_p"])]
        return answer_batch(session, batch_inputs(session, sequences, pictures), settings["max_new_tokens"], processors)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Only tasks with output_type generate_until run here.")

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("Only tasks with one question and one answer run here.")


def _settings(given: dict) -> dict:
    """What a task's generation_kwargs ask for. Raises UserError for beam search, which answer_batch lacks."""
    if given.get("num_beams", 1) not in (None, 1):
        raise UserError(f"num_beams={given['num_beams']}: only greedy decoding and sampling are done here.")
    sampled = given.get("do_sample", True) and given.get("temperature")
    return {
        "max_new_tokens": int(given.get("max_new_tokens", 1024)),
        "temperature": float(given["temperature"]) if sampled else 0.0,
        "top_p": float(given.get("top_p") or 1.0),
    }
