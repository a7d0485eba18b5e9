"""`bash scripts/gpu.sh`: a dry run through every stage, what fails, and what becomes of the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import make_tables
import pytest
import torch

import gpu
from helpers import recipes
from helpers.paths import ROOT
from llava_orpo import upstream
from llava_orpo.errors import UsageError, UserError
from llava_orpo.gpu import correctness, models, record, run, speed, training, waits
from llava_orpo.gpu.machine import SMALLEST, Machine
from llava_orpo.gpu.record import Entry, LeftOut, Record, Unmeasured
from llava_orpo.plan import gpus
from llava_orpo.tiny import random_model, shapes

CPU = torch.device("cpu")
DRY_RUN = pytest.mark.xdist_group("gpu dry run")  # one worker runs it for all tests of it
FEW = [speed.Cell("nf4", 1, "all", speed.OURS), speed.Cell("nf4", 1, "all", speed.STOCK)]
AUTO = speed.Cell("nf4", 1, "auto", speed.OURS)


def forked(words, log):
    done = recipes.run_cli(*words, check=False)
    log.write_text(done.stdout + done.stderr)
    return done.returncode, log.read_text()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The whole command on a CPU; in the suite with few cells of stage 2 and one case of stage 1."""
    out = tmp_path_factory.mktemp("gpu")
    machine = Machine(CPU, dry_run=True)
    cases = mock.patch.object(correctness, "CASES", correctness.CASES[:1])
    with cases, mock.patch.object(speed, "CELLS", [*FEW, AUTO]):
        code = run.run(machine, out, out / "work", run_cli=forked)
    found = json.loads((out / "gpu-dry-run.json").read_text())
    return SimpleNamespace(code=code, found=found, work=out / "work", stages=found["stages"])


def entries(stage):
    return {entry["what"]: entry for entry in stage["entries"]}


@pytest.mark.slow
@DRY_RUN
def test_a_dry_run_goes_through_every_stage(dry_run):
    assert dry_run.code == 0, dry_run.stages
    titles = [correctness.TITLE, speed.TITLE, waits.TITLE, training.TITLE]
    assert list(dry_run.stages) == titles
    assert {stage["state"] for stage in dry_run.stages.values()} == {"ok"}
    for stage in dry_run.stages.values():
        for entry in stage["entries"]:
            assert entry["state"] in ("ok", "not measured") and (entry["figures"] or entry["note"])
            assert all(set(figure) == {"value", "unit"} for figure in entry["figures"].values())
    assert torch.__version__.startswith(dry_run.found["versions"]["torch"]) and "dry run" in dry_run.found["label"]


@pytest.mark.slow
@DRY_RUN
def test_the_plan_predicts_the_peak_of_both_steps(dry_run):
    for cell in FEW:
        figures = entries(dry_run.stages[speed.TITLE])[str(cell)]["figures"]
        assert figures["predicted / measured"]["value"] == pytest.approx(1, abs=0.03)
        assert figures["time per pair"]["unit"] == "s"
    figures = entries(dry_run.stages[speed.TITLE])[str(AUTO)]["figures"]
    assert figures["layers recomputed"] == {"value": 1, "unit": f"of {SMALLEST.text[2]}"}
    assert figures["predicted / measured"]["value"] == pytest.approx(1, abs=0.03)
    ours, stock = (entries(dry_run.stages[speed.TITLE])[str(cell)]["figures"] for cell in FEW)
    assert ours["loss"]["value"] == pytest.approx(stock["loss"]["value"], rel=2e-3)  # the same pairs, in bf16
    assert ours["peak, storages followed"]["value"] < stock["peak, storages followed"]["value"]


@pytest.mark.slow
@DRY_RUN
def test_the_training_was_resumed_and_its_model_removed(dry_run):
    found = entries(dry_run.stages[training.TITLE])
    assert found["all steps, resumed once"]["figures"]["steps"]["value"] == training.DRY_STEPS
    assert found["random model on disk"]["figures"]["size"]["value"] > 0.01
    assert list(dry_run.work.iterdir()) == []


