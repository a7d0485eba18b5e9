"""This project's ids, token counts and prompts against what others recorded of the real checkpoints, without weights.

The pieces are the real ones (Mistral v1), the tokenizer is built as this project builds it, the random model's folder
has the published image settings. Sources: published_records.py.
"""

from __future__ import annotations

import pytest
import sentencepiece
from PIL import Image
from transformers import AutoProcessor

from helpers import published_records as records
from helpers.recipes import random_model
from helpers.tokenizers import SENTENCEPIECE, mistral_v1
from llava_orpo.data.anyres import AnyresGeometry
from llava_orpo.data.conversation import CONVERSATIONS, expand_image_token

MISTRAL = CONVERSATIONS["llava_v16_mistral"]
PUBLISHED = AnyresGeometry(336, 14, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
ARTWORK_IDS = [*records.ARTWORK_BEFORE_IMAGE, *[32000] * records.ARTWORK_NUM_IMAGE_TOKENS, *records.ARTWORK_AFTER_IMAGE]


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(random_model("tiny"))


def asked(processor, question, size):
    """What the processor gives for the chat template's prompt and a blank image of that size."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor(images=Image.new("RGB", size), text=prompt, return_tensors="pt")


def test_the_record_itself_has_29_ids_of_text():
    assert len(ARTWORK_IDS) == records.ARTWORK_NUM_IDS
    assert len(records.ARTWORK_BEFORE_IMAGE) + len(records.ARTWORK_AFTER_IMAGE) == 29


def test_artwork_prompt_has_the_recorded_ids():
    """Recorded: 2,369 ids, 2,340 of the image, 28705 before and after it. `legacy: false` would give one less."""
    ids = MISTRAL.encode_prompt(mistral_v1(), records.ARTWORK_QUESTION, has_image=True)
    count = PUBLISHED.num_image_tokens(*records.ARTWORK_SIZE)
    assert count == records.ARTWORK_NUM_IMAGE_TOKENS
    assert expand_image_token(ids, 32000, count) == ARTWORK_IDS
    other = MISTRAL.encode_prompt(mistral_v1("first"), records.ARTWORK_QUESTION, has_image=True)
    assert len(other) == len(ids) - 1 == 29


def test_processor_gives_the_recorded_ids(processor):
    """The same by LlavaNextProcessor, the chat template and the files that scripts/make_random_llava.py writes."""
    inputs = asked(processor, records.ARTWORK_QUESTION, records.ARTWORK_SIZE)
    assert inputs["input_ids"][0].tolist() == ARTWORK_IDS
    assert inputs["image_sizes"].tolist() == [[808, 1100]]
    assert tuple(inputs["pixel_values"].shape) == (1, 5, 3, 336, 336)  # recorded too


def test_recorded_answer_has_the_ids_that_training_would_use():
    """But for the space before </s>, which the checkpoint's chat template does not write (see conversation.py)."""
    for kind in ("published", "remade", "first"):
        [(_, chosen, _)] = MISTRAL.encode_pairs(
            mistral_v1(kind), [records.ARTWORK_QUESTION], [records.ARTWORK_ANSWER], ["Yes"], [True]
        )
        *answer, space, end = records.ARTWORK_ANSWER_IDS
        assert chosen == [*answer, end] and space == 28705
    decoded = mistral_v1().decode(records.ARTWORK_ANSWER_IDS, skip_special_tokens=True)
    assert decoded == records.ARTWORK_ANSWER + " "


@pytest.mark.parametrize("name", records.RADAR)
def test_radar_prompt_is_the_conversion_script_s(name):
    record = records.RADAR[name]
    conversation = CONVERSATIONS[record.conversation]
    assert name in conversation.checkpoints
    assert conversation.render_prompt(records.RADAR_QUESTION, True, record.system) == record.prompt


def test_radar_prompt_has_llava_s_own_ids(processor):
    """The script compares with LLaVA's ids, which are SentencePiece's of what stands before and after the image. The
    text that it expects shows the same: two spaces, the text's own and the mark after <image>."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))
    record = records.RADAR["llava-hf/llava-v1.6-mistral-7b-hf"]
    before, after = record.prompt.split("<image>")
    golden = [1, *pieces.encode(before), 32000, *pieces.encode(after)]
    assert MISTRAL.encode_prompt(mistral_v1(), records.RADAR_QUESTION, True) == golden
    inputs = asked(processor, records.RADAR_QUESTION, records.RADAR_SIZE)
    count = PUBLISHED.num_image_tokens(*records.RADAR_SIZE)
    assert inputs["input_ids"][0].tolist() == expand_image_token(golden, 32000, count)
    assert inputs["image_sizes"].tolist() == [[899, 1024]]
    decoded = processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert record.text.startswith(decoded.strip() + " The image")
