"""scripts/model_card.py: what the card says is what the recipe, the registry and the evaluation say."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import model_card as command
import pytest
import yaml

from helpers.paths import ROOT
from helpers.report_runs import make_pairs
from llava_orpo.errors import UsageError, UserError
from llava_orpo.export import model_card
from llava_orpo.preference import metrics, records

HEADLINE = ROOT / "recipes" / "llava16_orpo_qlora.yaml"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """(folder of a merged model, preference_eval.json of a run before and after training)."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "llava-orpo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for step, accuracy in ((0, 0.2), (400, 0.5)):
        pairs = make_pairs(80, accuracy, seed=step)
        summary = metrics.summarize(pairs, 0.1)
        grounding = metrics.grounding(pairs, make_pairs(80, 0.0, seed=7), make_pairs(80, 0.1, seed=8))
        entry = {"step": step, "epoch": step / 400, "dataset": "rlaif_v_heldout", "metrics": summary}
        records.append_history(tmp_path / "preference_eval.json", {**entry, "grounding": grounding})
    return folder, tmp_path / "preference_eval.json"


def write(folder: Path, evaluation: Path, *more: str) -> tuple[dict, str]:
    assert command.main([str(HEADLINE), f"folder={folder}", f"evaluation={evaluation}", *more]) == 0
    _, meta, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(meta), body


def test_the_head_names_base_data_and_the_stricter_licence(run):
    meta, body = write(*run)
    assert meta["license"] == "cc-by-nc-4.0"
    assert meta["base_model"] == "llava-hf/llava-v1.6-mistral-7b-hf" and meta["base_model_relation"] == "finetune"
    assert meta["datasets"] == ["openbmb/RLAIF-V-Dataset"]
    assert meta["library_name"] == "transformers" and meta["pipeline_tag"] == "image-text-to-text"
    assert "CC BY-NC 4.0" in body and "Apache 2.0" in body and "non-commercial" in body
    assert body.count("# llava-orpo\n") == 1


def test_the_numbers_are_the_evaluations(run):
    _, body = write(*run)
    before, after = (entry["metrics"] for entry in json.loads(run[1].read_text())["history"])
    for label, m in (("before", before), ("step 400", after)):
        line = next(line for line in body.splitlines() if f"| {label} |" in line)
        assert f"| {m['n']} | {100 * m['preference_accuracy']:.1f} % " in line
        assert f"({100 * m['preference_accuracy_low']:.1f} to {100 * m['preference_accuracy_high']:.1f})" in line
        assert f"| {m['logps/margin']:+.3f} | {m['sft_loss']:.3f} |" in line
    grey = json.loads(run[1].read_text())["history"][-1]["grounding"]["grey"]
    assert f"| shown a grey image | {grey['n']} | {100 * grey['preference_accuracy']:.1f} %" in body


def test_the_recipe_is_in_it_whole_but_for_secrets_and_paths(run, tmp_path):
    recipe = yaml.safe_load(HEADLINE.read_text())
    changed = tmp_path / "mine.yaml"
    changed.write_text(yaml.safe_dump({**recipe, "hf_hub_token": "hf_secret", "output_dir": "/home/me/private/out"}))
    assert command.main([str(changed), f"folder={run[0]}", f"evaluation={run[1]}"]) == 0
    text = (run[0] / "README.md").read_text()
    assert "secret" not in text and "/home/me" not in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown == {**recipe, "output_dir": "out"}


def test_the_snippet_is_python_and_an_adapter_names_its_base(run):
    folder, evaluation = run
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    meta, body = write(folder, evaluation)
    assert meta["library_name"] == "peft" and meta["base_model_relation"] == "adapter"
    code = body.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert 'PeftModel.from_pretrained(model, "llava-orpo")' in code and meta["base_model"] in code


def test_own_texts_are_not_replaced_unless_asked(run):
    folder, evaluation = run
    readme = folder / "README.md"
    readme.write_text("My own words.")
    with pytest.raises(UsageError, match="README.md exists; overwrite=true replaces it"):
        write(folder, evaluation)
    assert readme.read_text() == "My own words."
    write(folder, evaluation, "overwrite=true")
    write(folder, evaluation)  # its own card it may replace
    for stock in (
        "<!-- This model card has been generated automatically according to the information the Trainer had -->",
        "[More Information Needed]",
    ):
        readme.write_text(stock)
        assert write(folder, evaluation), "a template of the Trainer or of PEFT is nobody's own text"


def test_says_what_is_missing(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="empty holds neither a model .* nor an adapter"):
        write(empty, run[1])
    with pytest.raises(UsageError, match="nothing.json does not exist"):
        write(run[0], tmp_path / "nothing.json")
    recipe = yaml.safe_load(HEADLINE.read_text())
    with pytest.raises(UserError, match="'unheard_of'"):
        model_card.sources({**recipe, "dataset": "rlaif_v, unheard_of"}, {"rlaif_v": {"hf_hub_url": "x"}})
    assert "No evaluation was given" in model_card.measured([])


def test_unknown_data_has_no_licence_made_up(run):
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny" / "llava16_orpo_qlora.yaml").read_text())
    card = model_card.make_card("tiny", recipe, "tiny.yaml", {"demo_train": "demo_train.parquet"}, [])
    meta = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in meta and "base_model" not in meta and "datasets" not in meta
    assert "licence not known" in card and "non-commercial" not in card


def test_pushes_the_folder_privately_without_logs_and_checkpoints(run, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            assert token is None

        def create_repo(self, repository, **keys):
            calls.append((repository, keys))

        def upload_folder(self, **keys):
            calls.append(keys)
            assert (Path(keys["folder_path"]) / "README.md").is_file()
            return "https://huggingface.co/me/model"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    meta, body = write(*run, "push=me/model")
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/model" and "checkpoint-*" in calls[1]["ignore_patterns"]
    assert "# model\n" in body and 'from_pretrained("me/model"' in body
    write(*run, "push=me/model", "public=true")
    assert calls[2][1]["private"] is False


def test_nothing_is_pushed_unasked(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the Hub was touched"))
    write(*run)


def test_flags_of_before_still_work(run):
    folder, evaluation = run
    written = write(folder, evaluation, "name=mine", "overwrite=true")
    words = [str(folder), "--recipe", str(HEADLINE), "--evaluation", str(evaluation), "--name", "mine", "--overwrite"]
    assert command.main(words) == 0
    _, meta, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert (yaml.safe_load(meta), body) == written
