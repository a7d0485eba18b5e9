"""evals/human.py: votes that survive crashes, blindness, resuming, agreement; the page in headless Chromium."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import human
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from statsmodels.stats.inter_rater import cohens_kappa as statsmodels_kappa

from llava_orpo.errors import UsageError, UserError
from llava_orpo.evaluation import votes, voting
from llava_orpo.evaluation.answer_pairs import AnswerPair, read_answer_pairs, tally
from llava_orpo.evaluation.votes import VoteStore, cohens_kappa, flipped, majority

PAIRS = [AnswerPair("d", f"p{i}", "s/t", f"question {i}?", None, f"ours {i}", f"theirs {i}") for i in range(40)]


@pytest.fixture
def file(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(6):
        image = {"path": f"images/{i}.png"} if i != 2 else None
        Image.new("RGB", (60, 40), (200, 40 * i, 0)).save(tmp_path / "images" / f"{i}.png")
        answers = {
            "secretbase": f"theirs {i} <b>x</b>",
            "secrettuned": f"ours {i}" if i != 5 else "theirs 5 <b>x</b>",
        }
        lines.append(
            {
                "pair_id": f"p{i}",
                "dataset": "d",
                "subset": "s/t",
                "image": image,
                "question": f"question {i}?",
                "chosen": "c",
                "rejected": "r",
                "answers": answers,
            }
        )
    path = tmp_path / "generations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_vote_is_filed_under_the_right_model(tmp_path):
    store = VoteStore(tmp_path)
    for i, (choice, flip) in enumerate(
        [("left", False), ("left", True), ("right", False), ("right", True), ("tie", True)]
    ):
        store.add("ann", PAIRS[i], choice, flip)
    assert [store.outcomes("ann", PAIRS)[pair.key] for pair in PAIRS[:5]] == ["a", "b", "b", "a", "tie"]
    store.add("ann", PAIRS[0], "tie", False)  # a change of mind
    assert store.outcomes("ann", PAIRS)[PAIRS[0].key] == "tie"
    assert len((tmp_path / "ann.jsonl").read_text().splitlines()) == 6  # nothing is erased
    assert store.outcomes("ann", PAIRS[5:]) == store.outcomes("bob", PAIRS) == {}
    assert store.raters() == ["ann"]


def test_vote_is_on_disk_before_it_is_confirmed(tmp_path, monkeypatch):
    synced = []
    original = os.fsync

    def fsync(descriptor):
        original(descriptor)
        synced.append((tmp_path / "ann.jsonl").read_text())

    monkeypatch.setattr(votes.os, "fsync", fsync)
    VoteStore(tmp_path).add("ann", PAIRS[0], "left", False)
    assert len(synced) == 1 and json.loads(synced[0])["pair_id"] == "p0"


@pytest.mark.parametrize("cut", [1, 30])
def test_crash_in_the_middle_of_a_write_loses_only_that_vote(tmp_path, cut):
    store = VoteStore(tmp_path)
    for pair in PAIRS[:3]:
        store.add("ann", pair, "left", False)
    path = tmp_path / "ann.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(store.outcomes("ann", PAIRS)) == 2
    store.add("ann", PAIRS[2], "right", False)
    assert list(store.outcomes("ann", PAIRS).values()) == ["a", "a", "b"]


def test_damaged_line_is_named(tmp_path):
    store = VoteStore(tmp_path)
    store.add("ann", PAIRS[0], "left", False)
    path = tmp_path / "ann.jsonl"
    path.write_text('{"key"\n' + path.read_text())
    with pytest.raises(ValueError, match=r"ann\.jsonl:1"):
        store.outcomes("ann", PAIRS)


def _vote_many(folder: Path, start: int) -> None:
    store = VoteStore(folder)
    for i in range(start, 40, 4):
        store.add("ann", PAIRS[i], "left", False)


def test_processes_at_once_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_vote_many, args=(tmp_path, start)) for start in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(VoteStore(tmp_path).outcomes("ann", PAIRS)) == 40


@pytest.mark.parametrize("name", ["", "../ann", "a/b", "ann\n", ".hidden", "x" * 41, "ann b"])
def test_names_that_are_no_file_names(tmp_path, name):
    with pytest.raises(ValueError, match="name"):
        VoteStore(tmp_path).add(name, PAIRS[0], "left", False)
    assert list(tmp_path.iterdir()) == []


def test_order_is_a_fixed_fair_coin():
    coins = np.array([[flipped(seed, rater, pair) for pair in PAIRS] for seed in range(10) for rater in "abcde"])
    assert coins.tolist() == [[flipped(s, r, pair) for pair in PAIRS] for s in range(10) for r in "abcde"]
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / coins.size**0.5
    assert len({tuple(row) for row in coins.tolist()}) == 50  # another order for each seed and rater


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # in statsmodels' standard errors
@given(st.lists(st.tuples(*[st.sampled_from(["a", "tie", "b"])] * 2), min_size=1))
def test_kappa_equals_statsmodels(categories):
    first, second = zip(*categories, strict=True)
    table = np.array([[sum(v == (x, y) for v in categories) for y in ("a", "tie", "b")] for x in ("a", "tie", "b")])
    if len(set(first)) == 1 and set(first) == set(second):
        assert cohens_kappa(first, second) is None
    else:
        assert cohens_kappa(first, second) == pytest.approx(statsmodels_kappa(table).kappa, abs=1e-12)


def test_majority():
    assert majority(["a", "b", "a"]) == "a" and majority(["b"]) == "b"
    assert majority(["a", "b"]) == majority(["a", "tie"]) == majority(["a", "b", "tie"]) == "tie"


def test_report_numbers(tmp_path, file, capsys):
    """Two raters and a judge on five pairs that differ, counted by hand."""
    a, b, pairs = read_answer_pairs(file, None, None)
    assert (a, b) == ("secrettuned", "secretbase")
    folder = tmp_path / "votes_secrettuned_vs_secretbase"
    store = VoteStore(folder)
    for rater, choices in {"ann": "aaabt", "bob": "aabb"}.items():
        for pair, choice in zip(pairs, choices, strict=False):  # bob leaves one out
            store.add(rater, pair, {"a": "left", "b": "right", "t": "tie"}[choice], False)
    VoteStore(folder).path("nobody").touch()
    judged = [{"key": pair.key, "outcome": "a"} for pair in pairs]
    (tmp_path / "judge.json").write_text(json.dumps({"outcomes": judged}))
    assert human.main([str(file), "report=true", f"judge={tmp_path / 'judge.json'}"]) == 0
    summary = json.loads((folder / "report.json").read_text())
    assert summary["n_pairs"] == 5  # the sixth has the same answer twice
    assert summary["raters"]["ann"] == tally(["a", "a", "a", "b", "tie"])
    assert summary["majority"] == tally(["a", "a", "tie", "b", "tie"])
    lines = {tuple(line["raters"]): line for line in summary["agreement"]}
    assert lines["ann", "bob"]["agreement"] == 0.75 and lines["ann", "bob"]["n"] == 4
    assert lines["ann", "bob"]["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)  # chance: 3/4 * 2/4 + 1/4 * 2/4
    assert lines["ann", "(judge)"]["agreement"] == 0.6 and lines["ann", "(judge)"]["kappa"] == pytest.approx(0)
    printed = capsys.readouterr().out
    assert "majority of 2 raters" in printed and "agree on 75.0%" in printed


def test_report_without_votes(file):
    with pytest.raises(UserError, match="no votes"):
        human.main([str(file), "report=true"])
    with pytest.raises(UsageError, match="Unknown key `rater`"):
        human.main([str(file), "rater=x"])


def test_view_is_blind_and_resumes(tmp_path):
    store = VoteStore(tmp_path)
    sides = set()
    for index, pair in enumerate(PAIRS):
        seen = voting.view(PAIRS, store, 0, "ann", index)
        assert {seen["left"], seen["right"]} == {pair.a, pair.b}
        sides.add(seen["left"] == pair.a)
    assert sides == {True, False}
    store.add("ann", PAIRS[0], "left", False)
    store.add("ann", PAIRS[2], "left", False)
    voted = store.outcomes("ann", PAIRS)
    assert voting.next_unvoted(PAIRS, voted) == 1 and voting.next_unvoted(PAIRS, voted, 2) == 3
    assert voting.view(PAIRS, store, 0, "ann", 40)["progress"] == "ann: 2 of 40 voted. All done, thank you."


@pytest.fixture
def page(file, tmp_path):
    """A running page; yields (address, store, pairs)."""
    _, _, pairs = read_answer_pairs(file, None, None)
    pairs = pairs[:4]
    store = VoteStore(tmp_path / "votes")
    blocks = voting.make_page(pairs, store, seed=0)
    _, address, _ = blocks.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, allowed_paths=[str(tmp_path / "images")]
    )
    yield address, store, pairs
    blocks.close()


def test_page_in_a_browser(page):
    """Votes by clicks: the right model gets them, the page holds no model's name, a second visit goes on."""
    if os.environ.get("LLAVA_ORPO_NO_BROWSER") == "1":
        pytest.skip("not run: LLAVA_ORPO_NO_BROWSER=1")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.fail("Needs headless Chromium: `apt-get install chromium`, or set LLAVA_ORPO_NO_BROWSER=1.")
    from playwright.sync_api import expect, sync_playwright

    address, store, pairs = page
    foreign, received = set(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])

        def refuse(route):
            foreign.add(route.request.url)
            route.abort()

        def visit():
            tab = browser.new_page()
            tab.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
            tab.on("response", lambda r: received.append(r))
            tab.goto(address)
            tab.fill("#name textarea, #name input", "ann")
            tab.click("#start")
            return tab

        def shown(tab, side: str) -> str:
            return tab.input_value(f"#{side} textarea")

        tab = visit()
        for i, pair in enumerate(pairs[:3]):
            expect(tab.locator("#question textarea")).to_have_value(pair.question)
            assert {shown(tab, "left"), shown(tab, "right")} == {pair.a, pair.b}
            if pair.image:
                expect(tab.locator("#image img")).to_be_visible()
                assert tab.locator("#image img").evaluate("i => i.decode().then(() => i.naturalWidth)") == 60
            else:
                expect(tab.locator("#image img")).to_have_count(0)
            side = "left" if (shown(tab, "left") == pair.a) == (i != 1) else "right"  # a, b, a
            tab.click(f"#vote-{side}")
        expect(tab.locator("#progress")).to_contain_text("3 of 4")
        assert [store.outcomes("ann", pairs)[pair.key] for pair in pairs[:3]] == ["a", "b", "a"]
        tab.click("#back")
        expect(tab.locator("#question textarea")).to_have_value(pairs[2].question)
        tab.click("#vote-tie")
        expect(tab.locator("#question textarea")).to_have_value(pairs[3].question)
        tab.close()

        tab = visit()  # resumes at the fourth
        expect(tab.locator("#question textarea")).to_have_value(pairs[3].question)
        tab.click("#vote-tie")
        expect(tab.locator("#progress")).to_contain_text("All done")
        expect(tab.locator("#vote-left")).to_be_disabled()
        text = tab.content() + "".join(
            r.text() for r in received if "json" in r.headers.get("content-type", "") and r.request.method == "GET"
        )
        browser.close()
    assert "secret" not in text
    assert [store.outcomes("ann", pairs)[pair.key] for pair in pairs] == ["a", "b", "tie", "tie"]
    # Gradio's own page asks for one script that helps inside an iframe; everything above worked without it.
    assert all("iframe-resizer" in url for url in foreign)


def test_page_through_its_api(page):
    """The handlers as gradio_client calls them: a bad name is refused with the reason, a good one starts."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    address, store, pairs = page
    client = Client(address, verbose=False)
    with pytest.raises(AppError, match="rater's name"):
        client.predict("../x", api_name="/start")
    client.predict("bob", api_name="/start")
    client.predict(api_name="/vote_left")
    assert len(store.outcomes("bob", pairs)) == 1 and store.raters() == ["bob"]
