"""scripts/demo.py: answers and scores are the model's own, nothing from outside runs, and a browser shows it all."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ask
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import demo
from helpers.paths import ROOT
from helpers.recipes import SMALL, random_model, recipe
from helpers.serving import accepts, free_port, picture, png, random_adapter, server
from llava_orpo.checkpoint.files import CheckpointError
from llava_orpo.data import images
from llava_orpo.demo import cards, models
from llava_orpo.demo.page import read_examples
from llava_orpo.evaluation import resume
from llava_orpo.tiny import random_model as random_llava

pytestmark = pytest.mark.xdist_group("demo")  # one server for all of them

EVIL = "</p><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
QUESTION = "What is in the picture?"
TOKENS = 12


@pytest.fixture(scope="module")
def references(folder):
    """[(model, processor)] of base and aligned in plain transformers and PEFT."""
    from peft import PeftModel

    model, processor = ask.load(str(random_model()), "float32")
    other = PeftModel.from_pretrained(ask.load(str(random_model()), "float32")[0], folder / "adapter").eval()
    return [(model, processor), (other, processor)]


def whole(candidate, image: bytes, question: str = QUESTION) -> str:
    *_, text = models.stream_answer(candidate, image, question, TOKENS)
    return text


def test_answers_are_those_of_transformers_and_peft(candidates, references):
    image = picture(200, 130)
    said = [whole(candidate, png(image)) for candidate in candidates]
    assert said == [ask.answer(*reference, image, QUESTION, TOKENS) for reference in references]
    assert said[0] != said[1]
    parts = list(models.stream_answer(candidates[1], png(image), QUESTION, TOKENS))
    assert len(parts) > 3 and parts[-1] == said[1]
    assert all(later.startswith(earlier) for earlier, later in zip(parts, parts[1:], strict=False))


def test_two_users_at_once_do_not_switch_each_others_adapter(candidates):
    image = png(picture(90, 90))
    alone = [whole(candidate, image) for candidate in candidates]
    found = [[], []]
    threads = [
        threading.Thread(target=lambda i=i: found[i].extend(whole(candidates[i], image) for _ in range(3)))
        for i in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [[alone[0]] * 3, [alone[1]] * 3]


def test_a_reader_who_leaves_stops_the_generation(candidates):
    image = png(picture(90, 90))
    stream = models.stream_answer(candidates[0], image, QUESTION, 4000)
    next(stream)
    stream.close()
    assert models._DEVICE.acquire(timeout=20), "4,000 tokens would take minutes"
    models._DEVICE.release()


def test_errors_of_the_generation_reach_the_reader(candidates, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(candidates[0].session.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(models.stream_answer(candidates[0], png(picture(50, 50)), QUESTION, 4))
    with pytest.raises(ValueError, match="too long"):
        list(models.stream_answer(candidates[1], png(picture(50, 50)), "word " * 40_000, 4))


def test_scores_are_those_of_the_evaluation(folder, keys, candidates):
    """Packing, batching, and a merged instead of a switched-on adapter: all within fp32 rounding."""
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    recipes = [keys, {**keys, "adapter_name_or_path": str(folder / "adapter")}]
    for name, candidate, one in zip(("base", "aligned"), candidates, recipes, strict=True):
        pairs = resume.evaluate(dict(one), folder / name).pairs
        assert len(pairs) == len(rows) == 6
        for pair, row in zip(pairs, rows, strict=True):
            result = models.compare(candidate, row["image"]["bytes"], row["question"], row["chosen"], row["rejected"])
            for side, answer in (("chosen", result.a), ("rejected", result.b)):
                assert answer.length == getattr(pair, f"{side}_tokens")
                assert answer.logp == pytest.approx(getattr(pair, f"{side}_logp"), abs=2e-4)
                assert sum(token[1] for token in answer.tokens) == pytest.approx(answer.logp, abs=1e-3)
                assert sum(token[2] for token in answer.tokens) == answer.length
            assert result.margin == pytest.approx(pair.margin, abs=2e-5)
            assert abs(result.margin) < 2e-5 or (result.margin > 0) == pair.correct


def test_the_other_way_round_the_margin_changes_its_sign(candidates):
    image = png(picture(120, 80))
    there = models.compare(candidates[1], image, QUESTION, "A red boat.", "Two cats on a bench.")
    back = models.compare(candidates[1], image, QUESTION, "Two cats on a bench.", "A red boat.")
    assert there.margin == pytest.approx(-back.margin, abs=1e-5) and there.margin != 0
    assert "".join(token[0] for token in there.a.tokens).strip() == "A red boat.</s>"
    with pytest.raises(ValueError, match="same text"):
        models.compare(candidates[1], image, QUESTION, "A cat.", "A cat.")
    with pytest.raises(ValueError, match="cutoff_len"):
        models.compare(candidates[1], image, QUESTION, "word " * 5000, "A cat.")


@given(st.text(min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_readable_pieces_make_up_the_text(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text + "🦜é", add_special_tokens=False).input_ids
    pieces = list(models.readable(tokenizer, ids, [-0.5] * len(ids)))
    assert "".join(piece for piece, _, _ in pieces) == tokenizer.decode(ids)
    assert sum(count for _, _, count in pieces) == len(ids)
    assert sum(logp for _, logp, _ in pieces) == pytest.approx(-0.5 * len(ids))
    assert not any(piece.endswith("\ufffd") for piece, _, _ in pieces[:-1]) or "\ufffd" in text


def _tokenizer():
    from transformers import AutoTokenizer

    if not hasattr(_tokenizer, "made"):
        _tokenizer.made = AutoTokenizer.from_pretrained(random_model())
    return _tokenizer.made


def test_texts_cannot_bring_markup():
    scored = models.ScoredAnswer(((EVIL, -1.5, 1), ("</s>", -0.1, 1)), -1.6, 2)
    pages = [
        cards.header(EVIL, EVIL),
        cards.answer_card("Base", EVIL, EVIL),
        cards.answer_card("Base", EVIL, EVIL, "done", "other words"),
        cards.comparison_card("Aligned", EVIL, models.Comparison(scored, scored, 0.1)),
    ]
    for html in pages:
        assert "<script" not in html and "<img" not in html and "&lt;script" in html


def test_a_less_likely_token_is_stronger_and_a_tie_is_no_preference():
    strengths = [
        float(cards.token_span("x", logp, 1, False).split("--s:")[1].split('"')[0])
        for logp in (0.0, -0.5, -3.0, -6.0, -40.0)
    ]
    assert strengths[0] == 0 and strengths == sorted(strengths) and strengths[-2:] == [1.0, 1.0]
    scored = models.ScoredAnswer((("a", -1.0, 1), ("</s>", -1.0, 1)), -2.0, 2)
    card = cards.comparison_card("Base", "m", models.Comparison(scored, scored, 0.0))
    assert "No preference" in card and 'class="scored preferred"' not in card


def test_marks_words_that_the_other_answer_does_not_have():
    html = cards.marked("There is a red <b>star</b>.", "There is a blue <b>star</b>.")
    assert html == "There is a <mark>red</mark> &lt;b&gt;star&lt;/b&gt;."


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\x89PNG\r\n\x1a\n123"])
def test_refuses_files_that_are_no_image(tmp_path, data):
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(images.ImageError, match="not an image"):
        models.read_image(tmp_path / "x.png")


def test_refuses_other_formats_and_too_many_pixels(tmp_path):
    picture(20, 20).save(tmp_path / "x.tiff")
    with pytest.raises(images.ImageError, match="PNG, JPEG"):
        models.read_image(tmp_path / "x.tiff")
    Image.new("1", (10_000, 5_001)).save(tmp_path / "big.png")
    with pytest.raises(images.ImageError, match="50 megapixels"):
        models.read_image(tmp_path / "big.png")


def test_an_adapter_of_another_base_is_refused(folder, keys, tmp_path):
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    config["base_model_name_or_path"] = "somebody/another-llava"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another-llava"):
        models.load_candidates(keys, str(tmp_path / "adapter"), str(tmp_path))


def test_a_merged_folder_is_a_second_model(folder, keys, references, tmp_path):
    from llava_orpo.checkpoint import published as checkpoint

    model = references[1][0]
    merged = tmp_path / "merged"
    plain = copy.deepcopy(model).merge_and_unload()
    checkpoint.save_published(plain, merged, random_model())
    base, aligned = models.load_candidates(keys, str(merged), str(tmp_path))
    assert base.session is not aligned.session and aligned.label == "merged"
    image = picture(100, 140)
    assert whole(aligned, png(image)) == ask.answer(*references[1], image, QUESTION, TOKENS)
    assert whole(base, png(image)) == ask.answer(*references[0], image, QUESTION, TOKENS)


def test_examples_are_different_images_with_different_pairs(folder, tmp_path):
    found = read_examples(folder / "rows.parquet", 2, tmp_path)
    assert len(found) == 2 and len({row["image"] for row in found}) == 2
    assert all(Path(row["image"]).read_bytes() for row in found)
    assert len(read_examples(folder / "rows.parquet", 99, tmp_path)) == 3


def test_flags_of_before_still_work(folder, keys, monkeypatch, capsys):
    """One line says what to write instead, and what it says is what it does."""
    started = []

    class Page:
        def __init__(self, *settings):
            self.settings = settings

        def launch(self, **options):
            assert Path(options.pop("allowed_paths")[0]).is_dir()
            started.append((*self.settings, options))

    def read(path, count, scratch):
        return [path, count]

    monkeypatch.setattr("llava_orpo.demo.models.load_candidates", lambda recipe, aligned, scratch: (recipe, aligned))
    monkeypatch.setattr("llava_orpo.demo.page.read_examples", read)
    monkeypatch.setattr("llava_orpo.demo.page.build", Page)
    recipe, adapter, rows = folder / "recipe.yaml", folder / "adapter", folder / "rows.parquet"
    flags = ["--aligned", adapter, f"--examples={rows}", "--port", 7861, "--max-new-tokens", 9]
    flags += ["--max-upload-mb", 2, "--host=127.0.0.2", "--share", "cutoff_len=512"]
    monkeypatch.setattr(sys, "argv", ["scripts/demo.py"])  # what the deprecation line names
    assert demo.main([str(recipe), *map(str, flags)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    explanation, words = line.split(" write: ")
    assert explanation == "This spelling is deprecated;" and not any(
        word.startswith("-") for word in shlex.split(words)
    )
    assert demo.main(shlex.split(words)[1:]) == 0
    options = {"server_name": "127.0.0.2", "server_port": 7861, "share": True, "show_api": False, "show_error": True}
    candidates = ({**keys, "cutoff_len": 512}, str(adapter))
    assert started == [(candidates, [rows, 12], 9, {**options, "max_file_size": "2mb"})] * 2
    assert capsys.readouterr().err == ""


# --- in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    """The demo started as in its docstring, on a random base model with a random adapter."""
    port = free_port()
    command = [sys.executable, "scripts/demo.py", str(folder / "recipe.yaml"), f"aligned={folder / 'adapter'}"]
    command += [f"examples={folder / 'rows.parquet'}", f"port={port}", f"max_new_tokens={TOKENS}", "max_upload_mb=1"]
    log = tmp_path_factory.mktemp("log") / "demo.txt"
    with server(command, port, log):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    if os.environ.get("LLAVA_ORPO_NO_BROWSER") == "1":
        pytest.skip("not run: LLAVA_ORPO_NO_BROWSER=1")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail("The demo is tested in headless Chromium: `apt-get install chromium`, or LLAVA_ORPO_NO_BROWSER=1.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=program, args=options)
        yield started
        started.close()


@pytest.fixture
def page(browser, address):
    """The open page; requests to other hosts are cut off, and errors of the page fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(90_000)
    context.route(lambda url: not url.startswith(address), lambda route: route.abort())
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_selector("#ask")
    yield page
    context.close()
    assert errors == []


