"""What a command's output says of its progress, and how that is shown: on a terminal, in a log, after Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tqdm import tqdm

from helpers.paths import ROOT
from llava_orpo import progress, step_list
from llava_orpo.progress import Follower, Output, Progress, parse_bar, parse_trainer_log

# A child with a bar, words and a last line, as training has them.
CHILD = """
import sys, time
from tqdm import tqdm
print("loads the model")
with tqdm(total=20, desc="sight", unit="step") as bar:
    for i in range(20):
        time.sleep(0.05)
        bar.set_postfix(loss=f"{1 / (i + 1):.3f}", refresh=False)
        bar.update()
print("wrote it all")
"""


@pytest.fixture
def child(tmp_path):
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return [sys.executable, str(path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "demo train:  12%|█▏   | 769/6400 [00:01<00:13, 419.80pair/s]",
            Progress("769", "6400", "pair", "demo train", "", "0:13", 769 / 6400),
        ),
        (
            "sight: 100%|#####| 350/350 [01:10<00:00,  4.95step/s, loss=0.333, right=0.912]",
            Progress("350", "350", "step", "sight", "loss=0.333, right=0.912", "", 1.0),
        ),
        ("  0%|          | 0/400 [00:00<?, ?it/s]", Progress("0", "400", "", "", "", "", 0.0)),
        ("26it [00:03,  8.1it/s]", Progress("26", "", "", "", "", "", None)),
        (
            "Map (num_proc=1):  50%|██  | 3200/6400 [00:02<00:02, 1280.10 examples/s]",
            Progress("3200", "6400", "examples", "Map (num_proc=1)", "", "0:02", 0.5),
        ),
        (
            "to llava_next:   8%|▊   | 1.20G/15.0G [00:10<01:50, 126MB/s]",
            Progress("1.20G", "15.0G", "B", "to llava_next", "", "1:50", 0.08),
        ),
        (
            "train: 5%|# | 1/20 [1:02:03<19:00:00, 372.11s/step]",
            Progress("1", "20", "step", "train", "", "19:00:00", 0.05),
        ),
        ("0it [00:00, ?it/s]", Progress("0", "", "", "", "", "", None)),
    ],
)
def test_a_bar_is_read(text, expected):
    assert parse_bar(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "[INFO] a, b]",
        "{'loss': '1.2', 'x': [1, 2]}",
        "1.2.3/4 [00:01<00:02, 3it/s]",
        "12/10",
        "%|| [,]",
        "  5%|█   | 1/20 [00:01<00:1",
        "Traceback (most recent call last):",
        "x = [1, 2]",
        "https://a/b [1/2]",
    ],
)
def test_other_text_is_no_bar(text):
    assert parse_bar(text) is None


@given(
    n=st.integers(0, 10**7),
    total=st.one_of(st.none(), st.integers(1, 10**7)),
    elapsed=st.floats(0.01, 10**5),
    desc=st.sampled_from(["", "sight", "Map (num_proc=2)", "a: b"]),
    unit=st.sampled_from(["it", "pair", " rows"]),
    postfix=st.sampled_from(["", "loss=0.5", "loss=1e-05, lr=2"]),
    scale=st.booleans(),
)
def test_whatever_tqdm_writes_is_read(n, total, elapsed, desc, unit, postfix, scale):
    prefix = desc and f"{desc}: "
    known = total is not None and n <= total
    text = tqdm.format_meter(n, total, elapsed, prefix=prefix, unit=unit, postfix=postfix, unit_scale=scale)
    found = parse_bar(text)
    assert (found.label, found.facts) == (desc, postfix)
    assert found.done == (tqdm.format_sizeof(n) if scale else str(n))
    assert found.fraction == (pytest.approx(n / total, rel=0.01, abs=0.01) if known else None)
    assert found.unit == ("" if unit == "it" else unit.strip())


@given(st.text())
def test_no_text_is_too_strange(text):
    parse_bar(text)
    parse_trainer_log(text)
    output = Output(io.StringIO())
    output.feed(text)
    output.close()


def test_progress_in_words():
    assert (
        str(parse_bar("sight: 50%|# | 1/2 [00:01<00:13, 1.0step/s, loss=2]")) == "sight: 1/2 steps, loss=2, 0:13 left"
    )
    assert parse_bar("26it [00:03,  8.1it/s]").count == "26 done"
    assert parse_bar("3pair [00:03,  8.1pair/s]").count == "3 pairs"


def test_trainer_log_lines():
    line = {"current_steps": 40, "total_steps": 400, "loss": 0.69314, "remaining_time": "0:01:05", "epoch": 0.1}
    expected = Progress("40", "400", "step", "training", "loss=0.6931", "1:05", 0.1)
    assert parse_trainer_log(json.dumps(line)) == expected
    without = '{"current_steps": null, "total_steps": 3}'
    for garbage in ("", "{", "[]", "3", '{"loss": 1}', without, json.dumps(line)[:-9]):
        assert parse_trainer_log(garbage) is None


def test_trainer_log_of_an_earlier_run_says_nothing(tmp_path):
    def entry(step: int, **more) -> str:
        return json.dumps({"current_steps": step, "total_steps": 40, **more}) + "\n"

    path = tmp_path / "trainer_log.jsonl"
    path.write_text(entry(40) * 9)
    log = progress.TrainerLog(path)
    assert not log.read() and log.newest is None
    path.unlink()  # as overwrite_output_dir does
    assert not log.read()
    path.write_text(entry(10, loss=0.5) + entry(20)[:7])  # the second line is still being written
    assert log.read() and (log.newest.done, log.newest.facts) == ("10", "loss=0.5")
    path.write_text(entry(10, loss=0.5) + entry(20))
    assert log.read() and (log.newest.done, log.newest.facts) == ("20", "loss=0.5")
    assert not log.read()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def state(done: int, label: str = "sight") -> str:
    return f"{label}:  {done}%|#  | {done}/100 [00:01<00:13, 1.0step/s]"


def test_the_file_has_every_line_and_few_states_of_a_bar():
    clock, file = Clock(), io.StringIO()
    output = Output(file, clock)
    output.feed("loads\r\n\n")
    for done in range(100):
        output.feed("\r" + state(done))
        clock.now += 0.25
    output.feed("\n\x1b[31mTraceback\x1b[0m\n  at the end")
    output.close()
    assert file.getvalue().splitlines() == [
        "loads",
        "",
        state(0),
        state(40),
        state(80),
        state(99),
        "Traceback",
        "  at the end",
    ]
    assert output.line == "at the end"


def test_bars_below_each_other_do_not_flood_the_file():
    file = io.StringIO()
    output = Output(file, Clock())
    output.feed(state(10, "outer"))
    for done in (*range(100), 100):
        output.feed("\n\r" + state(done, "inner") + "\x1b[A")
    output.feed("\n\r" + state(100, "inner").replace("1.0step", "9.9step"))  # the same state at another rate
    output.feed("\r" + state(11, "outer") + "\nend\n")
    assert file.getvalue().splitlines() == [state(10, "outer"), state(100, "inner"), state(11, "outer"), "end"]


def test_output_may_be_cut_anywhere():
    text = f"a\r\nb\x1b[A\n\r{state(1)}\r{state(2)}\n\r   \rc\rd\n{state(100)}\nend"
    results = set()
    for size in (1, 2, 3, 5, 8, len(text)):
        file = io.StringIO()
        output = Output(file, Clock())
        for start in range(0, len(text), size):
            output.feed(text[start : start + size])
        output.close()
        results.add((file.getvalue(), output.line, output.bar))
    assert len(results) == 1
    written = results.pop()[0].splitlines()
    assert [line for line in written if line] == ["a", "b", state(1), state(2), "c", "d", state(100), "end"]


def test_a_full_bar_makes_room_for_what_follows(tmp_path):
    clock = Clock()
    output = Output(io.StringIO(), clock)
    follower = Follower(output, None, clock)
    output.feed("\r" + state(100))
    assert follower.progress.fraction == 1.0
    clock.now += progress.FINISHED_SECONDS + 1
    assert follower.progress is None
    output.feed("\r" + state(40))
    clock.now += 100
    assert follower.progress.done == "40"
    output.feed("\r" + state(100) + "\nloads\n")
    assert follower.progress is None and follower.line == "loads"


def test_bar_and_trainer_log_are_one(tmp_path):
    clock, path = Clock(), tmp_path / "trainer_log.jsonl"
    output = Output(io.StringIO(), clock)
    follower = Follower(output, path, clock)
    output.feed("\r 10%|#  | 12/100 [00:01<00:13, 1.0it/s]")
    assert str(follower.progress) == "12/100, 0:13 left"
    path.write_text(json.dumps({"current_steps": 10, "total_steps": 100, "loss": 0.5}) + "\n")
    assert str(follower.progress) == "training: 12/100 steps, loss=0.5, 0:13 left"
    clock.now += 1
    output.feed("\r 10%|#  | 3/25 [00:01<00:13, 1.0it/s]")  # the evaluation within the training
    assert str(follower.progress) == "3/25, 0:13 left"


def test_a_log_has_lines_as_time_goes_by(child, tmp_path, monkeypatch):
    monkeypatch.setattr(step_list, "LOG_SECONDS", 0.3)
    file = io.StringIO()
    steps = step_list.LogSteps(["first", "second"], file)
    steps.begin("first", "python child.py")
    assert progress.run(child, tmp_path / "child.log", steps.show) == 0
    steps.end(1.2, "outputs/a")
    steps.begin("second", "python other.py")
    steps.end(7.0, "outputs/b", reused=True)
    lines = file.getvalue().splitlines()
    assert lines[:3] == ["", "[first]", "$ python child.py"]
    assert lines[-5:] == ["  1 s: outputs/a", "", "[second]", "$ python other.py", "  done before, in 7 s: outputs/b"]
    between = lines[3:-5]
    assert any("/20 steps, loss=" in line and "left" in line for line in between), between
    log = (tmp_path / "child.log").read_text().splitlines()
    assert log[0].startswith("$ ") and log[1] == "loads the model" and log[-1] == "wrote it all"
    assert log[-2].startswith("sight: 100%") and "\r" not in "".join(log)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_of_the_list_is_wider_than_the_terminal(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})
    steps = step_list.LiveSteps(["first " * 30, "second", "third"], console)
    output = Output(io.StringIO())
    follower = Follower(output, None)
    texts = (
        "",
        "words [/b] " * 20 + "\n",
        "26it [00:03,  8.1it/s]",
        state(40, "label " * 9),
        state(4)[:-1] + ", [/b]=1]",
    )
    for step, text in zip((0, 1, 1, 1, 1), texts, strict=True):
        steps.begin(steps.steps[step].title, "python evals/preference.py recipes/tiny/recipe.yaml " + "key=value " * 6)
        output.feed("\r" + text)
        steps.show(follower)
        lines = [line.rstrip() for line in _plain(console, steps).splitlines()]
        assert max(map(len, lines)) <= width and len(lines) <= 3 + 1 + 180 // width + 2, lines
        steps.end(12.0, "a")
    assert "✓ second" in _plain(console, steps)


def _plain(console: Console, steps) -> str:
    with console.capture() as captured:
        console.print(steps._render())
    return progress._ESCAPE.sub("", captured.get())


LIVE = """
import sys
from pathlib import Path
from llava_orpo import progress, step_list
with step_list.step_list(["first", "second"]) as steps:
    steps.begin("first", "python child.py")
    code = progress.run([sys.executable, sys.argv[1]], Path(sys.argv[2]), steps.show)
    steps.end(3.0, "a")
