"""conversation.py against the tokenizer and against the checkpoints' chat templates."""

from __future__ import annotations

import copy
import functools
import json

import jinja2
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from helpers.drawn import examples
from helpers.tokenizers import KINDS, SENTENCEPIECE, chatml, decode_prompt, joining_bpe, mistral_v1
from llava_orpo.data.anyres import AnyresGeometry
from llava_orpo.data.conversation import CONVERSATIONS, expand_image_token
from llava_orpo.data.private_tokenizer import private_tokenizer

MISTRAL = CONVERSATIONS["llava_v16_mistral"]
VICUNA = CONVERSATIONS["llava_v16_vicuna"]
CHATML = CONVERSATIONS["llava_v16_34b"]

# The published templates, as chat_template.json of each checkpoint has them.
IMAGES = "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
TEXTS = "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
TEMPLATES = {
    MISTRAL.name: "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<<SYS>>\n'"
    " + m['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES
    + TEXTS
    + "{{ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}",
    VICUNA.name: "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}"
    "{% endif %}" + IMAGES + TEXTS.replace("c['text']", "c['text'] + ' '") + "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    CHATML.name: "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    + IMAGES
    + TEXTS
    + "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}

# Any text, and texts full of what the formats and the small tokenizer are made of.
PARTS = [
    "\n",
    "\n\n",
    " ",
    "  ",
    "T",
    "th",
    "]",
    "[/INST]",
    ":",
    "</",
    "s>",
    "é",
    "\u3000",
    "▁",
    "🙂",
    "\t",
    "a",
]
TEXT = st.text(max_size=30) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
LITERALS = ["<image>", "</s>", "<s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"]
LITERAL_TEXT = st.lists(st.sampled_from(LITERALS + PARTS), max_size=6).map("".join)


def cases():
    for kind in KINDS:
        yield pytest.param(MISTRAL, functools.partial(mistral_v1, kind), id=f"{MISTRAL.name}-{kind}")
    yield pytest.param(VICUNA, mistral_v1, id=VICUNA.name)
    for kind in ("published", "first"):
        yield pytest.param(CHATML, functools.partial(chatml, kind), id=f"{CHATML.name}-{kind}")
    for conversation in CONVERSATIONS.values():
        yield pytest.param(conversation, joining_bpe, id=f"{conversation.name}-joining")


def has_literal(*texts):
    return any(literal in text for literal in LITERALS for text in texts)


def message(role, text, image=False):
    return {"role": role, "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("history", [[], [("Who?", "A cat."), ("Where?", "On a mat.")]])
@pytest.mark.parametrize("image", [True, False])
def test_prompt_is_what_the_chat_template_renders(name, system, history, image):
    messages = [message("system", system)] if system else []
    for asked, answer in history:
        messages += [message("user", asked, image and asked == "Who?"), message("assistant", answer)]
    messages.append(message("user", "What is this?", image and not history))
    rendered = jinja2.Template(TEMPLATES[name], keep_trailing_newline=True).render(
        messages=messages, add_generation_prompt=True
    )
    assert CONVERSATIONS[name].render_prompt("What is this?", image, system, history) == rendered


@pytest.mark.parametrize("name", [MISTRAL.name, CHATML.name])
def test_response_is_what_the_chat_template_renders_after_the_prompt(name):
    # Vicuna's template writes no end token after an answer; LLaVA's own conversation does.
    conversation = CONVERSATIONS[name]
    turns = [message("user", "What is this?", True), message("assistant", "A cat.")]
    rendered = jinja2.Template(TEMPLATES[name]).render(messages=turns, add_generation_prompt=False)
    text = conversation.render_prompt("What is this?", True) + conversation.render_response("A cat.")
    assert rendered.rstrip() == text


def test_known_ids():
    [(prompt, chosen, rejected)] = MISTRAL.encode_pairs(mistral_v1(), ["What is this?"], ["The cat sat."], [""], [True])
    image = [28705, 32000, 28705]  # a legacy tokenizer's word-start mark is before the newline too
    assert prompt == [1, 733, 16289, 28793, *image, 13, 3195, 349, 456, 28804, 733, 28748, 16289, 28793]
    assert chosen == [415, 5255, 2495, 28723, 2]
    assert rejected == [28705, 2]
    assert prompt == MISTRAL.encode_prompt(mistral_v1(), "What is this?", True)


@pytest.mark.parametrize("conversation, tokenizer", cases())
@examples(80)
@given(question=TEXT, chosen=TEXT, rejected=TEXT, image=st.booleans())
@example("", "", "", True)
@example("What is this?", "\n\nThe", "The", True)
@example("  a\n", "\n", " T", False)
@example(" a", " ", "\n ", True)
@example("\n", "▁", "", True)
def test_ids_equal_the_tokenizer_on_the_whole_string(conversation, tokenizer, question, chosen, rejected, image):
    tokenizer = tokenizer()
    if has_literal(question, chosen, rejected):
        return
    [(prompt, *responses)] = conversation.encode_pairs(tokenizer, [question], [chosen], [rejected], [image])
    text = conversation.render_prompt(question, image)
    for answer, response in zip((chosen, rejected), responses, strict=True):
        assert prompt + response == tokenizer(text + conversation.render_response(answer)).input_ids
        assert len(response) > 0 and response[-1] == tokenizer.convert_tokens_to_ids(conversation.response[1])
    assert prompt.count(tokenizer.image_token_id) == image
    alone = conversation.encode_prompt(tokenizer, question, image)
    assert alone == tokenizer(text).input_ids
    if tokenizer is not joining_bpe():  # no piece of the Mistral vocabulary crosses the end of a prompt
        assert prompt == alone


def test_a_piece_across_the_end_of_the_prompt_goes_to_the_response():
    tokenizer = joining_bpe()
    [(prompt, chosen, rejected)] = CHATML.encode_pairs(tokenizer, ["a"], ["\nthe"], ["the"], [False])
    # "\n\n" takes the newline that "t\n" has in the other row, so even the "t" before it differs.
    assert tokenizer.convert_ids_to_tokens(chosen)[:2] == ["t", "\n\n"]
    assert tokenizer.convert_ids_to_tokens(rejected)[0] == "t\n"
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "n"
    [(prompt, chosen, rejected)] = MISTRAL.encode_pairs(tokenizer, ["a"], ["The"], ["a"], [False])
    assert tokenizer.convert_ids_to_tokens(chosen)[0] == "]▁T" and tokenizer.convert_ids_to_tokens(rejected)[0] == "]▁"
    assert tokenizer.convert_ids_to_tokens(prompt)[-1] == "T"


def begins_apart(conversation, tokenizer, answer):
    private = private_tokenizer(conversation, tokenizer, len(tokenizer))
    return private.begins_apart(private.conversation.render_response(answer))


def test_the_prompt_is_tokenized_once_where_no_piece_can_cross_its_end():
    for conversation in (MISTRAL, VICUNA):  # the published checkpoints' pieces
        for kind in KINDS:
            assert begins_apart(conversation, mistral_v1(kind), "The")
            assert begins_apart(conversation, mistral_v1(kind), "")
        assert not begins_apart(conversation, joining_bpe(), "The")
    assert begins_apart(CHATML, joining_bpe(), "The") and not begins_apart(CHATML, joining_bpe(), "\nThe")
    assert not begins_apart(CHATML, chatml(), "The")  # its newline is a byte: the vocabulary does not tell
    cased = copy.deepcopy(mistral_v1())
    cased.add_tokens(["] T"])  # an ordinary added token may stand across the cut
    assert not begins_apart(MISTRAL, cased, "The")


def changed(tokenizer, change):
    """A copy of a tokenizer with `change` made to the description of its backend (tokenizer.json)."""
    tokenizer = copy.deepcopy(tokenizer)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    return tokenizer


def normalized_by(*steps):
    return lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": list(steps)})


def ended_by(token):
    """A post-processor that writes the token after every text."""
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}]

    def change(spec):
        number = next(added["id"] for added in spec["added_tokens"] if added["content"] == token)
        special = {token: {"id": token, "ids": [number], "tokens": [token]}}
        spec["post_processor"] = {
            "type": "TemplateProcessing",
            "single": sequence,
            "pair": sequence + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": special,
        }

    return change


