"""evals/judge.py against a stub endpoint: both orders, every kind of trouble, interruption, the key, the
numbers.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import judge
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from statsmodels.stats.proportion import proportion_confint

from helpers.judge_server import JudgeServer, Reply, shown
from helpers.paths import ROOT
from llava_orpo.errors import UsageError, UserError
from llava_orpo.evaluation import answer_pairs, judging
from llava_orpo.evaluation.judge_prompt import parse_verdict
from llava_orpo.serving import client

EVALS = ROOT / "evals"
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Back-off in milliseconds; the key in the environment."""
    original = client.ChatClient.__init__
    monkeypatch.setattr(client.ChatClient, "__init__", lambda self, *args: original(self, *args, first_wait=0.002))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def file(tmp_path):
    """20 prompts; the true answer is said by `tuned` in the first 12, by `base` in the next 5, by both in the
    rest.
    """
    return write_generations(tmp_path, 20)


def write_generations(folder: Path, n: int) -> Path:
    (folder / "images").mkdir()
    lines = []
    for i in range(n):
        image = None
        if i != 1:
            kind = "BMP" if i == 2 else "PNG"
            image = {"path": f"images/{i}.{kind.lower()}"}
            Image.new("RGB", (40 + i, 30), (i * 9, 90, 20)).save(folder / image["path"], kind)
        tuned = "true {x}" if i < 12 or i >= 17 else "false"
        base = "false" if i < 12 else "true {x}" if i < 17 else "true too"
        lines.append(
            {
                "pair_id": f"p{i}",
                "dataset": "d",
                "subset": f"s/{i % 2}",
                "image": image,
                "question": f"what is {i}?",
                "chosen": "good",
                "rejected": "bad",
                "answers": {"base": base, "tuned": tuned},
            }
        )
    path = folder / "generations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def honest(request: dict, number: int = 0) -> Reply:
    """A judge without position bias."""
    _, first, second, _ = shown(request)
    truths = [text.startswith("true") for text in (first, second)]
    return Reply("Reasons.\nVERDICT: " + ("TIE" if truths[0] == truths[1] else "A" if truths[0] else "B"))


def run(file: Path, server: JudgeServer, *words: str) -> dict:
    code = judge.main([str(file), f"base_url={server.base_url}", "model=stub", "yes=true", *words])
    summary = json.loads((file.parent / "judge_tuned_vs_base.json").read_text())
    assert code == (0 if summary["n"] else 1)
    return summary


def counts(summary: dict) -> tuple[int, int, int]:
    return summary["win"], summary["tie"], summary["loss"]


def test_win_tie_loss_and_what_is_sent(file, capsys):
    with JudgeServer(honest) as server:
        summary = run(file, server)
    assert (summary["a"], summary["b"]) == ("tuned", "base")
    assert counts(summary) == (12, 3, 5) and summary["not_judged"] == 0
    for name, hits, of in (("win_rate", 12, 20), ("loss_rate", 5, 20), ("decided_rate", 12, 17)):
        interval = proportion_confint(hits, of, method="wilson")
        assert (summary[f"{name}_low"], summary[f"{name}_high"]) == pytest.approx(interval, abs=1e-12)
    assert summary["orders_disagree"] == 0 and summary["position_bias_rate"] == 0
    assert summary["first_place_share"] == 0.5  # every winner stood first once and second once
    assert summary["usage"] == {"prompt_tokens": 400, "completion_tokens": 80}
    assert {name: counts(found) for name, found in summary["subsets"].items()} == {
        "s/0": (6, 1, 3),
        "s/1": (6, 2, 2),
    }
    asked = [shown(body) for body, _, _ in server.requests]
    assert len(asked) == 40
    assert {(q, first) for q, first, _, _ in asked} == {(q, second) for q, _, second, _ in asked}  # both orders
    sent = {question: url for question, _, _, url in asked}
    assert sent["what is 1?"] is None
    assert (
        base64.b64decode(sent["what is 0?"].removeprefix("data:image/png;base64,"))
        == (file.parent / "images" / "0.png").read_bytes()
    )
    bmp = base64.b64decode(sent["what is 2?"].removeprefix("data:image/png;base64,"))  # endpoints don't read BMP
    assert Image.open(io.BytesIO(bmp)).getpixel((0, 0)) == (18, 90, 20)
    assert all(body["temperature"] == 0 and body["model"] == "stub" for body, _, _ in server.requests)
    assert "12 won, 3 tied, 5 lost" in capsys.readouterr().out