print("exit code", code)
"""


def test_a_terminal_has_a_live_list(child, tmp_path):
    main_end, child_end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    live = subprocess.Popen(
        [sys.executable, "-c", LIVE, child[1], str(tmp_path / "log")],
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        env=environment,
    )
    os.close(child_end)
    seen = b""
    try:
        while block := os.read(main_end, 4096):
            seen += block
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(main_end)
    text = seen.decode()
    assert live.wait() == 0 and "exit code 0" in text
    assert "▸" in text and "✓" in text and "/20 steps, loss=" in text and "$ python child.py" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_a_failing_command_leaves_its_output(tmp_path):
    log = tmp_path / "log"
    words = "import sys; print('a', flush=True); print('b', file=sys.stderr); sys.exit(3)"
    assert progress.run([sys.executable, "-c", words], log, lambda _: None) == 3
    assert log.read_text().splitlines()[1:] == ["a", "b"]
    with pytest.raises(OSError):
        progress.run([str(tmp_path / "nothing")], log, lambda _: None)


# A command that starts another one; both say who they are and wait. With "stubborn", Ctrl-C does not end them.
FAMILY = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "grandchild" not in sys.argv:
    subprocess.Popen([sys.executable, __file__, "grandchild", *sys.argv[1:]])
print("pid", os.getpid(), flush=True)
time.sleep(60)
"""
RUNNER = """
import sys
from pathlib import Path
from llava_orpo import progress
progress.STOP_SECONDS = 0.4
try:
    progress.run([sys.executable, *sys.argv[2:]], Path(sys.argv[1]), lambda _: None)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("how", "kind"), [(signal.SIGINT, ""), (signal.SIGINT, "stubborn"), (signal.SIGTERM, ""), (signal.SIGHUP, "")]
)
def test_ctrl_c_stops_the_command_and_what_it_started(how, kind, tmp_path):
    family, log = tmp_path / "family.py", tmp_path / "log"
    family.write_text(FAMILY)
    runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(log), str(family), *filter(None, [kind])])
    deadline = time.monotonic() + 20
    pids: list[int] = []
    while len(pids) < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
        lines = log.read_text().splitlines() if log.exists() else []
        pids = [int(line.split()[1]) for line in lines if line.startswith("pid")]
    runner.send_signal(how)
    assert runner.wait(10) == 130
    for pid in pids:
        while _runs(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_our_own_bars_are_lines_in_a_log(monkeypatch, capsys):
    monkeypatch.setenv("TQDM_MININTERVAL", "0.05")
    with progress.bar(10, "merges", unit="layer") as bar:
        for _ in range(10):
            time.sleep(0.02)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 12
    assert [parse_bar(line).label for line in lines] == ["merges"] * len(lines)
    assert parse_bar(lines[-1]) == Progress("10", "10", "layer", "merges", "", "", 1.0)


def test_waiting_says_how_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.1)
    with progress.waiting("compares"):
        time.sleep(0.25)
    assert set(capsys.readouterr().err.splitlines()) == {"compares ... 0 s"}
    with pytest.raises(ZeroDivisionError), progress.waiting("compares"):
        raise ZeroDivisionError


@pytest.mark.parametrize("code", [0, 3])
def test_set_up_shows_the_newest_line_in_a_log(code):
    script = textwrap.dedent(f"""
        set -euo pipefail
        source scripts/progress.sh
        with_progress "Installing" bash -c 'printf "one\\ntwo\\rthree"; sleep 0.8; exit {code}'
        echo after
    """)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "LLAVA_ORPO_LOG_SECONDS": "0.2"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == code
    assert (
        lines[0] == "Installing ..."
        and any(line.endswith(" s  three") for line in lines)
        and ("after" in lines) == (code == 0)
    )
    assert ("two" in done.stderr and "failed (exit code 3)" in done.stderr) == (code == 3)
