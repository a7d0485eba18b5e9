"""evals/serve_parity.py against a server of plain transformers, exact and made to differ in every way that is named."""

from __future__ import annotations

import json

import ask
import pytest
import serve_parity
import torch
import yaml

from helpers.commands import exit_code
from helpers.openai_server import OpenAIServer, ServedModel
from helpers.recipes import photo_rows, random_model, write_recipe, write_rows
from helpers.serving import free_port, random_adapter
from llava_orpo.data.conversation import CONVERSATIONS
from llava_orpo.errors import UserError
from llava_orpo.evaluation.session import open_session
from llava_orpo.preference.records import read_pairs
from llava_orpo.serving import causes, parity
from llava_orpo.serving.client import Server
from llava_orpo.serving.reference import Reference, gap_where_they_part, pictures, read_rows, token_logps

pytestmark = pytest.mark.xdist_group("parity")
TOKENS, ROWS = 6, 3
KEY = "OPENAI_API_KEY"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe file with three held-out photographs."""
    folder = tmp_path_factory.mktemp("parity")
    write_rows(folder, photo_rows(ROWS, 1))
    return write_recipe(folder, {"eval_dataset": "rows", "do_train": False, "finetuning_type": "lora"})


@pytest.fixture(scope="module")
def model():
    return ask.load(str(random_model()), "float32")


@pytest.fixture(scope="module")
def loaded(recipe):
    """(session, its rows, the reference's records)."""
    with open_session(yaml.safe_load(recipe.read_text()), str(recipe.parent)) as session:
        rows, bad = read_rows(session, range(ROWS))
        assert not bad
        reference = Reference(session, recipe.parent, TOKENS)
        reference.compute(rows)
        yield session, rows, reference.found


@pytest.fixture
def asked(loaded, tmp_path):
    """What `parity` makes of a served model: (report, kept folder)."""

    def ask_it(served: ServedModel, folder=tmp_path, model=None):
        session, rows, reference = loaded
        with OpenAIServer(served) as server:
            address = Server(server.base_url, KEY, 1, 60.0, 0)
            abilities, records = parity.ask_server(address, model, rows, folder, TOKENS, False)
        return parity.compare(session, rows, abilities, records, reference, None)

    return ask_it


def command(recipe, capsys, base_url, *words):
    """(exit code, what was printed) of the command."""
    capsys.readouterr()
    given = [f"base_url={base_url}", f"max_new_tokens={TOKENS}", f"max_rows={ROWS}", "retries=0", *words]
    code = exit_code(serve_parity.main, recipe, *given)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_an_exact_server_is_equal_in_everything(recipe, model, tmp_path, capsys):
    served = ServedModel(*model)
    with OpenAIServer(served) as server:
        code, printed = command(recipe, capsys, server.base_url, f"output_dir={tmp_path}")
    report = json.loads((tmp_path / parity.REPORT).read_text())
    assert code == 0 and report["equal"] and not report["causes"], printed
    assert report["prompt_ids_equal"] == report["prompt_counts_equal"] == report["answers_equal"] == report["n"] == ROWS
    assert report["logps"]["scored"] == report["logps"]["ids_equal"] == 2 * ROWS
    assert report["logps"]["tokens"] > 2 * ROWS and report["logps"]["worst"] < 1e-4
    correct = report["accuracy"]["correct"]
    pairs = read_pairs(tmp_path / "preference_pairs.jsonl")
    assert len(pairs) == ROWS and sum(pair.correct for pair in pairs) == correct[0] == correct[1]
    assert not (tmp_path / ".parity_server.jsonl").exists()
    assert "3 of 3 equal" in printed and "float32 on cpu" in printed
    assert all("add_special_tokens" not in body for body in served.requests), "requests are those of any client"


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize(
    ("front", "cause"),
    [("", "the BOS token is missing"), ("<s> ", "a blank stands between the BOS token and the prompt")],
)
def test_a_wrong_start_of_the_prompt_is_named(asked, model, ids, front, cause):
    report = asked(ServedModel(*model, front=front, ids=ids, logps=False))
    assert not report["equal"] and report["prompt_counts_equal"] == 0
    assert report["prompt_ids_equal"] == (0 if ids else None)
    assert len(report["causes"]) == 1 and cause in report["causes"][0]
    assert "DIFFERENT" in parity.table(
        {
            **report,
            "base_url": "",
            "model": "",
            "reference": {**report["reference"], "model": ""},
            "server": {**report["server"], "tokens_per_second": None},
        }
    )


def test_every_wrong_prompt_is_named_by_its_ids_and_by_its_counts_if_they_tell(loaded):
    session, rows, _ = loaded
    conversation, image = CONVERSATIONS["llava_v16_mistral"], session.image_token_id
    variants = causes.prompt_variants(conversation, session.tokenizer)
    different = 0
    for name, variant in variants.items():
        wrong = {row.position: variant(row.question, True) for row in rows}
        if wrong == {row.position: row.plain_ids for row in rows}:
            continue  # this tokenizer makes no difference there
        different += 1
        full = {}
        for row in rows:
            count = len(row.prompt_ids) - len(row.plain_ids) + 1
            full[row.position] = [t for i in wrong[row.position] for t in [i] * (count if i == image else 1)]
        text = variant(rows[0].question, False)
        told = {at: {"prompt_ids": ids, "prompt_tokens": len(ids)} for at, ids in full.items()}
        found = causes.prompt_causes(conversation, session.tokenizer, image, rows, told, len(text), text)
        same = [other for other, v in variants.items() if all(v(r.question, True) == wrong[r.position] for r in rows)]
        assert found[0] in same, (name, found)
        counted = {at: {"prompt_ids": None, "prompt_tokens": len(ids)} for at, ids in full.items()}
        found = causes.prompt_causes(conversation, session.tokenizer, image, rows, counted, len(text), None)
        off = any(len(wrong[row.position]) != len(row.plain_ids) for row in rows)
        assert bool(found) == off, name
        if len(text) != len(conversation.encode_prompt(session.tokenizer, rows[0].question, False)):
            assert not off or name in found[0], (name, found)
    assert different >= 8


def test_another_layout_of_the_image_is_named(loaded):
    session, rows, _ = loaded
    image = session.image_token_id
    arguments = (CONVERSATIONS["llava_v16_mistral"], session.tokenizer, image, rows)
    text = len(session.template.conversation.encode_prompt(session.tokenizer, rows[0].question, False))
    for ids in (True, False):
        told = {}
        for row in rows:
            got = row.prompt_ids[: row.prompt_ids.index(image)] + row.prompt_ids[row.prompt_ids.index(image) + 2 :]
            told[row.position] = {"prompt_ids": got if ids else None, "prompt_tokens": len(got)}
        (cause,) = causes.prompt_causes(*arguments, told, text, None)
        assert cause.startswith("3 of 3 images have another number of tokens") and "laid out otherwise" in cause
    plain = [i for i in rows[0].prompt_ids if i != image]
    told = {rows[0].position: {"prompt_ids": plain, "prompt_tokens": len(plain)}}
    found = causes.prompt_causes(*arguments, told, text, None)
    assert any("the image is not seen" in cause for cause in found)


def test_other_weights_and_a_limit_of_tokens_are_named(asked, model):
    module, processor = model
    head = module.lm_head.weight
    own = head.detach().clone()
    try:
        head.data = own.roll(1, 0)
        report = asked(ServedModel(module, processor))
    finally:
        head.data = own
    assert report["prompt_ids_equal"] == ROWS and report["answers_equal"] == 0 and not report["equal"]
    assert report["logps"]["worst"] > report["tolerance"]
    assert f"{ROWS} answers: the same prompt, but other log-probs: other weights or image features" in report["causes"]
    report = asked(ServedModel(*model, limit=2))
    assert report["causes"] == [f"{ROWS} answers: the server cut them at its limit of tokens"]


def test_a_tie_is_told_from_other_weights(loaded):
    session, rows, reference = loaded
    ours = reference[rows[0].position]["answer"]
    gap = gap_where_they_part(session, rows[0], ours, "z" + ours)
    size = abs(gap)
    assert size > 0
    record = {"finish": "stop", "answer": "z" + ours}
    assert "a tie within rounding" in causes.answer_cause(rows[0], record, ours, False, gap, close=size * 1.01)
    assert "other log-probs" in causes.answer_cause(rows[0], record, ours, False, gap, close=size * 0.99)


def test_an_adapter_that_is_not_or_only_half_applied_is_named(recipe, loaded, tmp_path):
    _, rows, _ = loaded
    adapter = random_adapter(random_model(), tmp_path / "adapter")
    keys = {**yaml.safe_load(recipe.read_text()), "adapter_name_or_path": str(adapter)}
    row = max(rows, key=lambda row: len(row.answer_ids["chosen"]))
    answer = row.answer_ids["chosen"]

    def named(logps):
        records = {("chosen", row.position): {"logps": logps}}
        return parity.adapter_causes(keys, tmp_path, rows, records, 1e-3)

    with open_session({**keys, "adapter_name_or_path": None}, str(tmp_path), need_rows=False) as base:
        theirs = token_logps(base, row, answer)
        projector = parity.projector_state(base)
    assert named(theirs) == [parity.NOT_APPLIED]
    with open_session(keys, str(tmp_path), need_rows=False) as whole:
        right = token_logps(whole, row, answer)
        whole.model.model.multi_modal_projector.load_state_dict(projector)
        half = token_logps(whole, row, answer)
    assert named(half) == [parity.WITHOUT_PROJECTOR]
    assert named([value - 1 for value in right]) == []


def test_servers_that_tell_less_and_sglang(asked, model):
    report = asked(ServedModel(*model, ids=False, logps=False, strict=True, owner="owner"), model="any")
    assert report["equal"] and report["prompt_ids_equal"] is None and report["logps"] is None
    assert report["prompt_counts_equal"] == report["answers_equal"] == ROWS
    report = asked(ServedModel(*model, ids=False, logps=False, strict=True, owner="sglang"))
    assert report["equal"] and report["server"]["logps"] == "sglang" and report["logps"]["worst"] < 1e-4
    assert report["accuracy"]["n"] == ROWS


def test_servers_that_cannot_be_used_are_refused_in_one_line(asked, model, loaded, tmp_path, monkeypatch):
    def refused(served, **words):
        with pytest.raises(UserError) as error:
            asked(served, **words)
        assert len(error.value.args) == 1 and "\n" not in str(error.value)
        return str(error.value)

    _, rows, _ = loaded
    nobody = Server(f"http://127.0.0.1:{free_port()}/v1", KEY, 1, 5.0, 0)
    with pytest.raises(UserError, match="does not answer: .*check base_url and that the server runs"):
        parity.ask_server(nobody, None, rows, tmp_path, TOKENS, False)
    assert "serves a, b: name one with model=" in refused(ServedModel(*model, names=("a", "b")))
    assert "serves a, b, not c" in refused(ServedModel(*model, names=("a", "b")), model="c")
    assert "refuses an image" in refused(ServedModel(*model, images=False))
    monkeypatch.setenv(KEY, "secret-one")
    message = refused(ServedModel(*model, key="another"))
    assert f"put the right key into {KEY}" in message and "secret-one" not in message


def test_a_server_that_breaks_off_is_gone_on_with(loaded, model, tmp_path):
    session, rows, reference = loaded
    served = ServedModel(*model, fail_after=7)
    with OpenAIServer(served) as server:
        address = Server(server.base_url, KEY, 1, 60.0, 0)

        def ask_it():
            return parity.ask_server(address, None, rows, tmp_path, TOKENS, False)

        with pytest.raises(UserError, match=r"\d of 9 answers are kept: the same command asks for the others"):
            ask_it()
        kept = (tmp_path / ".parity_server.jsonl").read_text().splitlines()[1:]
        assert 0 < len(kept) < 9
        before, served.fail_after = len(served.requests), 1 << 30
        assert parity.compare(session, rows, *ask_it(), reference, None)["equal"]
        assert len(served.requests) - before == 9 - len(kept) + 4, "three greetings, one kept answer asked once more"

        served.fail_after = len(served.requests) + 7
        with pytest.raises(UserError):
            ask_it()
        served.fail_after, served.front = 1 << 30, ""  # started again with another template
        report = parity.compare(session, rows, *ask_it(), reference, None)
        assert report["prompt_ids_equal"] == 0, "answers of the old server were taken for the new one's"


def test_the_reference_is_kept_and_its_log_probs_are_those_of_the_whole_forward(loaded, recipe, model):
    session, rows, found = loaded
    again = Reference(session, recipe.parent, TOKENS)
    assert not again.missing(rows) and again.found == found
    assert Reference(session, recipe.parent, TOKENS + 1).missing(rows) == rows
    Reference(session, recipe.parent, TOKENS)
    module, processor = model
    row = rows[0]
    inputs = processor.image_processor(pictures(row), return_tensors="pt")
    ids = torch.tensor([[*row.prompt_ids, *row.answer_ids["rejected"]]])
    with torch.no_grad():
        logps = module(input_ids=ids, **inputs).logits[0].log_softmax(-1)
    places = range(len(row.prompt_ids) - 1, ids.shape[1] - 1)
    expected = [float(logps[place, ids[0, place + 1]]) for place in places]
    assert found[row.position]["logps"]["rejected"] == pytest.approx(expected, abs=1e-5)