def unknown_token_with(flag):
    return lambda spec: [added.update({flag: True}) for added in spec["added_tokens"] if added["content"] == "<unk>"]


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BEYOND = {
    "lower case": normalized_by(SPACES, {"type": "Lowercase"}),
    "one normalizer, no list": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "other characters replaced": normalized_by({**SPACES, "pattern": {"String": "T"}}),
    "spaces replaced by others": normalized_by({**SPACES, "content": "_"}),
    "byte level": lambda spec: spec.update(pre_tokenizer=BYTES),
    "other words": lambda spec: spec["pre_tokenizer"].update(replacement="_"),
    "dropout": lambda spec: spec["model"].update(dropout=0.5),
    "whole words first": lambda spec: spec["model"].update(ignore_merges=True),
    "pieces inside a word": lambda spec: spec["model"].update(continuing_subword_prefix="##", merges=[]),
    "pieces at a word's end": lambda spec: spec["model"].update(end_of_word_suffix="</w>"),
    "pieces of bytes": lambda spec: spec["model"].update(
        vocab={"<0xC3><0xA9>" if piece == "▁▁" else piece: i for piece, i in spec["model"]["vocab"].items()},
        merges=[["<0xC3>", "<0xA9>"] if merge == ["▁", "▁"] else merge for merge in spec["model"]["merges"]],
    ),
    "takes spaces before": unknown_token_with("lstrip"),
    "takes spaces after": unknown_token_with("rstrip"),
    "whole words only": unknown_token_with("single_word"),
    "an end for every text": ended_by("</s>"),
    "no piece for the prompt's last character": lambda spec: spec["model"].update(
        vocab={piece.replace("\n", "é"): i for piece, i in spec["model"]["vocab"].items()},
        merges=[[piece.replace("\n", "é") for piece in merge] for merge in spec["model"]["merges"]],
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_a_tokenizer_that_does_more_is_given_whole_strings(name):
    """The vocabulary alone does not tell what these make of two texts side by side."""
    assert begins_apart(CHATML, changed(joining_bpe(), lambda spec: None), "The")
    tokenizer = changed(joining_bpe(), BEYOND[name])
    assert not begins_apart(CHATML, tokenizer, "The")
    if name == "dropout":
        return
    [(prompt, *responses)] = CHATML.encode_pairs(tokenizer, ["a b"], ["The"], ["n"], [True])
    for answer, response in zip(("The", "n"), responses, strict=True):
        text = CHATML.render_prompt("a b", True) + CHATML.render_response(answer)
        assert prompt + response == tokenizer(text).input_ids


def test_a_format_s_own_token_is_private_even_when_the_tokenizer_calls_it_ordinary():
    def ordinary(spec):
        for token in spec["added_tokens"]:
            token["special"] = token["special"] and token["content"] != "<image>"

    tokenizer = changed(mistral_v1(), ordinary)
    rows = (["<image>?"], ["an <image>"], ["b"], [True])
    assert MISTRAL.encode_pairs(tokenizer, *rows) == MISTRAL.encode_pairs(mistral_v1(), *rows)


@pytest.mark.parametrize("conversation, tokenizer", cases())
@examples(40)
@given(question=LITERAL_TEXT, chosen=LITERAL_TEXT, rejected=LITERAL_TEXT)
@example("<image></s>", "</s><s>", "<image>")
def test_special_token_literals_stay_text(conversation, tokenizer, question, chosen, rejected):
    tokenizer = tokenizer()
    [(prompt, *responses)] = conversation.encode_pairs(tokenizer, [question], [chosen], [rejected], [True])
    # Control tokens are those of the same conversation without any text, and no others.
    [(empty_prompt, empty_response, _)] = conversation.encode_pairs(tokenizer, [""], [""], [""], [True])
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for response in responses:
        full, empty = prompt + response, empty_prompt + empty_response
        assert [i for i in full if i in control] == [i for i in empty if i in control]
    for answer, response in zip((chosen, rejected), responses, strict=True):
        text = conversation.render_prompt(question, True) + conversation.render_response(answer)
        decoded = decode_prompt(conversation, tokenizer, prompt + response)
        assert decoded.removeprefix("<s>").lstrip(" ▁") == text.replace("▁", " ").lstrip()
    assert prompt == conversation.encode_prompt(tokenizer, question, True) or tokenizer is joining_bpe()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(640, 480), (1, 50)])
