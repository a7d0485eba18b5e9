"""The demo with base_url=: streams of a server, its scores, and what it does not give; in the browser against vLLM."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest

import demo
from helpers.local_server import JsonHandler, LocalServer
from helpers.serving import picture, png
from llava_orpo.demo import models, page, served
from llava_orpo.errors import UsageError, UserError
from llava_orpo.serving.client import Server

QUESTION = "What is in the picture?"
TOKENS = 12


class StreamServer(LocalServer):
    """OpenAI's chat endpoint on 127.0.0.1: `answer(body)` gives a whole answer's body, or the pieces of a stream.

    pause: seconds between two pieces. closed: how many streams a client left before their end; most: requests at once.
    """

    def __init__(self, answer: Callable[[dict], dict | list], names=("base", "orpo"), pause: float = 0.0):
        self.closed = self.now = self.most = 0
        self.bodies: list[dict] = []
        outer, lock = self, threading.Lock()

        class Handler(JsonHandler):
            def do_GET(self):
                self.send(200, {"data": [{"id": name} for name in names]})

            def do_POST(self):
                body = self.body()
                with lock:
                    outer.bodies.append(body)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    found = answer(body)
                    if isinstance(found, dict):
                        self.send(400 if "error" in found else 200, found)
                        return
                    self.send_response(200)
                    self.end_headers()
                    for piece in found:
                        self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
                        self.wfile.flush()
                        time.sleep(pause)
                    self.wfile.write(b"data: [DONE]\n\n")
                except (BrokenPipeError, ConnectionResetError):
                    outer.closed += 1
                finally:
                    with lock:
                        outer.now -= 1

        super().__init__(Handler)


def pieces(*texts: str, whole: bool = True) -> list[dict]:
    found = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    end = [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": {}}]
    return found + (end if whole else [])


def completion(tokens: int | None = None, **more) -> dict:
    usage = {"usage": {"prompt_tokens": tokens}} if tokens else {}
    return {"choices": [{"message": {"content": "x"}}], **usage, **more}


def load(keys, folder, running: StreamServer):
    asked = Server(running.base_url, timeout=20.0, retries=0)
    return served.load_served(keys, asked, "base", "orpo", str(folder / "served"))


def test_answers_stream_as_they_are_written(keys, folder, monkeypatch):
    monkeypatch.setattr("llamafactory.model.load_model", None)  # no weights

    def answer(body):
        return pieces(" A ", body["model"], " boat.", "") if body.get("stream") else completion()

    with StreamServer(answer, pause=0.1) as running:
        (base, aligned), warned = load(keys, folder, running)
        assert warned == [] and (base.label, aligned.label) == ("base", "orpo")
        image = png(picture(90, 60))
        seen = [(time.monotonic(), text) for text in aligned.stream_answer(image, QUESTION, TOKENS)]
        assert [text for _, text in seen] == ["A", "A orpo", "A orpo boat.", "A orpo boat."]
        assert seen[2][0] - seen[0][0] > 0.15, "each piece is shown when it comes"
        body = running.bodies[-1]
        assert (body["max_tokens"], body["temperature"], body["model"]) == (TOKENS, 0, "orpo")
        assert body["messages"] == served.messages(QUESTION, served.exact_data_url(image))
        threads = [threading.Thread(target=lambda: list(base.stream_answer(image, QUESTION, TOKENS))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert running.most == 5, "five requests at once"
        blocks = page.build((base, aligned), [], TOKENS)
        assert {fn.concurrency_limit for fn in blocks.fns.values() if fn.concurrency_id == "models"} == {16}


def test_a_reader_who_leaves_ends_the_request(keys, folder):
    def answer(body):
        return pieces(*["word "] * 2000) if body.get("stream") else completion()

    with StreamServer(answer, pause=0.02) as running:
        (base, _), _ = load(keys, folder, running)
        stream = base.stream_answer(png(picture(50, 50)), QUESTION, 4000)
        next(stream)
        stream.close()
        deadline = time.monotonic() + 10
        while not running.closed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert running.closed == 1


@pytest.mark.parametrize(
    "stream, message",
    [
        (pieces("A boat", whole=False), "no whole answer: the stream ended before"),
        ([{"error": {"message": "out of memory"}}], "out of memory"),
        ({"error": {"message": "maximum context length"}}, "status 400: .*maximum context length"),
    ],
)
def test_what_the_server_breaks_is_a_message(keys, folder, stream, message):
    with StreamServer(lambda body: stream if body.get("stream") else completion()) as running:
        (base, _), _ = load(keys, folder, running)
        with pytest.raises(ValueError, match=message):
            list(base.stream_answer(png(picture(50, 50)), QUESTION, TOKENS))


def test_scores_are_the_local_ones(keys, folder, candidates):
    """The stub scores with the local model what it is asked to score, as vLLM's `prompt_logprobs`."""
    import torch

    image, a, b = png(picture(120, 80)), "A red boat.", "Two cats on a bench."
    base = candidates[0]
    row = models.encode_answers(base.session, image, QUESTION, a, b)
    prompt, picture_ = models.encode(base.session, image, QUESTION)

    @torch.no_grad()
    def scored(body):
        answer = body["messages"][1]["content"]
        ids = [*prompt, *row["chosen_ids" if answer == a else "rejected_ids"]]
        pixels = base.session.processor.image_processor([picture_], return_tensors="pt")
        with base.chosen():
            logits = base.session.model(input_ids=torch.tensor([ids]), **pixels).logits[0].double()
        logps = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        entries = [None, *({str(i): {"logprob": p}} for i, p in zip(ids[1:], logps, strict=True))]
        return completion(len(ids), prompt_logprobs=entries, prompt_token_ids=ids)

    def answer(body):
        if "prompt_logprobs" not in body:  # BOS is there only if it is asked for
            return completion(len(first) if body.get("add_special_tokens") else len(first) - 1)
        assert body["add_special_tokens"] is True and body["add_generation_prompt"] is False
        return spoiled[-1](scored(body))

    first, _ = models.encode(base.session, png(picture(64, 48)), served.FIRST_QUESTION)
    spoiled = [dict]
    with StreamServer(answer) as running:
        (candidate, _), warned = load(keys, folder, running)
        assert warned == []
        expected, found = base.compare(image, QUESTION, a, b), candidate.compare(image, QUESTION, a, b)
        assert found.margin == pytest.approx(expected.margin, abs=2e-5) and found.margin != 0
        for theirs, ours in ((found.a, expected.a), (found.b, expected.b)):
            assert theirs.length == ours.length and theirs.logp == pytest.approx(ours.logp, abs=2e-4)
            assert [t[0] for t in theirs.tokens] == [t[0] for t in ours.tokens]
        with pytest.raises(ValueError, match="same text"):
            candidate.compare(image, QUESTION, a, a)

        spoiled.append(lambda body: {**body, "prompt_token_ids": [7, *body["prompt_token_ids"][1:]]})
        with pytest.raises(ValueError, match="or others: its scores would be of another text"):
            candidate.compare(image, QUESTION, a, b)

        spoiled.append(lambda body: completion(9))
        with pytest.raises(ValueError, match="does not give the log-probs of a prompt"):
            candidate.compare(image, QUESTION, a, b)

        spoiled.append(lambda body: {"error": {"message": "unknown field prompt_logprobs"}})
        with pytest.raises(ValueError, match="does not give the log-probs .*unknown field"):
            candidate.compare(image, QUESTION, a, b)


def test_other_prompts_and_wrong_names_are_told(keys, folder):
    with StreamServer(lambda body: completion(9 + len(body["messages"][0]["content"]))) as running:
        assert ["in training has 11 on the server" in text for text in load(keys, folder, running)[1]] == [True, True]
    with StreamServer(lambda body: completion(), names=["base"]) as running, pytest.raises(UserError, match="not orpo"):
        load(keys, folder, running)
    with pytest.raises(UserError, match="does not answer"):
        load(keys, folder, running)


def test_keys_that_do_not_go_together(folder):
    here = str(folder / "recipe.yaml")
    for words, message in (
        ([], "aligned= is missing"),
        (["base_url=http://127.0.0.1:1/v1", "base_model=a"], "aligned_model= is missing"),
        (["base_url=http://127.0.0.1:1/v1", "base_model=a", "aligned_model=b", "aligned=x"], "aligned= and base_url="),
        (["aligned=x", "concurrency=3"], "concurrency= is about a server"),
    ):
        with pytest.raises(UsageError, match=message):
            demo.main([here, *words])