@pytest.mark.heavy
def test_the_command_in_full(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), "--dry-run", "--out", str(tmp_path), "--work", str(tmp_path)]
    done = subprocess.run(command, env=environment(VENV=sys.prefix), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu-dry-run.json").read_text())["stages"]
    assert len(found[speed.TITLE]["entries"]) == len(speed.CELLS)
    assert len(found) == 4 and all(stage["entries"] for stage in found.values())


def environment(**more) -> dict[str, str]:
    return {**os.environ, **more}


def test_the_core_installs_nothing_and_takes_the_python_at_hand(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), "--dry-run", "--stages", "1", "--out", str(tmp_path / "out")]
    values = environment(LLAVA_ORPO_GPU_CORE="1", PYTHON=sys.executable, VENV=str(tmp_path / "venv"))
    done = subprocess.run(command, env=values, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert not (tmp_path / "venv").exists() and "fp32, sdpa, grouped" in done.stdout
    assert json.loads((tmp_path / "out" / "gpu-dry-run.json").read_text())["stages"][correctness.TITLE]["entries"]
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\nexit 1\n")
    without.chmod(0o755)
    done = subprocess.run(command, env={**values, "PYTHON": str(without)}, capture_output=True, text=True)
    assert done.returncode == 1 and "--core needs torch, transformers and peft" in done.stderr


def test_mistakes_on_the_command_line():
    for words in (["--stages", "1,5"], ["--minutes", "0"]):
        with pytest.raises(UsageError):
            gpu.main(words)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            gpu.main(["--stages", "1"])


# what fails ---------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_is_recorded_and_the_next_goes_on(tmp_path):
    def fails(machine, found):
        found.add(Entry("before", figures={"x": (1.5, "s")}))
        raise RuntimeError("the first line\nthe second")

    def checks(machine, found):
        before = json.loads((tmp_path / "gpu-dry-run.json").read_text())
        assert before["stages"][correctness.TITLE]["error"] == "RuntimeError: the first line"  # written already
        found.add(Entry("after"))

    with mock.patch.object(correctness, "run", fails), mock.patch.object(speed, "run", checks):
        code = run.run(Machine(CPU, dry_run=True, full=False), tmp_path, tmp_path, stages={1, 2})
    stages = json.loads((tmp_path / "gpu-dry-run.json").read_text())["stages"]
    assert code == 1 and stages[correctness.TITLE]["state"] == "failed"
    assert stages[correctness.TITLE]["entries"][0]["figures"] == {"x": {"value": 1.5, "unit": "s"}}
    assert stages[speed.TITLE]["state"] == "ok" and stages[speed.TITLE]["entries"][0]["what"] == "after"


@pytest.mark.parametrize(
    ("error", "state", "failures"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "does not fit", 0),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "does not fit", 0),
        (RuntimeError("illegal memory access"), "failed", 1),
        (LeftOut("the time is up"), "left out", 0),
        (Unmeasured("no card"), "not measured", 0),
    ],
)
def test_what_becomes_of_an_error(tmp_path, error, state, failures):
    found = Record(tmp_path / "x.json", {}, say=lambda text: None)

    def measure():
        raise error

    with found.stage("s"):
        assert found.attempt("cell", measure).state == state
    assert found.failures == failures
    assert str(error)[:10] in json.loads((tmp_path / "x.json").read_text())["stages"]["s"]["entries"][0]["note"]


def test_a_stage_that_runs_again_takes_the_place_of_its_own_alone(tmp_path):
    head = {"card": {"name": "Made Up 9000"}, "versions": {"torch": "9.9"}, "dry_run": False}

    def ran(title, value, **changed):
        found = Record(tmp_path / "x.json", {**head, **changed}, say=lambda text: None)
        with found.stage(title):
            found.add(Entry("cell", figures={"time": (value, "s")}))
            raise RuntimeError("afterwards")
        return found

    ran("2 speed", 1.0)
    ran("1 right", 2.0)
    found = ran("2 speed", 3.0)
    assert found.failures == 1  # of this run
    stages = json.loads((tmp_path / "x.json").read_text())["stages"]
    assert {t: [e["figures"]["time"]["value"] for e in s["entries"]] for t, s in stages.items()} == {
        "1 right": [2.0],
        "2 speed": [3.0],
    }
    assert list(stages) == ["1 right", "2 speed"]
    for other in ({"versions": {"torch": "10"}}, {"card": {"name": "Another"}}, {"dry_run": True}):
        ran("1 right", 2.0)
        assert list(ran("2 speed", 4.0, **other).content["stages"]) == ["2 speed"]
    (tmp_path / "x.json").write_text("[]")
    assert list(ran("2 speed", 4.0).content["stages"]) == ["2 speed"]


def test_the_traceback_of_what_failed_is_kept_and_of_nothing_else(tmp_path):
    log = tmp_path / "work" / "failed.txt"
    found = Record(tmp_path / "x.json", {}, say=lambda text: None, tracebacks=log)

    def measure(error):
        raise error

    with found.stage("s"):
        for error in (LeftOut("no time"), Unmeasured("no card"), torch.cuda.OutOfMemoryError("CUDA out of memory")):
            found.attempt("cell", lambda error=error: measure(error))
        assert not log.exists()
        found.attempt("cell 1", lambda: measure(RuntimeError("illegal access")))
        measure(ValueError("of the stage"))
    text = log.read_text()
    assert text.startswith("cell 1\nTraceback") and ", in measure" in text and "RuntimeError: illegal access" in text
    assert "\ns\nTraceback" in text and "ValueError: of the stage" in text