def test_biased_judge_wins_nothing(file):
    with JudgeServer(lambda request, number: Reply("VERDICT: A")) as server:
        summary = run(file, server)
    assert counts(summary) == (0, 20, 0)
    assert summary["orders_disagree"] == 20
    assert summary["position_bias_rate"] == summary["first_place_share"] == 1.0


def test_identical_answers_are_ties_and_not_sent(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[:4]:
        line["answers"]["base"] = line["answers"]["tuned"] + " "
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with JudgeServer(honest) as server:
        summary = run(file, server)
    assert len(server.requests) == 32 and summary["identical"] == 4
    assert counts(summary) == (8, 7, 5)


def test_dataset_answers_can_stand_in(file):
    with JudgeServer(honest) as server:
        words = [f"base_url={server.base_url}", "model=stub", "yes=true", "a=tuned", "b=rejected"]
        assert judge.main([str(file), *words]) == 0
    summary = json.loads((file.parent / "judge_tuned_vs_rejected.json").read_text())
    assert counts(summary) == (15, 5, 0)


TROUBLE = {
    "rate limit": Reply("slow down", 429, {"Retry-After": "0"}),
    "server error": Reply("oops", 500),
    "bad gateway": Reply(raw="<html>", status=502),
    "not json": Reply(raw="<html>"),
    "no choices": Reply(raw='{"choices": []}'),
    "time-out": Reply("VERDICT: A", delay=1.6),
    "no verdict": Reply("I like both of them in their own way, really."),
    "empty": Reply(""),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_that_passes(file, kind):
    """The first try of a third of the verdicts goes wrong; nothing is lost and no number changes."""
    tried = set()

    def behave(request, number):
        question, first = shown(request)[:2]
        if (question, first) not in tried and int(question.strip("what is?")) % 3 == 0:
            tried.add((question, first))
            return TROUBLE[kind]
        if len(request["messages"]) == 4:
            assert "could not be read" in request["messages"][3]["content"]
        return honest(request)

    with JudgeServer(behave) as server:
        summary = run(file, server, *(["timeout=1"] if kind == "time-out" else []))
    assert counts(summary) == (12, 3, 5)
    assert len(server.requests) == 40 + 14  # both orders of 0, 3, …, 18


def test_retry_after_is_honoured(file):
    seen = []

    def behave(request, number):
        seen.append(time.monotonic())
        return Reply("wait", 429, {"Retry-After": "1"}) if number == 1 else honest(request)

    with JudgeServer(behave) as server:
        assert counts(run(file, server, "max_pairs=1", "concurrency=1")) == (1, 0, 0)
    assert 1.0 <= seen[1] - seen[0] < 3 and seen[2] - seen[1] < 0.9


def test_retry_after_forms():
    assert client.retry_after("2.5") == 2.5
    assert client.retry_after(None) == client.retry_after("soon") == client.retry_after("-3") == 0
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 27 < client.retry_after(date) <= 30
    assert client.retry_after(email.utils.formatdate(time.time() - 30, usegmt=True)) == 0


def test_back_off_doubles(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    async def ask(base_url):
        asking = client.ChatClient(base_url, "OPENAI_API_KEY", 5.0, 4)
        monkeypatch.setattr(client.asyncio, "sleep", sleep)
        try:
            await asking.ask({})
        finally:
            monkeypatch.undo()
            await asking.close()

    monkeypatch.setattr(client.random, "uniform", lambda low, high: high)
    with JudgeServer(lambda request, number: Reply("oops", 503)) as server:
        with pytest.raises(client.RequestFailed, match="after 5 tries.*503"):
            asyncio.run(ask(server.base_url))
    assert pauses == pytest.approx([0.002, 0.004, 0.008, 0.016]) and len(server.requests) == 5


def test_what_stays_unjudged_is_counted_and_tried_again(file, capsys):
    def refuses_some(request, number):
        question = shown(request)[0]
        if question == "what is 0?":
            return Reply("content policy", 400)
        return Reply("no idea") if question == "what is 5?" else honest(request)

    with JudgeServer(refuses_some) as server:
        summary = run(file, server)
    assert counts(summary) == (10, 3, 5) and summary["not_judged"] == 2
    complaints = capsys.readouterr().err
    assert "2 pairs were not judged" in complaints and "content policy" in complaints and "no verdict in" in complaints
    assert [shown(body)[0] for body, _, _ in server.requests].count("what is 0?") == 2  # a refusal is not retried
    with JudgeServer(honest) as server:
        assert counts(run(file, server)) == (12, 3, 5)
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [401, 404])
def test_wrong_key_or_address_stops_at_once_and_hides_the_key(file, status, capsys):
    with JudgeServer(lambda request, number: Reply(f"Incorrect API key provided: {KEY}", status)) as server:
        with pytest.raises(UserError) as stopped:
            run(file, server, "concurrency=2")
    assert len(server.requests) <= 4
    assert "***" in str(stopped.value) and "OPENAI_API_KEY" in str(stopped.value)
    assert KEY not in str(stopped.value) + "".join(capsys.readouterr())


def test_dead_endpoint_is_given_up(file):
    with JudgeServer(honest) as server:
        pass  # the port is closed again
    with pytest.raises(UserError, match="10 requests in a row failed.*ConnectError"):
        run(file, server, "retries=1")


def test_key_is_sent_and_never_stored(file, capsys, monkeypatch):
    def echoes(request, number):
        return Reply(f"{KEY}", 500) if number == 1 else Reply("VERDICT: A") if number > 3 else Reply(KEY, 400)

    with JudgeServer(echoes) as server:
        run(file, server, "concurrency=1")
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {f"Bearer {KEY}"}
    for path in file.parent.glob("judge*"):
        assert KEY not in path.read_text()
    assert KEY not in "".join(capsys.readouterr())
    monkeypatch.delenv("OPENAI_API_KEY")
    with JudgeServer(honest) as server:
        run(file, server, "model=other", "max_pairs=1")  # a local endpoint needs no key
        assert all("Authorization" not in headers for _, headers, _ in server.requests)
    with pytest.raises(UserError, match="OPENAI_API_KEY is empty"):
        judge.main([str(file), "base_url=https://judge.example/v1", "model=m", "yes=true"])
    with pytest.raises(UserError, match="user or password"):
        judge.main([str(file), "base_url=https://me:pw@judge.example/v1", "model=m", "yes=true"])


def test_concurrency_is_limited(file):
    with JudgeServer(lambda request, number: (time.sleep(0.03), honest(request))[1]) as server:
        run(file, server, "concurrency=3")
    assert server.most_at_once == 3


def test_interrupted_run_resumes(file):
    """Ctrl-C in a real process while requests hang; then nothing that was answered is asked again."""

    def hangs(request, number):
        return honest(request) if number <= 14 else Reply("VERDICT: A", delay=20)

    words = [
        sys.executable,
        EVALS / "judge.py",
        file,
        "model=stub",
        "yes=true",
        "concurrency=4",
        "timeout=60",
    ]
    with JudgeServer(hangs) as server:
        process = subprocess.Popen(
            [*words, f"base_url={server.base_url}"],
            env=os.environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # a background job of a shell ignores it, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while len(server.requests) < 16:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        process.communicate(timeout=30)
        assert process.returncode != 0 and time.monotonic() - start < 10
    verdicts = file.parent / "judge_tuned_vs_base.jsonl"
    kept = len(verdicts.read_text().splitlines())
    assert 10 <= kept <= 14
    with verdicts.open("a") as cut:
        cut.write('{"key": "abc", "verd')
    with JudgeServer(honest) as server:
        assert counts(run(file, server)) == (12, 3, 5)
        assert len(server.requests) == 40 - kept
        assert counts(run(file, server)) == (12, 3, 5)
        assert len(server.requests) == 40 - kept  # all there
        run(file, server, "model=other")
        assert len(server.requests) == 80 - kept  # another judge has its own verdicts
    assert all(json.loads(line) for line in verdicts.read_text().splitlines())


def test_estimate_and_confirmation(file, capsys, monkeypatch):
    with JudgeServer(honest) as server:
        words = [str(file), f"base_url={server.base_url}", "model=stub", "price_in=1000", "price_out=2000"]
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(UserError, match="yes=true"):
            judge.main(words)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("builtins.input", lambda prompt: "n")
        with pytest.raises(UserError, match="Nothing was sent"):
            judge.main(words)
        assert server.requests == []
        monkeypatch.setattr("builtins.input", lambda prompt: "y")
        assert judge.main(words) == 0
    printed = capsys.readouterr().out
    assert "40 requests" in printed
    tokens_in = int(printed.split("about ")[1].split(" tokens")[0].replace(",", ""))
    messages = [body["messages"] for body, _, _ in server.requests]
    texts = sum(len(json.dumps(first)) + len(second["content"][-1]["text"]) for first, second in messages)
    assert tokens_in - 38 * 255 == pytest.approx(texts / 4, rel=0.1)  # 38 of 40 requests show an image of one tile
    assert f"About {(tokens_in * 1000 + 8000 * 2000) / 1e6:.2f} US dollars" in printed


def test_image_tokens(tmp_path):
    for size, tokens in {(1024, 1024): 765, (2048, 4096): 1105, (512, 512): 255, (40, 30): 255}.items():
        Image.new("RGB", size).save(tmp_path / "x.png")  # the first two are OpenAI's own examples
        assert judging.image_tokens(tmp_path / "x.png") == tokens


def test_request_fields(file):
    with JudgeServer(honest) as server:
        fields = ("request.max_tokens=null", "request.max_completion_tokens=99", "request.temperature=1")
        run(file, server, "max_pairs=1", *fields)
    body = server.requests[0][0]
    assert body["max_completion_tokens"] == 99 and body["temperature"] == 1 and "max_tokens" not in body


def test_own_criteria(file, tmp_path):
    (tmp_path / "mine.txt").write_text("Prefer the answer about {cats}.")
    with JudgeServer(honest) as server:
        run(file, server, "max_pairs=2", f"criteria={tmp_path / 'mine.txt'}")
    assert all("about {cats}." in body["messages"][0]["content"] for body, _, _ in server.requests)


def test_bad_words_and_files(file):
    for words, error, message in (
        ([], UsageError, "The first word must be the input: generations.jsonl"),
        ([str(file), "base_url=http://x/v1"], UsageError, "^model= is missing"),
        ([str(file), "base_url=http://x/v1", "model=m", "yess=true"], UsageError, "Unknown key `yess`.*`yes`"),
        ([str(file), "base_url=x", "model=m", "yes=true"], UserError, "http"),
        ([str(file), "base_url=http://x/v1", "model=m", "a=tuned", "b=nobody"], UserError, "out of: base, tuned"),
        ([str(file) + "x", "base_url=http://x/v1", "model=m"], UsageError, "There is no .*generations.jsonlx"),
    ):
        with pytest.raises(error, match=message):
            judge.main(words)
    with pytest.raises(UserError, match="generate.py"):
        answer_pairs.read_answer_pairs(file.with_name("nothing.jsonl"), None, None)


def test_images_outside_the_folder_are_not_sent(file):
    line = json.loads(file.read_text().splitlines()[0])
    line["image"] = {"path": "../../secret.png"}
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match="leaves the folder"):
        answer_pairs.read_answer_pairs(file, None, None)


VERDICTS = {
    "Because.\nVERDICT: A": "A",
    "Because.\nVerdict: b.": "B",
    "**VERDICT: TIE**": "tie",
    "Verdict: **Answer B**": "B",
    "VERDICT: [A]\n\n": "A",
    "Final verdict is: a tie": "tie",
    "VERDICT: A\nNo, wait.\nVERDICT: B": "B",
    'So: {"reason": "it {is} true", "verdict": "A"}': "A",
    '```json\n{"verdict": "tie", "reason": "VERDICT: A"}\n```': "tie",
    '{"winner": "Answer B"}': "B",
    "my choice [[C]]": "tie",
    "[[A]] is better": "A",
    "B": "B",
    "Long reasons.\n\nTie": "tie",
    "<think>VERDICT: A</think>VERDICT: B": "B",
    "<think>VERDICT: A, but then": None,
    "VERDICT: a better answer would say more": None,
    "A cat is in the image": None,
    "Both are fine": None,
    "VERDICT: C or A?": None,
    "VERDICT:": None,
    '{"verdict": 3}': None,
    "": None,
}


@pytest.mark.parametrize("text", VERDICTS)
def test_verdicts(text):
    assert parse_verdict(text) == VERDICTS[text]


@given(st.text(), st.sampled_from(["A", "B", "TIE"]))
def test_a_last_line_as_asked_is_always_read(reasons, verdict):
    reasons = reasons.replace("<", "").replace("{", "")
    assert parse_verdict(f"{reasons}\nVERDICT: {verdict}") == {"TIE": "tie"}.get(verdict, verdict)


@given(st.lists(st.sampled_from(["a", "b", "tie"])))
def test_tally_counts(outcomes):
    counted = answer_pairs.tally(outcomes)
    assert counted["n"] == counted["win"] + counted["tie"] + counted["loss"] == len(outcomes)
    mirrored = answer_pairs.tally([{"a": "b", "b": "a"}.get(outcome, outcome) for outcome in outcomes])
    assert (mirrored["win"], mirrored["loss"]) == (counted["loss"], counted["win"])
    assert mirrored["sign_test_p"] == counted["sign_test_p"]