def test_ids_equal_the_processor_with_a_real_image(size, kind):
    geometry = AnyresGeometry(56, 14, ((56, 112), (112, 56), (112, 112)))
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=[list(p) for p in geometry.grid_pinpoints],
    )
    processor = LlavaNextProcessor(image_processor, mistral_v1(kind), 14, "default", num_additional_image_tokens=1)
    text = MISTRAL.render_prompt("What is this?", True) + MISTRAL.render_response("A cat.")
    inputs = processor(images=Image.new("RGB", size), text=text)
    [(prompt, chosen, _)] = MISTRAL.encode_pairs(mistral_v1(kind), ["What is this?"], ["A cat."], ["x"], [True])
    expanded = expand_image_token(prompt, 32000, geometry.num_image_tokens(*size))
    assert inputs["input_ids"] == [expanded + chosen]


def test_literal_and_plain_rows_mix_in_a_batch():
    tokenizer = mistral_v1()
    rows = [
        ("Why?", "A cat.", "A dog.", True),
        ("Is <image> a tag?", "Yes: <image>.", "</s>", True),
        ("Hi", "a", "b", False),
    ]
    together = MISTRAL.encode_pairs(tokenizer, *zip(*rows, strict=True))
    alone = [MISTRAL.encode_pairs(tokenizer, *zip(row, strict=True))[0] for row in rows]
    assert together == alone
    assert together[1][0].count(32000) == 1 and 32000 not in together[1][1] and together[1][2].count(2) == 1


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_rows_tokenized_apart_and_rows_tokenized_whole_mix_in_a_batch(conversation):
    """Each row's ids stand in its own place, whichever way its neighbours are tokenized and however many they are."""
    tokenizer = joining_bpe()
    rows = [
        ("a", "The", "the", False),
        ("b", "\nThe", "the", True),  # only the chosen answer could be joined to chatml's prompt
        ("c d", "n", "\nt", False),  # only the rejected one
        ("e", "\n", "\n\nm", True),
        ("f", "", "g", True),
        ("h", "im", "ag", False),
    ]
    apart = [all(begins_apart(conversation, tokenizer, answer) for answer in row[1:3]) for row in rows]
    assert apart == ([True, False, False, False, True, True] if conversation is CHATML else [False] * 6)
    for order in (rows, rows[::-1], rows[1:4], rows[:1] + rows[4:]):
        together = conversation.encode_pairs(tokenizer, *zip(*order, strict=True))
        assert len(together) == len(order)
        for (question, *answers, image), (prompt, *responses) in zip(order, together, strict=True):
            for answer, response in zip(answers, responses, strict=True):
                text = conversation.render_prompt(question, image) + conversation.render_response(answer)
                assert prompt + response == tokenizer(text).input_ids
    assert conversation.encode_pairs(tokenizer, [], [], [], []) == []