def upload(page, name: str, data: bytes) -> None:
    files = page.locator("#picture input[type=file]").first
    files.set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def fill(page, label: str, text: str) -> None:
    page.get_by_label(label, exact=True).fill(text)


def judge_both(page, a: str, b: str) -> None:
    page.get_by_role("tab", name="Compare two answers").click()
    fill(page, "Answer A", a)
    fill(page, "Answer B", b)
    page.click("#judge")
    page.wait_for_function("document.querySelectorAll('.answer[data-margin]').length == 2")


def ask_both(page) -> list[str]:
    page.click("#ask")
    page.wait_for_function("document.querySelectorAll('.answer[data-state=done] .said').length == 2")
    return page.eval_on_selector_all(".answer[data-state=done] .said", "all => all.map((p) => p.textContent)")


@pytest.mark.slow
def test_browser_upload_ask_and_read_both_answers(page, references):
    image = picture(180, 120)
    upload(page, "boat.png", png(image))
    page.wait_for_selector("#picture img")
    fill(page, "Question", EVIL)
    assert ask_both(page) == [ask.answer(*reference, image, EVIL, TOKENS) for reference in references]
    fill(page, "Question", QUESTION)
    page.click("#ask")
    expected = [ask.answer(*reference, image, QUESTION, TOKENS) for reference in references]
    page.wait_for_function(
        "(texts) => texts.every((t, i) => document.querySelectorAll('.said')[i].textContent == t)", arg=expected
    )
    assert page.evaluate("typeof window.hacked") == "undefined"