def test_no_cell_starts_once_the_time_is_up(tmp_path):
    machine = Machine(CPU, dry_run=True, full=False, deadline=0.0)
    found = Record(tmp_path / "x.json", {}, say=lambda text: None)
    with mock.patch.object(speed, "CELLS", FEW), found.stage("s"):
        speed.run(machine, found)
    assert [entry["state"] for entry in found.content["stages"]["s"]["entries"]] == ["left out"] * 2


def test_a_full_disk_is_seen_before_the_model_is_written(tmp_path):
    with pytest.raises(LeftOut, match="21 GB are needed"):
        with mock.patch.object(training.shutil, "disk_usage", lambda folder: SimpleNamespace(free=20_000_000_000)):
            training.make_model(Machine(CPU), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_began_anew_is_no_resumed_one(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    for folder in (out, out / "checkpoint-1"):
        (folder / "adapter_model.safetensors").touch()
    log = [{"current_steps": 1, "loss": 2.0}, {"current_steps": 2, "loss": 1.5, "data_wait_fraction": 0.25}]
    (out / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    saved = training.checkpoint_time(tmp_path, 1)
    found = training.examine(tmp_path, 2, saved)
    assert found.state == "ok" and found.figures["waiting for data, mean"] == (25, "%")
    assert "did not go on" in training.examine(tmp_path, 2, saved - 1).note
    (out / "checkpoint-1").rename(out / "checkpoint-2")
    assert "logged steps [1, 2]" in training.examine(tmp_path, 4, saved).note  # of four


# parts --------------------------------------------------------------------------------------------------------------


def test_llamafactorys_own_step_is_called(monkeypatch):
    model = models.random_model(SMALLEST, CPU, torch.float32).train()
    settings = model.config
    sizes = [models.photo(settings, 120, 80, question=5, chosen=9, rejected=4)] * 2
    batch = models.batch_of([sizes], settings, CPU)
    plain = models.plain_loss(model, batch, CPU)
    torch.testing.assert_close(models.stock_loss(model, batch, CPU), plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(models.enable_ours(model, CPU)(model, batch, CPU), plain, rtol=1e-5, atol=0)
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    theirs = CustomDPOTrainer.concatenated_forward

    def reads_more(trainer, *args):
        return theirs(trainer, *args) | {"x": trainer.something_new}

    models.enable_other(model, models.plain_loss)
    monkeypatch.setattr(CustomDPOTrainer, "concatenated_forward", reads_more)
    with pytest.raises(AttributeError, match="something_new"):
        upstream.stock_orpo_loss(model, dict(batch.stock), 0.1, CPU)


def test_trl_is_imported_in_the_order_that_works():
    def run_code(code: str):
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    wrong = run_code("import llamafactory.model, llamafactory.train.dpo.trainer")
    assert "mergekit" in wrong.stderr, "either order works now: take the work-around out"
    right = run_code("from llava_orpo import upstream; upstream.import_llamafactory()")
    assert right.returncode == 0, right.stderr[-2000:]


def test_a_model_is_made_weight_by_weight():
    largest, alive = 0, []
    draw = models.draw

    def watched(name, tensor, generator):
        nonlocal largest
        alive.append(tensor.device.type)
        largest = max(largest, tensor.numel())
        return draw(name, tensor, generator)

    with mock.patch.object(models, "draw", watched):
        model = models.random_model(SMALLEST, CPU, torch.bfloat16)
    parameters = list(model.parameters())
    assert len(alive) == len(parameters) and largest == max(p.numel() for p in parameters)
    assert {p.dtype for p in parameters} == {torch.bfloat16} and not any(p.is_meta for p in parameters)
    assert not any(buffer.is_meta for buffer in model.buffers())
    names = dict(model.named_parameters())
    norm, linear = (next(p for n, p in names.items() if part in n) for part in ("input_layernorm", "q_proj"))
    assert norm.eq(1).all() and 0.01 < linear.float().std() < 0.03


def test_the_decoder_alone_is_quantized_and_trained():
    from bitsandbytes.nn import Linear4bit

    model = models.with_lora(models.random_model(SMALLEST, CPU, torch.bfloat16, nf4=True))
    four_bit = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    assert len(four_bit) == 7 * SMALLEST.text[2] and all("language_model" in name for name in four_bit)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (7 * SMALLEST.text[2] + 2) and not any("vision_tower" in name for name in trained)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_recomputation_leaves_the_vision_tower_without_autograd():
    model = models.random_model(SMALLEST, CPU, torch.float32)
    model = models.with_lora(model)
    models.set_recompute(model, "all")
    seen = []
    inner = model.get_base_model().model
    tower = inner.vision_tower
    tower.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.requires_grad))
    batch = models.batch_of([[models.photo(model.config, 120, 80)]], model.config, CPU)
    models.enable_ours(model, CPU)(model, batch, CPU).backward()
    assert seen == [False]
    layer = inner.language_model.layers[0]
    assert layer.gradient_checkpointing and layer.training
    models.set_recompute(model, "none")
    assert not layer.gradient_checkpointing
    models.set_recompute(model, 1)
    assert [one.gradient_checkpointing for one in inner.language_model.layers] == [True, False]
    with pytest.raises(ValueError, match="is none of"):
        models.set_recompute(model, "some")


@pytest.mark.parametrize(
    ("ask", "times"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[torch.tensor([0, 1])] + x.mean(), 0),
    ],
)
def test_what_makes_a_host_wait_is_counted(ask, times):
    x = torch.randn(1) if times == 1 else torch.randn(3)
    with waits.host_synchronizations(CPU) as counts:
        ask(x)
    assert sum(counts.values()) == times, counts


@pytest.mark.parametrize(
    ("name", "gigabytes", "key"),
    [
        ("NVIDIA GeForce RTX 4090", 25.3, "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", 25.3, None),
        ("NVIDIA GeForce RTX 3090 Ti", 25.3, None),
        ("NVIDIA A100-SXM4-80GB", 85.1, "a100-80"),
        ("NVIDIA A100-PCIE-40GB", 42.3, "a100-40"),
        ("NVIDIA H100 80GB HBM3", 85.0, "h100"),
        ("NVIDIA H100 PCIe", 85.0, None),
        ("NVIDIA H200", 150.1, "h200"),
        ("NVIDIA L4", 23.6, "l4"),
        ("NVIDIA L40S", 47.7, "l40s"),
        ("NVIDIA RTX A6000", 50.9, "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", 50.9, None),
        ("NVIDIA A10G", 23.6, "a10g"),
    ],
)
def test_cards_by_their_drivers_names(name, gigabytes, key):
    assert gpus.of_card(name, int(gigabytes * 1e9)) == (gpus.GPUS[key] if key else None)


def test_the_plans_shapes_are_those_that_are_built():
    planned = json.loads((ROOT / "plugins/llava_orpo/plan/llava16_mistral_7b.json").read_text())
    built = shapes.config(shapes.GEOMETRIES["7b"]).to_dict()
    for part in ("text_config", "vision_config"):
        skipped = ("rope_theta", "projection_dim", "vocab_size") if part == "vision_config" else ("rope_theta",)
        wanted = {key: value for key, value in planned[part].items() if key not in skipped}
        assert {key: built[part][key] for key in wanted} == wanted
    assert built["image_grid_pinpoints"] == planned["image_grid_pinpoints"]
    assert record.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_a_sharded_model_is_whole(tmp_path):
    from llava_orpo.checkpoint.published import check_folder

    with mock.patch.object(random_model, "SHARD_GB", 0.005):
        random_model.write_sharded(SMALLEST, tmp_path, torch.bfloat16)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_folder(str(tmp_path))


def test_the_page_shows_what_was_measured(tmp_path):
    assert "Not yet measured: run `bash scripts/gpu.sh`" in make_tables.gpu_section(tmp_path)
    head = {"dry_run": False, "card": {"name": "Made Up 9000", "memory": {"value": 24e9, "unit": "bytes"}}}
    head |= {"versions": {"torch": "9.9", "llamafactory": None}}
    found = Record(tmp_path / "gpu-made-up-9000.json", head, say=lambda text: None)
    with found.stage("2 speed"):
        found.add(Entry("nf4, shared prefix", figures={"time per pair": (0.8765, "s"), "peak": (9.5, "GB")}))
        found.add(Entry("bf16, LLaMA-Factory", record.UNFIT, note="OutOfMemoryError: CUDA out of memory"))
    with found.stage("3 waits"):
        raise RuntimeError("no idea")
    Record(tmp_path / "gpu-dry-run.json", {**head, "dry_run": True, "card": {"name": "no card", "memory": None}})
    page = make_tables.page(tmp_path)
    assert "### Made Up 9000, 24.0 GB" in page and "time per pair 0.876 s, peak 9.5 GB" in page
    assert "| does not fit | OutOfMemoryError: CUDA out of memory" in page and "no card" not in page
    assert (
        "RuntimeError: no idea" in page
        and "`bash scripts/gpu.sh" in page
        and "; torch 9.9" in page
        and "llamafactory None" not in page
    )
    assert "Not yet measured" not in page
