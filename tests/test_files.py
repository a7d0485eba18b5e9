"""files.py: a reader never sees half a file, and a bad line or path is named."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_orpo import files
from llava_orpo.errors import UserError

OLD, NEW = "the old content\n", "the new content, naïve 漢字\n"
# Writes two contents in turn until it is killed.
WRITER = """
import sys
from llava_orpo.files import write_atomic
while True:
    for letter in "ab":
        write_atomic(sys.argv[1], letter * int(sys.argv[2]))
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- write_atomic ---------------------------------------------------------------------------------------------


def test_text_and_bytes_are_written_whole(tmp_path):
    path = tmp_path / "file.txt"
    files.write_atomic(path, OLD)
    files.write_atomic(str(path), NEW)
    assert path.read_bytes() == NEW.encode("utf-8")
    files.write_atomic(path, b"\x00\r\n\xff")
    assert path.read_bytes() == b"\x00\r\n\xff"
    assert names(tmp_path) == ["file.txt"]


class FullDisk(io.FileIO):
    """A file that takes the first few bytes and no more."""

    def write(self, data):
        super().write(bytes(data)[:5])
        raise OSError(28, "No space left on device")


def no_rename(*_):
    raise PermissionError("no renaming here")


def no_sync(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    ("what", "replacement", "error"),
    [
        ("builtins.open", lambda path, mode: FullDisk(path, mode), OSError),
        ("os.fsync", no_sync, KeyboardInterrupt),
        ("os.replace", no_rename, PermissionError),
    ],
)
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(
    tmp_path, monkeypatch, what, replacement, error, there
):
    path = tmp_path / "file.txt"
    if there:
        files.write_atomic(path, OLD)
    with monkeypatch.context() as patched:
        patched.setattr(what, replacement)
        with pytest.raises(error):
            files.write_atomic(path, NEW)
    assert names(tmp_path) == (["file.txt"] if there else [])
    assert not there or path.read_text(encoding="utf-8") == OLD


@pytest.mark.parametrize("content", [{"loss": math.nan}, {"loss": object()}, {"loss": -math.inf}, {"name": "\ud83d"}])
def test_content_that_is_no_json_leaves_the_old_file(tmp_path, content):
    path = tmp_path / "file.json"
    files.write_json(path, {"loss": 0.5})
    before = path.read_bytes()
    with pytest.raises((ValueError, TypeError)):
        files.write_json(path, content)
    with pytest.raises((ValueError, TypeError)):
        files.write_jsonl(path, [{"loss": 0.5}, content])
    assert path.read_bytes() == before and names(tmp_path) == ["file.json"]


def test_a_missing_folder_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_atomic(tmp_path / "none" / "file.txt", NEW)
    assert names(tmp_path) == []


def test_a_reader_and_a_kill_find_one_content_whole(tmp_path):
    """A process replaces a file without pause; another one reads it, then kills the writer in the middle."""
    path, size = tmp_path / "file.txt", 300_000
    files.write_atomic(path, "a" * size)
    contents = {letter * size for letter in "ab"}
    seen: set[str] = set()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(size)])
    try:
        deadline = threading.Event()
        timer = threading.Timer(30, deadline.set)
        timer.start()
        reads = 0
        while not deadline.is_set() and (reads < 300 or len(seen) < 2):
            seen.add(path.read_text())
            reads += 1
        timer.cancel()
        assert writer.poll() is None, "the writer ended by itself"
    finally:
        writer.kill()
        writer.wait()
    assert seen == contents
    assert path.read_text() in contents


# --- JSON lines -----------------------------------------------------------------------------------------------


def test_lines_survive_the_file_with_their_numbers(tmp_path):
    path = tmp_path / "file.jsonl"
    records = [{"text": "a\u2028b\x85c\r\n\x0c"}, [1, 2.5, None], "漢字", {}]
    files.write_jsonl(path, iter(records))
    assert path.read_bytes().count(b"\n") == len(records)
    assert files.read_jsonl(path, "") == [(f"{path}:{i}", record) for i, record in enumerate(records, start=1)]
    files.write_jsonl(path, [])
    assert path.read_bytes() == b"" and files.read_jsonl(path, "") == []


def test_empty_lines_count_and_the_last_needs_no_newline(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'\n{"a": 1}\r\n\n{"b": 2}')
    assert files.read_jsonl(path, "") == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"b": 2})]


