"""evals/report.py: what the page says, that it is safe and small, and that it works in headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import report
from helpers.paths import ROOT
from helpers.report_runs import draw_image, make_pairs, make_run, write_examples, write_history, write_lines
from llava_orpo.preference import metrics, records
from llava_orpo.report import examples as report_examples
from llava_orpo.report import inputs as report_inputs

EVALS = ROOT / "evals"
SECTIONS = ("summary", "training", "subsets", "margins", "grounding", "examples")
EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\" onclick=\"x {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags with attributes, and the visible text of each section."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text: dict[str, str] = {}
        self._section, self._raw = "", ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append("")
        if tag == "section":
            self._section = dict(attributes)["id"]

    def handle_endtag(self, tag):
        self._raw = ""
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        if self._raw == "script":
            self.scripts[-1] += data
        elif not self._raw:
            self.text[self._section] = self.text.get(self._section, "") + data

    def flat(self, section: str) -> str:
        return " ".join(self.text[section].split())


def make_page(folder: Path, *options: str) -> tuple[Page, str]:
    assert report.main([str(folder), *options]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    return Page(html), html


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report"), n=160, examples=48)


@pytest.fixture(scope="module")
def full_page(run):
    after, before = run
    return make_page(after, f"baseline={before}")


def test_every_section_is_there_with_its_content(full_page):
    page, _ = full_page
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert set(SECTIONS) <= ids
    charts = [a["id"] for tag, a in page.tags if a.get("class") == "chart"]
    figures = json.loads(page.scripts[0])
    assert sorted(figures) == sorted(charts)
    assert len([c for c in charts if c.startswith("training-")]) == 5
    assert {"margin-histogram", "margin-length", "grounding-bars", "groups-0", "groups-1", "groups-2"} <= set(charts)
    assert not any("missing" in (a.get("class") or "") for _, a in page.tags)
    for title in ("Loss", "Preference accuracy", "Odds-ratio term", "SFT term", "Learning rate"):
        assert title in page.flat("training")
    assert "LoRA, rank 32" in page.flat("") and "20.6 min" in page.flat("")


def test_the_numbers_are_those_of_preference(run, full_page):
    page, _ = full_page
    after, before = (records.read_pairs(folder / "preference_pairs.jsonl") for folder in run)
    now, earlier = metrics.summarize(after, 0.1), metrics.summarize(before, 0.1)
    comparison = metrics.compare(after, before)
    text = page.flat("summary")
    for one in (now, earlier):
        assert f"{100 * one['preference_accuracy']:.1f}%" in text
        low, high = one["preference_accuracy_low"], one["preference_accuracy_high"]
        assert f"95% interval {100 * low:.1f} to {100 * high:.1f}%" in text
    assert f"+{100 * comparison['difference']:.1f} points" in text
    assert f"{comparison['only_a']} right only after, {comparison['only_b']} right only before" in text
    assert "p < 0.001" in text and "160 pairs on 80 images" in text
    shown = f"{now['odds_ratio_loss'] - earlier['odds_ratio_loss']:+.3f}".replace("-", "−")
    assert shown in text
    subset = now["subsets"]["source"]["COCO"]
    assert f"COCO{subset['n']}" in page.flat("subsets")
    small = now["small_subsets"]["source"]
    assert f"Too few pairs for numbers: {next(iter(small))} ({next(iter(small.values()))})" in page.flat("subsets")
    grey = records.read_pairs(run[0] / "preference_pairs_grey.jsonl")
    accuracy = metrics.summarize(grey, 0.1)["preference_accuracy"]
    assert f"With a grey image the accuracy is {100 * accuracy:.1f}%, not disting" in page.flat("grounding")


def test_examples_show_texts_scores_and_images(run, full_page):
    page, html = full_page
    cards = [a for tag, a in page.tags if tag == "article"]
    assert len(cards) == 48
    pairs = {p.pair_id: p for p in records.read_pairs(run[0] / "preference_pairs.jsonl")[:48]}
    margins = [float(card["data-margin"]) for card in cards]
    assert sorted(margins) == sorted(pair.margin for pair in pairs.values())
    assert (margins[0], margins[1]) == (max(margins), min(margins)), "best and worst come first, in turn"
    assert Counter(card["data-status"] for card in cards) == Counter(
        "correct" if pair.correct else "incorrect" for pair in pairs.values()
    )
    images = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(images) == 48 and all(source.startswith("data:image/") for source in images)
    text = page.flat("examples")
    assert "Answer 007." in text and "orpo" in text and "near two smaller boxes." in text
    assert "<mark>crimson ball</mark>" in html


def test_nothing_is_fetched_and_only_own_scripts_run(full_page):
    page, html = full_page
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "srcset", "data", "poster"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), (tag, name, value[:80])
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    scripts = [(a, text) for (_, a), text in zip([t for t in page.tags if t[0] == "script"], page.scripts, strict=True)]
    assert [a.get("type") for a, _ in scripts] == ["application/json", None, None]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in scripts[1:]}
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == hashes
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


@pytest.fixture(scope="module")
def evil_page(tmp_path_factory):
    """Every text a dataset, a model or a config brings, made hostile."""
    folder = tmp_path_factory.mktemp("evil")
    pairs = [
        replace(
            pair,
            dataset=EVIL,
            source=EVIL + str(i % 2),
            question_type=EVIL,
            pair_id=EVIL + str(i),
            subset=f"{EVIL}{i % 2}/{EVIL}",
        )
        for i, pair in enumerate(make_pairs(60, 0.4, seed=1))
    ]
    records.write_pairs(folder / "preference_pairs.jsonl", pairs)
    entry = {
        "step": 1,
        "epoch": 0.1,
        "dataset": EVIL,
        "metrics": metrics.summarize(pairs, 0.1),
        "grounding": None,
    }
    records.append_history(folder / "preference_eval.json", entry)
    texts = [
        {"dataset": p.dataset, "pair_id": p.pair_id}
        | {
            "question": EVIL,
            "chosen": EVIL + " a",
            "rejected": EVIL + " b",
            "image": None,
            "answers": {EVIL: EVIL},
        }
        for p in pairs
    ]
    write_lines(folder / "generations.jsonl", texts)
    adapter = {"base_model_name_or_path": EVIL.replace("/", ""), "peft_type": EVIL, "r": EVIL}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return (*make_page(folder), folder)


def test_all_text_is_escaped(evil_page):
    page, html, _ = evil_page
    assert len(page.scripts) == 3
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.flat("examples").count("window.hacked = 1</script>") >= 60 * 4, "the text itself stays readable"
    assert "49" not in re.findall(r"x (.{2})", page.flat("examples")), "templates in data are not evaluated"
    assert "<script" not in page.scripts[0]
    assert [a["data-subset"] for tag, a in page.tags if tag == "article"][0].endswith(f"/{EVIL}")


def test_page_stays_small_with_200_images(tmp_path):
    """Noise compresses worse than any photo; long answers on top."""
    after, before = make_run(tmp_path, n=400, examples=0)
    pairs = [replace(p, image_hash=f"own{i}") for i, p in enumerate(make_pairs(400, 0.47, seed=200))]
    write_examples(after, pairs[:200], noise=True)
    page, html = make_page(after, f"baseline={before}")
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 200
    assert len({a["src"] for tag, a in page.tags if tag == "img"}) == 200
    assert len(html.encode()) < 10_000_000
    widths = {int(a["width"]) for tag, a in page.tags if tag == "img"}
    assert max(widths) <= 320 and min(widths) >= 96


def test_an_empty_folder_says_what_is_missing_and_what_makes_it(tmp_path):
    page, _ = make_page(tmp_path)
    for section, command in (
        ("summary", "python evals/preference.py RECIPE.yaml"),
        ("training", "llamafactory-cli train RECIPE.yaml"),
        ("subsets", "python evals/preference.py RECIPE.yaml"),
        ("margins", "python evals/preference.py RECIPE.yaml"),
        ("grounding", "grounding_eval: true"),
        ("examples", "python evals/generate.py RECIPE.yaml"),
    ):
        assert command in page.flat(section), section
    assert len([1 for _, a in page.tags if "missing" in (a.get("class") or "").split()]) == 6


def test_history_alone_gives_before_and_after_without_pairing(tmp_path):
    write_history(tmp_path, n=80)
    page, _ = make_page(tmp_path)
    text = page.flat("summary")
    assert "Before (step 0)" in text and "After (step 200)" in text and "no paired interval" in text
    assert "With a grey image instead" in text
    assert "own − grey" in page.flat("grounding")
    assert "preference_pairs.jsonl" in page.flat("margins")
    assert "held-out" in page.flat("training")


def test_pairs_alone_ask_for_a_baseline(tmp_path):
    records.write_pairs(tmp_path / "preference_pairs.jsonl", make_pairs(40, 0.4, 1))
    page, _ = make_page(tmp_path)
    assert "give that folder as --baseline" in page.flat("summary")
    assert "Margin against length difference" in page.flat("margins")


def test_several_evaluation_sets_have_their_own_tables(tmp_path):
    for i, name in enumerate(("first", "second")):
        pairs = [replace(p, dataset=name) for p in make_pairs(40 + i, 0.4, i)]
        records.write_pairs(tmp_path / f"preference_pairs_{name}.jsonl", pairs)
    page, _ = make_page(tmp_path)
    headings = [a for tag, a in page.tags if a.get("class") == "dataset"]
    assert len(headings) == 2
    assert page.flat("summary").index("second") < page.flat("summary").index("first"), "the larger set first"


def test_training_log_falls_back_to_the_checkpoint_and_to_the_jsonl(tmp_path):
    write_lines(tmp_path / "trainer_log.jsonl", [{"current_steps": s, "loss": 1.0, "lr": 1e-4} for s in range(1, 9)])
    assert report_inputs.read_run(tmp_path).log[0] == {"step": 1, "loss": 1.0, "learning_rate": 1e-4}
    page, _ = make_page(tmp_path)
    assert "Learning rate" in page.flat("training") and "SFT term" not in page.flat("training")
    (tmp_path / "checkpoint-8").mkdir()
    state = {"log_history": [{"step": 8, "loss": 0.5, "sft_loss": 0.4}]}
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text(json.dumps(state))
    assert report_inputs.read_run(tmp_path).log == state["log_history"]


def test_missing_and_broken_images_are_named(tmp_path):
    pairs = make_pairs(30, 0.4, 1)
    records.write_pairs(tmp_path / "preference_pairs.jsonl", pairs)
    write_examples(tmp_path, pairs[:6])
    (tmp_path / "images" / "hash0.png").unlink()
    broken = tmp_path / "images" / "hash1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    page, _ = make_page(tmp_path)
    assert "hash0.png is missing" in page.flat("examples")
    assert "hash1.png cannot be read" in page.flat("examples")
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 2


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "images/../../secret.png"])
def test_images_outside_the_folder_are_refused(tmp_path, path):
    inner = tmp_path / "run"
    inner.mkdir()
    draw_image(tmp_path / "secret.png", 1)
    line = {
        "dataset": "d",
        "pair_id": "p",
        "question": "q",
        "chosen": "c",
        "rejected": "r",
        "image": {"path": path},
    }
    write_lines(inner / "generations.jsonl", [line])
    with pytest.raises(ValueError, match="generations.jsonl:1: image path .* leaves the folder"):
        report.main([str(inner)])


def test_bad_lines_and_unequal_baselines_are_named(tmp_path, run):
    (tmp_path / "preference_examples.jsonl").write_text('{"dataset": "d", "pair_id": "p"}\n')
    with pytest.raises(ValueError, match="preference_examples.jsonl:1: field 'question'"):
        report.main([str(tmp_path)])
    other = tmp_path / "other"
    other.mkdir()
    records.write_pairs(other / "preference_pairs.jsonl", make_pairs(159, 0.0, 1))
    with pytest.raises(ValueError, match="1 pair.* missing from the second set: 'demo-0159'"):
        report.main([str(run[0]), f"baseline={other}", f"out={tmp_path / 'x.html'}"])


def test_command_line(tmp_path):
    def call(*arguments):
        command = [sys.executable, str(EVALS / "report.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = call(tmp_path, "out=page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("page.html (") and (tmp_path / "page.html").exists()
    failed = call(tmp_path / "none")
    assert failed.returncode == 2 and f"error: There is no {tmp_path / 'none'}." in failed.stderr
    (tmp_path / "preference_eval.json").write_text("{")
    broken = call(tmp_path)
    assert broken.returncode == 1 and "error: " in broken.stderr and "preference_eval.json:1: not JSON" in broken.stderr
    assert "Traceback" not in failed.stderr + broken.stderr


def test_flags_of_before_still_work(tmp_path, run):
    now, before = tmp_path / "now.html", tmp_path / "before.html"
    words = [f"baseline={run[1]}", "max_examples=3", "min_subset=30", f"out={now}"]
    flags = ["--baseline", str(run[1]), "--max-examples=3", "--min-subset", "30", "--out", str(before)]
    assert report.main([str(run[0]), *words]) == report.main([str(run[0]), *flags]) == 0
    pages = [Page(path.read_text(encoding="utf-8")) for path in (now, before)]
    assert [len([tag for tag, _ in page.tags if tag == "article"]) for page in pages] == [3, 3]
    for section in SECTIONS:
        assert pages[0].flat(section) == pages[1].flat(section)


def test_a_cut_keeps_both_ends():
    pairs = make_pairs(50, 0.2, 3)
    texts = {p.key: report_inputs.Texts("q", "c", "r", None, {}) for p in pairs}
    scored = report_inputs.Run(Path(), {"true": pairs, "grey": [], "other": []}, [], [], {})
    chosen = report_examples.choose_examples(scored, None, texts, 10)
    margins = sorted(pair.margin for pair in pairs)
    assert sorted(example.margin for example in chosen) == margins[:5] + margins[-5:]
    everything = report_examples.choose_examples(scored, None, texts, 1000)
    assert Counter(example.key for example in everything) == Counter(texts.keys())


words = st.lists(st.sampled_from(["a", "dog", "cat", "\n", "  ", "sits", "<b>", ""]), max_size=25).map(" ".join)


@given(words, words)
def test_marking_differences_loses_no_character(chosen, rejected):
    for text, parts in zip((chosen, rejected), report_examples.mark_differences(chosen, rejected), strict=True):
        assert "".join(part for part, _ in parts) == text


def test_marks_are_on_the_words_that_differ():
    chosen, rejected = report_examples.mark_differences("two red balls on it", "two blue cats on it")
    assert [part for part, differs in chosen if differs] == ["red balls"]
    assert [part for part, differs in rejected if differs] == ["blue cats"]
    assert not any(differs for _, differs in report_examples.mark_differences("yes", "a long other text")[1])


# --- in a browser ---------------------------------------------------------------------------------------------

# The canvases of an element, through Bokeh's shadow roots.
CANVASES = """(element) => { const found = []; const walk = (node) => {
  if (node.tagName === "CANVAS") found.push(node);
  for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child); };
  walk(element); return found; }"""
TOOLTIPS = """() => { let text = ""; const walk = (node) => {
  if (node.classList?.contains("bk-tooltip-row-value")) text += node.textContent;
  for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child); };
  walk(document.body); return text; }"""
AFTER_COLOR = (0x2F, 0x86, 0xD6)


def pixels_of(page, selector: str, color: tuple[int, int, int]) -> int:
    """How many pixels of an element, as seen, are within 12 of a colour in each channel."""
    seen = np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB"), dtype=int)
    return int((np.abs(seen - np.array(color)) < 12).all(axis=-1).sum())


@pytest.fixture(scope="module")
def browser():
    if os.environ.get("LLAVA_ORPO_NO_BROWSER") == "1":
        pytest.skip("not run: LLAVA_ORPO_NO_BROWSER=1")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail(
            "The report is tested in headless Chromium, which is not here: `apt-get install chromium`, "
            "or set LLAVA_ORPO_NO_BROWSER=1 to go without these tests."
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=program, args=options)
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens a file with the network off; at the end, fails on anything that the console or the page reported."""
    contexts, complaints = [], []

    def go(path: Path, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or complaints.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function(
            "() => [...document.querySelectorAll('.chart')].every("
            f"(chart) => ({CANVASES})(chart).some((canvas) => canvas.width > 50))"
        )
        page.wait_for_timeout(300)
        return page

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


def visible(page) -> list[str]:
    return page.eval_on_selector_all(".example:not([hidden])", "cards => cards.map((c) => c.dataset.place)")


def margins(page) -> list[float]:
    return page.eval_on_selector_all(".example:not([hidden])", "cards => cards.map((c) => Number(c.dataset.margin))")


def find_tooltip(page, chart: str) -> str:
    """Moves over a chart until a tooltip shows; its text."""
    page.locator(f"#{chart}").evaluate("chart => chart.scrollIntoView({behavior: 'instant', block: 'center'})")
    box = page.locator(f"#{chart}").bounding_box()
    for y in range(8, int(box["height"]) - 40, 5):
        for x in range(80, int(box["width"]) - 8, 8):
            page.mouse.move(box["x"] + x, box["y"] + y)
            shown = page.evaluate(TOOLTIPS)
            if shown:
                return shown
    return ""


def test_browser_paints_every_chart(open_page, run, full_page):
    page = open_page(run[0] / "report.html", viewport={"width": 1280, "height": 900})
    for chart in page.eval_on_selector_all(".chart", "charts => charts.map((c) => c.id)"):
        # Bars, points and bands are translucent over white, lines and outlines are not.
        translucent = [tuple(round(255 - a * (255 - c)) for c in AFTER_COLOR) for a in (0.4, 0.45, 0.6)]
        third = (0xE0, 0x8A, 0x1E)  # the learning rate
        assert sum(pixels_of(page, f"#{chart}", c) for c in (AFTER_COLOR, third, *translucent)) > 30, chart


def test_browser_filters(open_page, run, full_page):
    page = open_page(run[0] / "report.html")
    assert len(visible(page)) == 20 and page.inner_text("#count") == "20 of 48 shown"
    page.click("#more")
    page.click("#more")
    assert len(visible(page)) == 48 and not page.is_visible("#more")

    page.fill("#search", "007. ANSWER nonsense")  # words in any order and case, all of them
    assert visible(page) == []
    page.fill("#search", "007. ANSWER")
    assert visible(page) == ["7"]
    page.fill("#search", "")

    pairs = records.read_pairs(run[0] / "preference_pairs.jsonl")[:48]
    before = {p.pair_id: p for p in records.read_pairs(run[1] / "preference_pairs.jsonl")}
    wrong = {str(i) for i, p in enumerate(pairs) if not p.correct}
    page.select_option("#status", "=incorrect")
    assert set(visible(page)) == wrong and wrong
    page.select_option("#status", "")
    fixed = {str(i) for i, p in enumerate(pairs) if p.correct and not before[p.pair_id].correct}
    page.select_option("#change", "=fixed")
    page.click("#more") if page.is_visible("#more") else None
    assert set(visible(page)) == fixed
    kind = "COCO/question answering"
    page.select_option("#subset", "=" + kind)
    assert set(visible(page)) == {i for i in fixed if pairs[int(i)].subset == kind}
    assert page.inner_text("#count") == f"{len(visible(page))} of {len(visible(page))} shown"


def test_browser_sorts(open_page, run, full_page):
    page = open_page(run[0] / "report.html")
    pairs = records.read_pairs(run[0] / "preference_pairs.jsonl")[:48]
    before = {p.pair_id: p for p in records.read_pairs(run[1] / "preference_pairs.jsonl")}
    ordered = sorted(pair.margin for pair in pairs)
    assert margins(page)[:4] == [ordered[-1], ordered[0], ordered[-2], ordered[1]]
    page.select_option("#sort", "worst")
    assert margins(page) == ordered[:20]
    page.select_option("#sort", "best")
    assert margins(page) == ordered[::-1][:20]
    page.select_option("#sort", "place")
    assert visible(page) == [str(i) for i in range(20)]
    gains = {str(i): p.margin - before[p.pair_id].margin for i, p in enumerate(pairs)}
    page.select_option("#sort", "gained")
    assert visible(page) == sorted(gains, key=lambda i: -gains[i])[:20]
    page.select_option("#sort", "lost")
    assert visible(page) == sorted(gains, key=gains.get)[:20]


def test_browser_follows_the_colour_scheme_while_open(open_page, run, full_page):
    page = open_page(run[0] / "report.html", color_scheme="light")
    light, dark = (255, 255, 255), (0x1C, 0x20, 0x24)
    assert pixels_of(page, "#margin-histogram", light) > 10_000
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(500)
    assert pixels_of(page, "#margin-histogram", dark) > 10_000
    assert pixels_of(page, "#margin-histogram", light) < 100
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"


@pytest.mark.parametrize("width", [360, 390, 768])
def test_browser_phone_needs_no_sideways_scrolling(open_page, run, full_page, width):
    page = open_page(run[0] / "report.html", viewport={"width": width, "height": 800}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("Math.max(...[...document.images].map((i) => i.x + i.width))") <= width
    touch = page.evaluate("""() => { const found = []; const walk = (node) => {
      if (node.classList?.contains("bk-events")) found.push(getComputedStyle(node).touchAction);
      for (const child of [...(node.shadowRoot?.children ?? []), ...node.children]) walk(child); };
      walk(document.body); return found; }""")
    assert touch and set(touch) == {"auto"}, "a finger on a chart scrolls the page"


def test_browser_runs_nothing_from_the_data(open_page, evil_page):
    page = open_page(evil_page[2] / "report.html", viewport={"width": 1280, "height": 900})
    for chart in ("groups-0", "margin-length"):  # their tooltips show names from the data
        assert "window.hacked" in find_tooltip(page, chart)
    page.fill("#search", "<script>")
    assert len(visible(page)) == 20
    page.wait_for_timeout(200)
    assert page.evaluate("typeof window.hacked") == "undefined"


def test_browser_opens_an_empty_report(open_page, tmp_path):
    make_page(tmp_path)
    page = open_page(tmp_path / "report.html")
    assert page.locator(".missing").count() == 6
