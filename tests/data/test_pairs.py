"""data/pairs.py: the columns of one batch, against what the processor and the tokenizer themselves write."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from helpers.serving import picture, png
from helpers.tokenizers import mistral_v1
from llava_orpo.data.conversation import CONVERSATIONS
from llava_orpo.data.pairs import PairProcessor

MISTRAL = CONVERSATIONS["llava_v16_mistral"]
SIZE = (90, 60)
PHOTO = png(picture(*SIZE, seed=0))
TEXTS = ("What is this?", "A cat on a mat.", "A dog.")
IDENTITY = {
    "pair_id": "7-e81e785a",
    "row": 7,
    "dataset": "rows",
    "source": "COCO",
    "question_type": "detailed description",
    "image_hash": "d8bb14d833d59559",
    "width": SIZE[0],
    "height": SIZE[1],
}


def llava_processor():
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    return LlavaNextProcessor(image_processor, mistral_v1(), 14, "default", num_additional_image_tokens=1)


def row(texts=TEXTS, image=PHOTO, identity=IDENTITY):
    question, *answers = texts
    return {
        "_prompt": [{"role": "user", "content": question}],
        "_response": [{"role": "assistant", "content": answer} for answer in answers],
        "_images": None if image is None else [image],
        "_identity": identity,
    }


def encoded(*rows, cutoff_len=4096, **options):
    """The rows of the one batch that `rows` make."""
    template = SimpleNamespace(conversation=MISTRAL, mm_plugin=SimpleNamespace(image_token="<image>"))
    data_args = SimpleNamespace(cutoff_len=cutoff_len)
    pairs = PairProcessor(template, mistral_v1(), llava_processor(), data_args, **options)
    out = pairs.preprocess_dataset({key: [row[key] for row in rows] for key in rows[0]})
    assert {len(values) for values in out.values()} == {len(rows)}
    return [{key: values[i] for key, values in out.items()} for i in range(len(rows))]


def ids_of(texts, image):
    """(prompt, prompt + chosen, prompt + rejected) as transformers' processor writes them, image tokens and all."""
    question, *answers = texts
    prompt = MISTRAL.render_prompt(question, image)
    whole = [prompt, *(prompt + MISTRAL.render_response(answer) for answer in answers)]
    pictures = Image.new("RGB", SIZE) if image else None
    return [llava_processor()(images=pictures, text=text).input_ids[0] for text in whole]


@pytest.mark.parametrize("image", [True, False])
def test_the_stock_columns_are_the_processor_s_own_ids(image):
    (made,) = encoded(row(image=PHOTO if image else None), shared_prefix=False)
    prompt, *whole = ids_of(TEXTS, image)
    for side, ids in zip(("chosen", "rejected"), whole, strict=True):
        assert made[f"{side}_input_ids"] == ids
        assert made[f"{side}_attention_mask"] == [1] * len(ids)
        assert made[f"{side}_labels"] == [-100] * len(prompt) + ids[len(prompt) :]
    assert made["images"] == [PHOTO] * image and made["videos"] == made["audios"] == []
    assert made["num_image_tokens"] == ids_of(TEXTS, image)[0].count(32000)


def test_a_pair_s_columns():
    """The size is that of the identity, where there is one: the file is not opened again."""
    pair, text_only = encoded(row(image="not opened.png"), row(image=None))
    prompt, chosen, rejected = ids_of(TEXTS, True)
    n = prompt.count(32000)
    assert pair == {
        **IDENTITY,
        "question": TEXTS[0],
        "prompt_ids": [i for at, i in enumerate(prompt) if i != 32000 or prompt[at - 1] != 32000],
        "chosen_ids": chosen[len(prompt) :],
        "rejected_ids": rejected[len(prompt) :],
        "num_image_tokens": n,
        "image": "not opened.png",
        "skip": "",
    }
    assert text_only["prompt_ids"] == ids_of(TEXTS, False)[0] and text_only["image"] is None
    assert text_only["num_image_tokens"] == text_only["width"] == text_only["height"] == 0 and text_only["skip"] == ""


