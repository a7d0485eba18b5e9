"""A LLaVA-1.6 on OpenVINO GenAI, with the prompt that it was trained on.

GenAI's own chat template starts without BOS, which is part of the prompt, so it is not used: the text is
`Conversation.render_prompt`'s, with GenAI's tag where the image goes (GenAI expands it to the placeholders and the line
end behind them). For every question the ids are compared with `Conversation.encode_prompt`'s, and the number of prompt
tokens that GenAI counted with the expanded prompt's.

Needs openvino-genai, transformers and torchvision (requirements/openvino.txt); importing this module needs none.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import CheckpointError, read_json
from ..data.anyres import processor_geometry
from ..data.conversation import Conversation, expand_image_token
from ..errors import UserError
from .side_by_side import Answer

LANGUAGE_MODEL = "openvino_language_model.xml"
IMAGE_TAG = "<ov_genai_image_0>"
TAGS = ("<ov_genai_image_", "<ov_genai_video_")
# A CPU that has bf16 or int8 units computes in them unless told otherwise, and caches keys and values in 8 bits.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def prompt_text(conversation: Conversation, question: str, has_image: bool) -> str:
    """The text GenAI is given: the conversation's prompt without BOS, with GenAI's image tag and its line end left out.

    Raises UserError if the question holds one of GenAI's own tags, which it would take for an image.
    """
    for tag in TAGS:
        if tag in question:
            raise UserError(f"The question holds {tag}…, which OpenVINO GenAI takes for an image; ask without it.")
    return replace(conversation, image=IMAGE_TAG).render_prompt(question, has_image)


def check_folder(folder: Path) -> None:
    """Raises CheckpointError unless `folder` holds an exported llava_next."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give one that scripts/openvino.sh MODEL OUT has written.")
    kind = read_json(folder / "config.json").get("model_type")
    if not (folder / LANGUAGE_MODEL).is_file():
        raise CheckpointError(f"{folder} holds no {LANGUAGE_MODEL}; export it: bash scripts/openvino.sh {folder} OUT")
    if kind != "llava_next":
        raise CheckpointError(f"{folder} holds a {kind}; only LLaVA-1.6 (llava_next) has its prompt written here.")


class Runner:
    """An exported folder, loaded. threads: 0 lets OpenVINO choose. Raises CheckpointError."""

    def __init__(self, folder: Path, max_new_tokens: int = 256, threads: int = 0):
        check_folder(folder)
        import openvino_genai
        from transformers import AutoProcessor

        from ..export.calibration import checkpoint_conversation

        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder)
        self.conversation = checkpoint_conversation(self.processor, folder)
        self.geometry = processor_geometry(self.processor)
        self.image_token_id = read_json(folder / "config.json")["image_token_index"]
        properties = {**EXACT, **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        self.pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", **properties)
        self.config = self.pipeline.get_generation_config()
        self.config.max_new_tokens, self.config.do_sample, self.config.logprobs = max_new_tokens, False, 1
        self.config.apply_chat_template = False

    def prompt_ids(self, question: str, size: tuple[int, int] | None) -> list[int]:
        """The ids the model reads for a question about an image of `size` (width, height); None: without an image.

        Raises UserError if the exported tokenizer gives other ids, as for a special token's name in a question.
        """
        tokenizer, conversation = self.processor.tokenizer, self.conversation
        ids = conversation.encode_prompt(tokenizer, question, size is not None)
        text = conversation.render_prompt(question, size is not None)
        found = self.pipeline.get_tokenizer().encode(text).input_ids.data[0].tolist()
        if found != ids:
            raise UserError(
                f"OpenVINO's tokenizer reads this question differently ({found[:40]} for {ids[:40]}): does it hold the "
                "name of a special token, such as </s> or <image>? Ask without it."
            )
        return (
            ids if size is None else expand_image_token(ids, self.image_token_id, self.geometry.num_image_tokens(*size))
        )

    def ask(self, question: str, image: Any = None) -> Answer:
        """The greedy answer. image: a PIL picture in mode RGB, or None. Raises UserError as `prompt_ids`."""
        import openvino

        ids = self.prompt_ids(question, image and image.size)
        text = prompt_text(self.conversation, question, image is not None)
        images = [openvino.Tensor(np.asarray(image))] if image is not None else []
        started = time.perf_counter()
        result = self.pipeline.generate(text, images=images, generation_config=self.config)
        seconds = time.perf_counter() - started
        counted = result.perf_metrics.get_num_input_tokens()
        if counted != len(ids):
            raise UserError(f"OpenVINO counted {counted} prompt tokens, the checkpoint's prompt has {len(ids)}.")
        made = result.perf_metrics.get_num_generated_tokens()
        return Answer(result.texts[0].strip(), counted, made, float(result.scores[0]), seconds)