@pytest.mark.slow
def test_browser_shows_which_answer_each_model_prefers(page, candidates):
    image = png(picture(150, 150, seed=3))
    a, b = f"A boat {EVIL}.", "Two cats on a bench."
    upload(page, "boat.png", image)
    page.wait_for_selector("#picture img")
    fill(page, "Question", QUESTION)
    judge_both(page, a, b)
    for role, candidate in zip(("base", "aligned"), candidates, strict=True):
        card = page.locator(f".{role}[data-margin]")
        expected = models.compare(candidate, image, QUESTION, a, b)
        assert float(card.get_attribute("data-margin")) == pytest.approx(expected.margin, abs=2e-5)
        verdict = f"Prefers {'A' if expected.margin > 0 else 'B'}by {abs(expected.margin):.3f} nats per token"
        assert card.locator(".verdict").text_content() == verdict
        assert card.locator("[data-answer=B] .tokens").text_content().strip() == b + "</s>"
        colours = card.locator("[data-answer=A] .token").evaluate_all(
            "spans => spans.map((s) => Number(getComputedStyle(s).backgroundColor.match(/[\\d.]+/g)[3] ?? 1))"
        )
        strengths = [min(-token[1] / cards.FULL_COLOUR, 1) for token in expected.a.tokens]
        assert colours == pytest.approx([0.78 * s for s in strengths], abs=0.01)
    assert page.evaluate("typeof window.hacked") == "undefined"