@pytest.mark.parametrize("identity", [None, dict.fromkeys(IDENTITY)])
def test_a_pair_of_another_format_has_the_size_of_its_file(identity):
    """Joined with an RLAIF-V set its identity is a struct of nothing; alone there is no such column."""
    example = row(identity=identity)
    if identity is None:
        del example["_identity"]
    (made,) = encoded(example)
    assert (made["width"], made["height"]) == SIZE and made["skip"] == ""
    names = [made[key] for key in ("pair_id", "dataset", "source", "question_type", "image_hash")]
    assert names == ["", "", "unknown", "unknown", ""]
    assert made["num_image_tokens"] == ids_of(TEXTS, True)[0].count(32000)


@pytest.mark.parametrize(
    "marked, image, text",
    [
        ("<image>\nWhat does <image> mean?", PHOTO, "What does <image> mean?"),
        ("Look: <image>\nWhat is it?\n<image>\nWhere?", PHOTO, "Look: What is it?\n<image>\nWhere?"),
        ("What is it? <image>", PHOTO, "What is it? "),
        ("What is it?", PHOTO, "What is it?"),
        ("What does <image> mean?", None, "What does <image> mean?"),
    ],
    ids=["before", "inside", "after", "none", "no image"],
)
def test_another_format_s_first_placeholder_is_the_image_s_place(marked, image, text):
    """A second one, and every one of a pair without an image or of an RLAIF-V pair, are the user's own words."""
    other, ours = encoded(row((marked, *TEXTS[1:]), image, None), row((text, *TEXTS[1:]), image))
    assert other["question"] == ours["question"] == text
    assert other["prompt_ids"] == ours["prompt_ids"] and ours["prompt_ids"].count(32000) == (image is not None)


@pytest.mark.parametrize("image", [True, False])
def test_cutoff_len_counts_every_image_token(image):
    prompt = len(ids_of(TEXTS, image)[0])
    whole = encoded(row(image=PHOTO if image else None))[0]
    for room in (1, 2, 100):
        (made,) = encoded(row(image=PHOTO if image else None), cutoff_len=prompt + room)
        assert made["skip"] == "" and made["prompt_ids"] == whole["prompt_ids"]
        assert made["chosen_ids"] == whole["chosen_ids"][:room]
        assert made["rejected_ids"] == whole["rejected_ids"][:room]
    for room in (0, -5):
        (made,) = encoded(row(image=PHOTO if image else None), cutoff_len=prompt + room)
        assert made["skip"] == f"the prompt alone has {prompt} tokens, cutoff_len is {prompt + room}"
        assert made["chosen_ids"] == whole["chosen_ids"][:1]  # a column of lists that are never empty


def test_each_row_is_skipped_for_its_own_reason():
    good, turns, one, none, three, missing = row(), row(), row(TEXTS[:2]), row(TEXTS[:1]), row((*TEXTS, "More.")), row()
    turns["_prompt"] = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A"}, *turns["_prompt"]]
    missing.update(_images=["no such file.png"], _identity=None)
    made = encoded(good, turns, one, none, three, missing, good)
    shape = "not one question with two answers (multi-turn pairs are not supported)"
    assert [pair["skip"] for pair in made[:5]] == ["", shape, shape, shape, shape]
    assert made[5]["skip"].startswith("bad image: ") and "no such file.png" in made[5]["skip"]
    assert (made[5]["width"], made[5]["height"]) == (0, 0)
    assert made[6] == made[0]
    several = {**good, "_images": [PHOTO, PHOTO]}
    assert encoded(several)[0]["skip"] == "2 images: LLaVA-1.6 was trained with one image per conversation"
    assert encoded({**several, "_prompt": turns["_prompt"]})[0]["skip"] == shape
    too_long = encoded(turns, cutoff_len=1)[0]["skip"]
    assert too_long == shape, "no cutoff_len would help this one"


def test_the_example_in_the_log_shows_the_texts(capsys):
    (made,) = encoded(row())
    pairs = PairProcessor(None, mistral_v1(), None, None)
    pairs.print_data_example(made)
    shown = capsys.readouterr().out
    assert IDENTITY["pair_id"] in shown and "[INST]" in shown
    assert "A cat on a mat.</s>" in shown and "A dog.</s>" in shown