@pytest.mark.parametrize("bad", ['{"pair_id": "cut o', "not json", "{} {}", " ", "[1, 2"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_line_that_is_not_json_is_named(tmp_path, bad, end):
    path = tmp_path / "file.jsonl"
    path.write_text(f'{{"a": 1}}\n\n{bad}{end}')
    with pytest.raises(UserError) as caught:
        files.read_jsonl(path, "Delete it or make it again.")
    message = str(caught.value)
    assert message.startswith(f"{path}:3: not JSON (") and message.endswith("). Delete it or make it again.")


def test_a_line_holds_one_record_and_no_nan():
    assert files.json_line({"text": "a\nb", "é": 1}) == '{"text": "a\\nb", "é": 1}\n'
    with pytest.raises(ValueError):
        files.json_line({"loss": math.nan})


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (b"", b""),
        (b"cut", b""),
        (b"\n", b"\n"),
        (b"one\n", b"one\n"),
        (b"one\ntwo\n", b"one\ntwo\n"),
        (b"one\ntwo\ncu", b"one\ntwo\n"),
        (b"one\r\ncut\r", b"one\r\n"),
        ("é\n漢".encode()[:-1], "é\n".encode()),  # cut in the middle of a character
    ],
)
def test_a_line_that_was_cut_off_is_dropped(data, whole):
    assert files.whole_lines(data) == whole


@given(st.lists(st.dictionaries(st.text(), st.text())), st.integers(min_value=0))
def test_any_cut_leaves_the_lines_before_it(records, cut):
    data = "".join(map(files.json_line, records)).encode("utf-8")
    left = files.whole_lines(data[: cut % (len(data) + 1)]).decode("utf-8")
    found = [json.loads(line) for line in left.split("\n") if line]
    assert found == records[: len(found)]
    assert len(found) == data[: cut % (len(data) + 1)].count(b"\n")


# --- paths ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """run/images/a.png, and secret.png beside run."""
    made = tmp_path / "run"
    (made / "images").mkdir(parents=True)
    (made / "images" / "a.png").write_text("a")
    (tmp_path / "secret.png").write_text("secret")
    return made


@pytest.mark.parametrize("name", ["images/a.png", "./images/../images/a.png", "images/none.png", "..a.png", "a..b"])
def test_a_path_below_the_folder_is_taken(folder, name):
    found = files.inside(folder, name, "here")
    assert found == (folder / name).resolve() and found.is_relative_to(folder.resolve())


@pytest.mark.parametrize(
    "name", ["../secret.png", "..", "images/../../secret.png", "/etc/hostname", "images/../../run2/a.png", "../run2"]
)
def test_a_path_out_of_the_folder_is_refused(folder, name):
    (folder.parent / "run2").mkdir()  # its name begins like that of the folder
    with pytest.raises(UserError, match="^file.jsonl:3: image path .* leaves the folder"):
        files.inside(folder, name, "file.jsonl:3")


def test_an_absolute_path_into_the_folder_is_taken(folder):
    assert files.inside(folder, str(folder / "images" / "a.png"), "here") == (folder / "images" / "a.png").resolve()


def test_symbolic_links_are_followed(folder, monkeypatch):
    (folder / "file.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to("..")
    (folder / "in.png").symlink_to("images/a.png")
    for name in ("file.png", "up/secret.png", "up"):
        with pytest.raises(UserError, match="leaves the folder"):
            files.inside(folder, name, "here")
    assert files.inside(folder, "in.png", "here").read_text() == "a"
    link = folder.parent / "link"  # the folder itself may be a link, or relative
    link.symlink_to(folder)
    assert files.inside(link, "images/a.png", "here").read_text() == "a"
    with pytest.raises(UserError, match="leaves the folder"):
        files.inside(link, "../secret.png", "here")
    monkeypatch.chdir(folder.parent)
    assert files.inside(Path("run"), "images/a.png", "here").read_text() == "a"


# --- evenly ---------------------------------------------------------------------------------------------------


@given(st.integers(min_value=0, max_value=300), st.integers(min_value=0, max_value=400))
def test_evenly_takes_as_many_as_asked_at_equal_distances(n, count):
    taken = files.evenly(range(n), count)
    assert len(taken) == min(n, count)
    assert taken == sorted(set(taken)) and set(taken) <= set(range(n))
    if taken:
        ends = [*taken, n]
        gaps = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        assert taken[0] == 0
        assert {n // len(taken)} <= set(gaps) <= {n // len(taken), -(-n // len(taken))}


def test_evenly_of_few_is_all_of_them():
    assert files.evenly("abc", 3) == files.evenly("abc", 10) == ["a", "b", "c"]
    assert files.evenly("abcdef", 2) == ["a", "d"] and files.evenly("abc", 0) == files.evenly("", 3) == []