def test_encoding_leaves_the_tokenizer_as_it_was_and_ignores_its_truncation():
    tokenizer = copy.deepcopy(mistral_v1())
    before = MISTRAL.encode_pairs(tokenizer, ["q"], ["a " * 50], ["b"], [True])
    tokenizer("a " * 50, truncation=True, max_length=4, padding="max_length")
    state = tokenizer.backend_tokenizer.to_str()
    tokenizer.add_tokens(["<new>"])  # a changed tokenizer is copied again
    assert MISTRAL.encode_pairs(tokenizer, ["q"], ["a " * 50], ["b"], [True]) == before
    assert "\ufdd0" not in state


def test_refusals():
    with pytest.raises(ValueError, match="im_start"):
        CHATML.encode_prompt(mistral_v1(), "q", True)
    with pytest.raises(ValueError):
        MISTRAL.encode_pairs(mistral_v1(), ["q"], ["a", "b"], ["c"], [True])


def test_expand_image_token():
    assert expand_image_token([1, 9, 2], 9, 3) == [1, 9, 9, 9, 2]
    assert expand_image_token([9], 9, 1) == [9]
    for ids in ([1, 2], [9, 9]):
        with pytest.raises(ValueError, match="one image placeholder"):
            expand_image_token(ids, 9, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("turns", [[("Hi?", "Yes.")], [("a b", "c d"), (" <image> e", "f\n"), ("g", "")]])
def test_turns_join_to_the_whole_conversation(name, turns, kind):
    conversation = CONVERSATIONS[name]
    tokenizer = chatml(kind) if name.endswith("34b") else mistral_v1(kind)
    encoded = conversation.encode_turns(tokenizer, turns, has_image=True)
    joined = [i for prompt, response in encoded for i in prompt + response]
    prompt = conversation.encode_prompt(tokenizer, turns[-1][0], True, history=turns[:-1])
    assert joined[: len(prompt)] == prompt
    assert len(encoded) == len(turns) and joined.count(32000) == 1 and encoded[0][0].count(32000) == 1
    for (_, answer), (_, response) in zip(turns, encoded, strict=True):
        assert tokenizer.decode(response, skip_special_tokens=True).strip() == answer.strip()


@pytest.mark.parametrize("kind", KINDS)
@examples(40)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), image=st.booleans())
@example([("", ""), (" a", " "), ("\n", "\n")], True)
def test_turns_are_the_tokenizer_s_own_ids_cut_at_the_answers(kind, turns, image):
    if has_literal(*(text for turn in turns for text in turn)):
        return
    tokenizer = mistral_v1(kind)
    encoded = MISTRAL.encode_turns(tokenizer, turns, image)
    question, answer = turns[-1]
    text = MISTRAL.render_prompt(question, image, None, turns[:-1]) + MISTRAL.render_response(answer)
    assert [i for prompt, response in encoded for i in prompt + response] == tokenizer(text).input_ids
    for number, (_, response) in enumerate(encoded):
        alone = MISTRAL.encode_pairs(tokenizer, *zip((*turns[number], "x", False), strict=True))[0][1]
        assert response == alone  # no special token before an answer: nothing depends on what came earlier


PIECES = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))


@examples(80)
@given(question=TEXT, answer=TEXT)
@example("What is this?", " two  spaces\n")
@example(" ", "")
def test_published_kind_gives_sentencepiece_s_ids_around_each_special_token(question, answer):
    """LLaVA encodes what stands before and after <image> each by itself: an implementation that is not tokenizers'."""
    if has_literal(question, answer):
        return
    [(prompt, response, _)] = MISTRAL.encode_pairs(mistral_v1(), [question], [answer], ["x"], [True])
    after = f"\n{question} [/INST] {answer}"
    assert prompt + response == [1, *PIECES.encode("[INST] "), 32000, *PIECES.encode(after), 2]


def test_kinds_differ_where_they_should():
    def ids(text):
        return [mistral_v1(kind)(text, add_special_tokens=False).input_ids for kind in KINDS]

    assert ids("a<image>\n") == [[264, 32000, 28705, 13], [264, 32000, 28705, 13], [264, 32000, 13]]
    assert ids("a</s> a") == [[264, 2, 28705, 264], [264, 2, 264], [264, 2, 264]]
