"""plan/hub.py against a cache folder and a server of the test's own; no network is asked."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from llava_orpo.plan import hub


@pytest.fixture
def served(monkeypatch, tmp_path):
    """A Hub that knows `some/model` and `some/data`, and an empty cache."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.split("?")[0] in ("/api/models/some/model", "/api/datasets/some/data")
            body = json.dumps({"id": "some/thing", "siblings": []} if known else {"error": "Repository not found"})
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield tmp_path
    server.shutdown()


def test_the_hub_is_asked_once_and_its_answer_told_apart(served):
    assert hub.find("some/model") == hub.find("some/data", "dataset") == hub.ONLINE
    assert hub.find("other/model") == hub.ABSENT
    assert hub.find("not a/valid/name") == hub.ABSENT


def test_what_is_cached_needs_no_hub(served, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.find("some/data", "dataset") == hub.UNREACHED
    folder = served / "datasets--some--data" / "snapshots" / "1" / "data"
    folder.mkdir(parents=True)
    assert hub.find("some/data", "dataset") == hub.UNREACHED, "an empty snapshot"
    (folder / "train.parquet").touch()
    assert hub.find("some/data", "dataset") == hub.CACHED


def test_offline_nothing_is_asked(served, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.find("some/model") == hub.UNREACHED