@pytest.mark.slow
def test_browser_examples_fill_the_fields(page, folder, references):
    import io

    import pyarrow.parquet as pq

    row = pq.read_table(folder / "rows.parquet").to_pylist()[0]
    page.locator(".gallery-item").first.click()
    page.wait_for_function("(q) => document.querySelector('textarea').value == q", arg=row["question"])
    image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    expected = [ask.answer(*reference, image, row["question"], TOKENS) for reference in references]
    assert ask_both(page) == expected, "the example's own bytes reach the model"


@pytest.mark.slow
def test_browser_shows_errors_as_messages(page):
    def message(text: str) -> None:
        page.get_by_text(text).first.wait_for()

    page.click("#ask")
    message("Upload an image, or pick an example, first.")
    upload(page, "boat.png", b"this is no image")
    message("This is not an image that can be read.")
    page.wait_for_selector("#picture input[type=file]", state="attached")  # it was taken off the page again
    upload(page, "big.png", os.urandom(1_500_000))
    message("maximum allowed size")
    upload(page, "boat.png", png(picture(60, 60)))
    page.wait_for_selector("#picture img")
    page.click("#ask")
    message("Write a question of up to 2000 characters.")
    assert page.locator(".answer[data-state=empty]:visible").count() == 2, "what was on the page stays"
    page.get_by_role("tab", name="Compare two answers").click()
    fill(page, "Question", QUESTION)
    page.click("#judge")
    message("Write two answers, A and B")
    fill(page, "Answer A", "A cat.")
    fill(page, "Answer B", "A cat.")
    page.click("#judge")
    message("The two answers are the same text.")
    assert page.locator(".answer[data-state=empty]:visible").count() == 2


