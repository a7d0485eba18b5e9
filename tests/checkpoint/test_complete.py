"""Which checkpoints count as whole, told from their files."""

from __future__ import annotations

import json

import pytest

from llava_orpo.checkpoint import complete


def made(folder, step=4, finished=True):
    path = folder / f"checkpoint-{step}"
    complete.begin(path)
    (path / "adapter_model.safetensors").write_bytes(b"weights")
    (path / complete.STATE).write_text("{}")
    if finished:
        complete.finish(path)
    return path


def test_a_finished_checkpoint_is_whole_and_files_added_later_do_not_matter(tmp_path):
    path = made(tmp_path)
    assert complete.problem(path) == ""
    (path / "README.md").write_text("later")
    assert complete.problem(path) == ""
    assert not (path / complete.SAVING).exists()


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / complete.SAVING).touch(), "was being written"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"w"), "has 1 bytes in place of 7"),
        (lambda path: (path / complete.MANIFEST).write_text('{"fi'), "complete.json cannot be read"),
    ],
)
def test_what_a_damaged_checkpoint_lacks_is_said(tmp_path, damage, words):
    path = made(tmp_path)
    damage(path)
    assert words in complete.problem(path)


def test_a_checkpoint_of_another_program_is_whole_if_its_last_file_is(tmp_path):
    path = made(tmp_path, finished=False)
    (path / complete.SAVING).unlink()
    assert complete.problem(path) == ""
    (path / complete.STATE).write_text('{"cut')
    assert "trainer_state.json cannot be read" in complete.problem(path)
    (path / complete.STATE).unlink()
    assert "trainer_state.json is missing" in complete.problem(path)


def test_the_newest_whole_one_is_found_and_one_set_aside_is_no_checkpoint(tmp_path):
    for step in (2, 10, 9):
        made(tmp_path, step)
    half = made(tmp_path, 11, finished=False)
    (tmp_path / "checkpoint-last").mkdir()
    assert complete.newest_whole(tmp_path).name == "checkpoint-10"
    assert complete.set_aside(half).name == "incomplete-checkpoint-11"
    complete.set_aside(made(tmp_path, 11, finished=False))  # in place of the first
    assert [path.name for path in complete.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-2"]
    assert complete.newest_whole(tmp_path / "nothing") is None


def test_logs_are_cut_where_the_checkpoint_ends(tmp_path):
    from llava_orpo.preference.records import HISTORY, HISTORY_FORMAT
    from llava_orpo.training.anomalies import ANOMALIES
    from llava_orpo.training.survival import cut_logs

    log = tmp_path / "trainer_log.jsonl"
    lines = [{"current_steps": step, "epoch": 0.1, "n": n} for n, step in enumerate((2, 4, 4, 4, 6))]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"current_st')
    (tmp_path / ANOMALIES).write_text('{"step": 4}\n{"step": 5}\n')
    history = [{"step": step, "dataset": "a"} for step in (0, 4, 6)]
    (tmp_path / HISTORY).write_text(json.dumps({"format": HISTORY_FORMAT, "history": history}))
    cut_logs(tmp_path, 4, [{"step": 2}, {"step": 4, "loss": 1.0}, {"step": 4, "eval_loss": 1.0}])
    assert [json.loads(line)["n"] for line in log.read_text().splitlines()] == [0, 1, 2]
    assert (tmp_path / ANOMALIES).read_text() == '{"step": 4}\n'
    assert [entry["step"] for entry in json.loads((tmp_path / HISTORY).read_text())["history"]] == [0, 4]
    cut_logs(tmp_path, 0, None)
    assert log.read_text() == (tmp_path / ANOMALIES).read_text() == ""
    assert [entry["step"] for entry in json.loads((tmp_path / HISTORY).read_text())["history"]] == [0]
