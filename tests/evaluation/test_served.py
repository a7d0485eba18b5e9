"""evals/generate.py with base_url=: the answers of a server, here transformers behind a stub that has vLLM's habits."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import ask
import generate
import pytest
from PIL import Image

from helpers.judge_server import JudgeServer, Reply
from helpers.recipes import photo_rows, random_model, write_recipe, write_rows
from helpers.serving import free_port
from llava_orpo.data import images
from llava_orpo.errors import UsageError, UserError
from llava_orpo.evaluation import served, session
from llava_orpo.serving import client

TOKENS = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Back-off in milliseconds."""
    original = client.ChatClient.__init__
    monkeypatch.setattr(client.ChatClient, "__init__", lambda self, *args: original(self, *args, first_wait=0.002))


@pytest.fixture(scope="module")
def reference():
    return ask.load(str(random_model()), "float32")


def file(image: Image.Image, kind: str, **options) -> dict:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return {"bytes": out.getvalue(), "path": None}


@pytest.fixture(scope="module")
def rows():
    """Four plain photos, one without an image, one with an alpha channel and one that EXIF turns."""
    made = photo_rows(6, 1, aspect="mixed")
    photo = Image.open(io.BytesIO(made[3]["image"]["bytes"])).convert("RGB")
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    made[3]["image"] = file(photo, "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    made[4]["image"] = file(Image.open(io.BytesIO(made[4]["image"]["bytes"])), "JPEG", exif=exif, quality=95)
    made[5]["image"] = None
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("served")
    write_rows(folder, rows)
    write_recipe(folder, {"eval_dataset": "rows", "allow_text_only": True})
    return folder


def run(folder: Path, out: str, *words: str) -> list[dict]:
    code = generate.main(
        [str(folder / "recipe.yaml"), f"output_dir={folder / out}", f"max_new_tokens={TOKENS}", *words]
    )
    lines = (folder / out / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    assert code == 0, code
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def local(folder):
    return run(folder, "local", "models=base")


@pytest.fixture(scope="module")
def opened():
    """Sessions by their recipe: opening one takes seconds."""
    return {}


@pytest.fixture
def no_weights(monkeypatch, opened):
    """Loading a model fails; the sessions without one are opened once."""

    def fail(*args, **kwargs):
        raise AssertionError("the model's weights are not needed")

    monkeypatch.setattr("llamafactory.model.load_model", fail)
    original = session.open_session

    def open_session(recipe, output_dir, **needs):
        key = json.dumps([{**recipe, "output_dir": "", "seed": 0}, needs], sort_keys=True, default=str)
        opened[key] = opened.get(key) or original(recipe, output_dir, **needs)
        return opened[key]

    monkeypatch.setattr(session, "open_session", open_session)


def asked(request: dict) -> tuple[str, bytes | None]:
    """(question, image file) of a request."""
    (message,) = request["messages"]
    if isinstance(message["content"], str):
        return message["content"], None
    image, text = message["content"]
    return text["text"], base64.b64decode(image["image_url"]["url"].partition(",")[2])


said: dict[tuple, str] = {}  # what was answered already


class Transformers:
    """Answers as transformers does, and counts prompt tokens as vLLM does: BOS only for add_special_tokens.

    Like vLLM it turns pictures as EXIF says and lays transparent pixels on white.
    """

    def __init__(self, reference, has_bos: bool = False, images: bool = True):
        self.reference, self.has_bos, self.images = reference, has_bos, images

    def __call__(self, request: dict, number: int) -> Reply:
        question, data = asked(request)
        picture = self.picture(data) if data and self.images else None
        model, processor = self.reference
        text = f"[INST] {'<image>' + chr(10) if picture else ''}{question} [/INST]"
        count = processor(images=picture, text=text, return_tensors="pt")["input_ids"].shape[1]
        count += self.has_bos + bool(request.get("add_special_tokens")) - 1
        key = question, picture and picture.tobytes(), request["max_tokens"]
        if key not in said:
            said[key] = ask.answer(model, processor, picture, question, request["max_tokens"])
        answer = said[key]
        body = {"choices": [{"message": {"content": f" {answer}"}}], "usage": {"prompt_tokens": count}}
        return Reply(raw=json.dumps(body))

    @staticmethod
    def picture(data: bytes) -> Image.Image:
        from PIL import ImageOps

        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if picture.mode == "RGBA":
            white = Image.new("RGB", picture.size, (255, 255, 255))
            white.paste(picture, mask=picture.split()[3])
            return white
        return picture.convert("RGB")


@pytest.mark.usefixtures("no_weights")
def test_writes_what_the_local_path_writes(folder, rows, local, reference, capsys):
    with JudgeServer(Transformers(reference), ["tiny"]) as server:
        lines = run(folder, "out", f"base_url={server.base_url}", "concurrency=3")
    for line in lines:
        line["answers"] = {"base": line["answers"].pop("tiny")}
    assert lines == local and len({line["answers"]["base"] for line in lines}) > 3
    assert {path.name: path.read_bytes() for path in (folder / "out" / "images").iterdir()} == {
        path.name: path.read_bytes() for path in (folder / "local" / "images").iterdir()
    }
    assert "warning" not in capsys.readouterr().err
    assert server.most_at_once <= 3
    probes, asked_for = server.requests[:2], [body for body, _, _ in server.requests[2:]]
    assert [body.get("add_special_tokens") for body, _, _ in probes] == [None, True]
    assert len(asked_for) == 6 and all(body["add_special_tokens"] is True for body in asked_for)
    assert all(body["temperature"] == 0 and "seed" not in body and body["model"] == "tiny" for body in asked_for)
    sent = dict(map(asked, asked_for))
    for row in rows[:3]:
        assert sent[row["question"]] == row["image"]["bytes"], "a plain image is sent as it is"
    for row in rows[3:5]:
        shown = Image.open(io.BytesIO(sent[row["question"]]))
        assert shown.mode == "RGB" and shown.getexif().get(0x0112, 1) == 1
        assert shown.tobytes() == images.decode_rgb(row["image"]["bytes"]).tobytes(), "the picture of the training"


@pytest.mark.usefixtures("no_weights")
def test_several_models_and_seeds(folder, reference):
    with JudgeServer(Transformers(reference, has_bos=True), ["base", "orpo"]) as server:
        words = ("models=base,orpo", "temperature=0.7", "top_p=0.9", "max_prompts=3", "request.top_k=5")
        lines = run(folder, "two", f"base_url={server.base_url}", *words, "request.max_tokens=4")
        assert [list(line["answers"]) for line in lines] == [["base", "orpo"]] * 3
        bodies = [body for body, _, _ in server.requests if "seed" in body]
        assert len(bodies) == 6 and all("add_special_tokens" not in body for body in bodies)
        kept = ("temperature", "top_p", "top_k", "max_tokens")
        assert {tuple(body[key] for key in kept) for body in bodies} == {(0.7, 0.9, 5, 4)}
        seeds = {name: {asked(b)[0]: b["seed"] for b in bodies if b["model"] == name} for name in ("base", "orpo")}
        assert seeds["base"] == seeds["orpo"] and len(set(seeds["base"].values())) == 3
        assert all(0 <= seed < 2**31 for seed in seeds["base"].values())
        server.requests.clear()
        run(folder, "seed", f"base_url={server.base_url}", "model=base", "temperature=0.7", "seed=8", "max_prompts=3")
        others = {asked(body)[0]: body["seed"] for body, _, _ in server.requests if "seed" in body}
        assert not set(others.values()) & set(seeds["base"].values())


@pytest.mark.usefixtures("no_weights")
def test_resumes_after_a_server_that_failed(folder, local, reference, capsys):
    answers, broken = Transformers(reference), True

    def behave(request, number):
        return Reply("out of memory", 500) if broken and number > 5 else answers(request, number)

    words = ("model=base", "concurrency=1", "retries=0")
    with JudgeServer(behave) as server:
        with pytest.raises(AssertionError, match="1"):
            run(folder, "half", f"base_url={server.base_url}", *words)
        assert "3 prompts got no answer" in capsys.readouterr().err
        half = (folder / "half" / "generations.jsonl").read_text().splitlines()
        assert len(half) == 3
        server.requests.clear()
        broken = False
        assert run(folder, "half", f"base_url={server.base_url}", *words) == local
        assert len(server.requests) == 2 + 3, "how the prompt begins is asked again, and what is missing"
        server.requests.clear()
        assert run(folder, "half", f"base_url={server.base_url}", *words) == local
        assert server.requests == []
        run(folder, "half", f"base_url={server.base_url}", "max_new_tokens=5", *words)
        assert len(server.requests) == 2 + 6, "other settings: all again"


@pytest.mark.usefixtures("no_weights")
def test_a_server_that_stops_in_the_middle_ends_in_one_line(folder, local, reference, monkeypatch):
    monkeypatch.setattr("llava_orpo.serving.asking.GIVE_UP", 2)
    answers = Transformers(reference)
    with JudgeServer(lambda r, n: Reply("gone", 503) if n > 4 else answers(r, n)) as server:
        with pytest.raises(
            UserError, match=r"^\S+ does not answer: 2 requests in a row failed; .* are kept; "
        ) as error:
            run(folder, "stops", f"base_url={server.base_url}", "model=base", "concurrency=1", "retries=1")
        assert "\n" not in str(error.value)
    (saved,) = (folder / "stops").glob(".answers_*.jsonl")
    assert len(saved.read_text().splitlines()) == 1 + 2


@pytest.mark.usefixtures("no_weights")
def test_prompts_of_another_length_are_told(folder, reference, capsys):
    class Longer(Transformers):
        def __call__(self, request, number):
            reply = super().__call__({**request, "add_special_tokens": True}, number)
            body = json.loads(reply.body)
            body["usage"]["prompt_tokens"] += 7
            return Reply(raw=json.dumps(body))

    with JudgeServer(Longer(reference)) as server:
        run(folder, "longer", f"base_url={server.base_url}", "model=base")
        told = capsys.readouterr().err
        assert "warning: base: 6 of 6 prompts have another number of tokens on the server" in told
        run(folder, "longer", f"base_url={server.base_url}", "model=base")
        assert "warning: base: 6 of 6" in capsys.readouterr().err, "also of saved answers"


@pytest.mark.usefixtures("no_weights")
def test_servers_that_see_no_image_are_refused(folder, reference):
    blind = Transformers(reference, images=False)

    def text_only(request, number):
        return Reply("no multimodal model", 400) if asked(request)[1] else blind(request, number)

    for behave, words in (
        (blind, "does not see the image: its prompt has"),
        (text_only, "answers text but refuses an image"),
    ):
        with JudgeServer(behave) as server, pytest.raises(UserError, match=words):
            run(folder, "blind", f"base_url={server.base_url}", "model=base")


def test_bad_words_and_servers(folder, reference):
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    with JudgeServer(Transformers(reference), ["base", "orpo"]) as server:
        here = f"base_url={server.base_url}"
        for words, error, message in (
            (["model=base"], UsageError, "base_url= is missing"),
            (["concurrency=3"], UsageError, "base_url= is missing"),
            ([here, "model=base", "models=base"], UsageError, "model= and models="),
            ([here], UserError, "serves base, orpo: name one"),
            ([here, "model=outputs/orpo"], UserError, "serves base, orpo, not outputs/orpo: an adapter needs"),
            ([here, "models=base,base"], UserError, "name every model once"),
            ([f"base_url={nobody}", "model=base"], UserError, "does not answer: no answer after 2 tries"),
            (["base_url=ftp://x", "model=base"], UserError, "must be an http"),
            ([f"base_url={server.base_url}/v2"], UserError, "serves no list of models: name one"),
            ([f"base_url={server.base_url}/v2", "model=base"], UserError, "does not answer: status 404"),
        ):
            with pytest.raises(error, match=message):
                run(folder, "bad", *words)


def test_a_picture_that_all_readers_read_alike_is_not_written_anew():
    grey = file(Image.linear_gradient("L"), "PNG")["bytes"]
    assert served.exact_data_url(grey) == client.data_url(grey)
    deep = file(Image.new("I;16", (8, 8), 40_000), "PNG")["bytes"]
    shown = Image.open(io.BytesIO(base64.b64decode(served.exact_data_url(deep).partition(",")[2])))
    assert shown.mode == "RGB" and shown.getpixel((0, 0)) == (156, 156, 156), "the high byte, as training reads it"
    with pytest.raises(images.ImageError):
        served.exact_data_url(grey[: len(grey) // 2])