@pytest.mark.slow
def test_demo_listens_on_this_machine_only(address):
    port = int(address.rsplit(":", 1)[1])
    assert accepts("127.0.0.1", port)
    assert not accepts("127.0.0.2", port)


# --- against a server -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with model, adapter and recipe. vLLM's attention on a CPU takes no heads of 16, which `SMALL` has."""
    folder = tmp_path_factory.mktemp("wide")
    random_llava.write(dataclasses.replace(SMALL, text=(64, 128, 2, 2, 1)), folder / "model")
    random_adapter(folder / "model", folder / "adapter")
    keys = recipe(folder, {"model_name_or_path": str(folder / "model"), "finetuning_type": "lora"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return folder


@pytest.fixture(scope="module")
def vllm(wide, tmp_path_factory):
    """(base_url, [base, aligned]) of vLLM on this machine with base and adapter, which is not merged."""
    subprocess.run(["bash", "scripts/serve.sh", "-h"], cwd=ROOT, check=True, timeout=1800)  # makes its environment
    port = free_port()
    command = ["bash", "scripts/serve.sh", str(wide / "model"), f"adapter={wide / 'adapter'}", f"port={port}"]
    log = tmp_path_factory.mktemp("log") / "vllm.txt"
    with server([*command, "api_key=none", "dtype=float32"], port, log):
        yield f"http://127.0.0.1:{port}/v1", ["model", "adapter"]


@pytest.fixture(scope="module")
def served_address(wide, vllm, tmp_path_factory):
    """The demo in front of it, started as in its docstring."""
    port, (base_url, (base, aligned)) = free_port(), vllm
    command = [sys.executable, "scripts/demo.py", str(wide / "recipe.yaml"), f"base_url={base_url}", f"port={port}"]
    command += [f"base_model={base}", f"aligned_model={aligned}", f"max_new_tokens={TOKENS}"]
    with server(command, port, tmp_path_factory.mktemp("log") / "served-demo.txt"):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@pytest.mark.heavy
def test_browser_against_vllm_several_users_at_once(browser, wide, served_address):
    candidates = models.load_candidates(
        yaml.safe_load((wide / "recipe.yaml").read_text()), str(wide / "adapter"), str(wide / "out")
    )
    images = [picture(180, 120, seed=seed) for seed in range(4)]
    expected = [[whole(candidate, png(image)) for candidate in candidates] for image in images]
    assert len({text for pair in expected for text in pair}) > 4, "an exchange of answers would show"
    pages = []
    for image in images:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(90_000)
        page.goto(served_address, wait_until="domcontentloaded")
        page.wait_for_selector("#ask")
        upload(page, "boat.png", png(image))
        page.wait_for_selector("#picture img")
        fill(page, "Question", QUESTION)
        pages.append(page)
    for page in pages:
        page.click("#ask")
    for page, texts in zip(pages, expected, strict=True):
        page.wait_for_function("document.querySelectorAll('.answer[data-state=done] .said').length == 2")
        said = page.eval_on_selector_all(".answer[data-state=done] .said", "all => all.map((p) => p.textContent)")
        assert said == texts
    page, image = pages[0], png(images[0])
    a, b = "A red boat.", "Two cats on a bench."
    judge_both(page, a, b)
    for role, candidate in zip(("base", "aligned"), candidates, strict=True):
        margin = float(page.locator(f".{role}[data-margin]").get_attribute("data-margin"))
        assert margin == pytest.approx(models.compare(candidate, image, QUESTION, a, b).margin, abs=2e-5)
        assert margin != 0
    for page in pages:
        page.context.close()
