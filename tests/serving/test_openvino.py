"""scripts/openvino.sh: the prompt that OpenVINO is given, what is refused, and (heavy) answers and log-probs."""

from __future__ import annotations

import functools
import json

import pytest
import run_openvino
from filelock import FileLock

from helpers.commands import exit_code, run_script
from helpers.paths import ROOT
from helpers.recipes import CACHE, photo_rows, random_model, write_rows
from llava_orpo.checkpoint.files import CheckpointError
from llava_orpo.data.conversation import CONVERSATIONS
from llava_orpo.errors import UserError
from llava_orpo.export.openvino import export
from llava_orpo.serving import side_by_side
from llava_orpo.serving.openvino_runner import check_folder, prompt_text
from llava_orpo.serving.side_by_side import Answer


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_the_conversations_with_genais_tag_for_the_image(name):
    conversation = CONVERSATIONS[name]
    for image in (True, False):
        text = prompt_text(conversation, "What?", image)
        assert text.count("<ov_genai_image_0>") == image and "<image>" not in text
        assert text.replace("<ov_genai_image_0>", "<image>\n") == conversation.render_prompt("What?", image)
    with pytest.raises(UserError, match="takes for an image"):
        prompt_text(conversation, "Is <ov_genai_image_1> a tag?", True)


def test_folders_that_are_no_export_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        check_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="export it"):
        check_folder(random_model())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        export(tmp_path, tmp_path / "out", "")
    with pytest.raises(CheckpointError, match="own folder"):
        export(random_model(), random_model(), "")


def test_wrong_words_are_refused_in_one_line(capsys):
    for words in (["model"], ["model", "out", "3bit"], ["ask", str(random_model())]):
        assert exit_code(run_openvino.main, *words) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1


def test_an_interrupted_comparison_asks_only_what_is_missing(tmp_path):
    write_rows(tmp_path, photo_rows(3, 1))
    rows = side_by_side.read_rows(tmp_path / "rows.parquet", 0)
    assert len(rows) == 3 and len(side_by_side.read_rows(tmp_path / "rows.parquet", 2)) == 2

    class Side:
        asked = 0

        def ask(self, question, _image):
            self.asked += 1
            if self.asked == 2:
                raise KeyboardInterrupt
            return Answer(question, 5, 2, -1.0, 0.5)

    def ask(model="model"):
        return side_by_side.ask_all(side, rows, "side", side_by_side.saved_answers(tmp_path, "m", model, False))

    side = Side()
    with pytest.raises(KeyboardInterrupt):
        ask()
    (file,) = tmp_path.glob("answers_*.jsonl")
    with file.open("a") as out:
        out.write('{"row": 1, "cut')
    assert [answer.text for answer in ask()] == [row.question for row in rows] and side.asked == 4
    assert ask() and side.asked == 4
    ask("other")  # another model's answers are not taken
    assert side.asked == 7


def test_what_differs_is_counted_and_listed():
    rows = [side_by_side.Row("q", chosen, "r", None) for chosen in ("one", "two")]
    theirs = [Answer("one", 7, 4, -1.0, 1.0), Answer("two", 8, 4, -1.0, 1.0)]
    mine = [Answer("one", 7, 4, -1.4, 0.5), Answer("three", 9, 4, -9.0, 0.5)]
    found = side_by_side.summarize_answers(mine, theirs, rows)
    assert found["prompt_tokens_equal"] == found["answers_equal"]["count"] == found["answers_chosen"]["count"] == 1
    assert found["answer_logp_difference"] == pytest.approx(0.1) and found["tokens_per_second"] == 8
    assert [one["row"] for one in found["different"]] == [1]


@pytest.mark.heavy
def test_openvino_answers_and_scores_as_transformers_does(tmp_path):
    CACHE.mkdir(parents=True, exist_ok=True)
    write_rows(tmp_path, photo_rows(8, 1, "mixed"))
    command = ["bash", str(ROOT / "scripts" / "openvino.sh")]
    forms = [tmp_path / "fp32", tmp_path / "8bit"]
    with FileLock(CACHE / "venv-openvino.lock"):
        run(*command, random_model(), forms[0])
    run(*command, random_model(), forms[1], "8bit")
    words = [f"forms={forms[0]},{forms[1]}", f"data={tmp_path / 'rows.parquet'}", "rows=8", "max_new_tokens=24"]
    run(*command, "compare", random_model(), *words, "score=true", f"output_dir={tmp_path / 'out'}")
    exact, quantized = json.loads((tmp_path / "out" / "parity.json").read_text())["forms"].values()
    assert exact["prompt_tokens_equal"] == exact["answers_equal"]["count"] == 8
    assert exact["token_logp_difference"] < 1e-4 and exact["answer_logp_difference"] < 1e-4
    assert quantized["prompt_tokens_equal"] == 8 and quantized["token_logp_difference"] > 1e-4
    assert quantized["bytes"] < exact["bytes"]


run = functools.partial(run_script, OPENVINO_VENV="outputs/test-cache/venv-openvino")
