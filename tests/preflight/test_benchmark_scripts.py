"""The scripts under benchmarks/: pages say what is planned now, and a run on a rented card loses nothing."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig, OptimizerConfig
from loadmaster.preflight import coefficients as coefficients_module
from loadmaster.preflight import make_plan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # scripts import each other by name
    spec.loader.exec_module(module)
    return module


def test_can_i_train_x_on_y_is_what_the_plans_say() -> None:
    script = load("can_i_train")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python benchmarks/can_i_train.py"


def test_the_picture_of_a_plan_is_of_what_is_planned_now(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    script = load("plan_picture")
    assert script.PICTURE.read_text(encoding="utf-8") == script.picture(), "run: python benchmarks/plan_picture.py"


def test_the_benchmark_grid_covers_what_the_bar_asks_for() -> None:
    grid = load("memory").grid()
    eager = [case for case in grid if not case.compile]
    assert len(eager) >= 40 and len(set(grid)) == len(grid) and len(grid) - len(eager) >= 5
    assert {case.method for case in eager} == {"lora", "qlora", "full"} and "fp8" in {c.precision for c in eager}
    assert len({case.model for case in eager}) == 4
    assert {case.checkpointing for case in eager} == {"none", "selective", "full"}
    assert {case.optimizer for case in eager} == {
        "adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit", "adafactor"
    }
    assert {case.accumulation for case in eager} == {1, 2} and "dpo" in {case.objective for case in eager}


def test_nothing_is_measured_in_a_process_after_paged_states() -> None:
    grid = load("memory").grid()
    for number, case in enumerate(grid):
        if case.optimizer.startswith("paged"):
            assert not [each for each in grid[number + 1 :] if (each.model, each.compile) == (case.model, case.compile)]


def test_the_memory_that_the_page_on_training_names_is_what_is_planned_now() -> None:
    def planned(method: str, gpu: str, model: str = "8B", count: int = 1, rows: int = 16, **fields):
        name = ModelConfig(name=f"meta-llama/Llama-3.1-{model}")
        batch, hardware = BatchConfig(global_size=rows), HardwareConfig(gpu=gpu, count=count)
        return make_plan(Job(model=name, method=method, batch=batch, hardware=hardware, **fields))

    def qlora(way: str, **fields) -> str:
        made = planned("qlora", "h100_80gb", micro_batch_size=2, activation_checkpointing=way, **fields)
        return f"{made.peak_gib.allocated:.1f}"

    page = " ".join((BENCHMARKS.parent / "docs" / "training.md").read_text(encoding="utf-8").split())
    eager = [qlora(way, compile=False) for way in ("none", "selective", "full")]
    assert f"| 2 x 2048 tokens, layers not compiled, GiB | {' | '.join(eager)} |" in page
    light = OptimizerConfig(name="adamw_8bit", master_weights=True)
    assert f"compiled | | | {qlora('full')} | {qlora('offload')} ({qlora('offload', optimizer=light)} with" in page
    one = {"micro_batch_size": 1, "precision": "bf16"}
    made = [
        planned("full", "h200", rows=rows, optimizer=optimizer, activation_checkpointing=way, **one)
        for rows, way in ((1, "auto"), (16, "full"))
        for optimizer in (OptimizerConfig(name="adamw", master_weights=True), OptimizerConfig(name="adafactor"))
    ]
    steps = [f"{each.memory_gib.total:.1f}" for each in made]
    said = f"peaks at {steps[0]} GiB with AdamW over fp32 masters, and at {steps[1]} in Adafactor's step without them"
    assert f"{said}; by steps of several, all layers recomputed, at {steps[2]} and {steps[3]} (modelled)" in page
    inside = {"rows": 32, "offload": "none"}
    gone, held = (
        planned("full", "a100_80gb", "70B", 4, optimizer=OptimizerConfig(max_grad_norm=0.0, in_backward=how), **inside)
        for how in ("auto", False)
    )
    assert gone.fits and gone.optimizer_in_backward and not held.fits
    said = f"{gone.memory_gib.total:.0f} of {gone.budget_gib:.0f} GiB, where all gradients together take"
    assert f"{said} {held.memory_gib.total:.0f} (modelled)" in page



STUB = """#!{python}
import json, os, sys
indices = [int(i) for i in sys.argv[sys.argv.index("--cases") + 1].split(",")]
case = json.loads(os.environ["STUB_CASE"])
assert "/packages/of/ones/own" in os.environ["PYTHONPATH"].split(os.pathsep)
for i in indices:
    print(f"AT {{i}}", flush=True)
    if i == 1:
        os._exit(9)
    print("ROW " + json.dumps([i, {{"case": case, "failed": "out of memory: here", "predicted": {{"fits": True}}}}]))
"""


def test_a_case_that_takes_its_process_with_it_is_a_row_and_the_others_still_run(tmp_path, monkeypatch) -> None:
    script = load("memory")
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "/packages/of/ones/own")  # as of pip install --target
    monkeypatch.setenv("STUB_CASE", json.dumps(script.asdict(script.grid()[0])))
    monkeypatch.setattr(script.sys, "executable", str(stub))
    out = tmp_path / "rows.json"
    rows = script.run_all([0, 1, 2, 3], out, {"card": "x", "rows": []}, minutes=1, dry_run=False)
    said = [row["failed"] for row in rows]
    assert said == ["out of memory: here", "its process ended with 9"] + 2 * ["out of memory: here"]
    assert json.loads(out.read_text())["rows"] == rows and "ran out of memory: 3" in script.summarise(rows)
    assert script.run_all([5], out, {"card": "x", "rows": []}, minutes=0, dry_run=False) == []
    assert [script.is_settled(row) for row in [*rows, {"measured": {}}]] == [True, False, True, True, True]


@pytest.mark.slow
def test_a_dry_run_goes_the_whole_way_and_resumes(tmp_path) -> None:
    out = tmp_path / "dry.json"
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--dry-run"]
    done = subprocess.run([*command, "--out", out, "--model", "llama-3.2-1b"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = json.loads(out.read_text())
    assert all("measured" in row for row in stored["rows"]) and len(stored["rows"]) >= 15
    stored["rows"][-2:] = [{"case": stored["rows"][-2]["case"], "failed": "RuntimeError: no compiler"}]
    out.write_text(json.dumps(stored))
    subprocess.run([*command, "--resume", out, "--model", "llama-3.2-1b"], check=True, capture_output=True)
    resumed = json.loads(out.read_text())["rows"]
    assert len(resumed) == len(stored["rows"]) + 1 and all("measured" in row for row in resumed)


def test_a_card_that_pytorch_cannot_use_is_told_and_its_processors_are_not_measured_for_it(monkeypatch) -> None:
    import torch

    from loadmaster.preflight import hardware

    load("measure")
    memory = load("memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "local_gpus", lambda: [("NVIDIA H100 80GB HBM3", 79.65, 9.0)])
    row = memory.measure_case(memory.grid()[0], False, None)
    assert "that PyTorch cannot use" in row["failed"] and row["predicted"]["fits"]


def test_a_card_is_named_where_nvidia_smi_is_not_there(tmp_path, monkeypatch) -> None:
    from loadmaster.preflight import nvml

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvml, "local_gpus", lambda: [("NVIDIA H100 80GB HBM3", 79.65, 9.0)])
    assert load("memory").about_the_card()["card"] == "NVIDIA H100 80GB HBM3"
    assert load("speed").about_the_machine()["card"] == "NVIDIA H100 80GB HBM3"


def test_efficiencies_are_fitted_to_stored_measurements(tmp_path, monkeypatch) -> None:
    script = load("memory")
    rows = [{"case": script.asdict(case)} for case in script.grid()[9:36:4]]
    script.predict_again(rows)
    for row in rows:  # a card on which everything takes a tenth longer, with 50 MiB of workspaces more
        allocated = row["predicted"]["allocated_gib"] + 0.05
        row["measured"] = {
            "peak_allocated_gib": allocated, "peak_reserved_gib": 1.04 * allocated,
            "peak_device_gib": 1.04 * allocated + 0.8, "tokens_per_second": row["predicted"]["tokens_per_second"] / 1.1,
        }
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    fit = load("fit_speed")
    kept = copy.deepcopy(fit.coefficients())
    monkeypatch.setattr(fit, "coefficients", lambda: kept)
    monkeypatch.setattr(coefficients_module, "coefficients", lambda: kept)
    loaded = fit.load([tmp_path / "rows.json"], "h100_80gb")
    before, after = fit.fit_speed(loaded)
    assert before == pytest.approx(math.log(1.1), abs=0.01) and after < 0.02
    found = fit.fit_memory(loaded)
    assert found["context.cuda_gib"][0] == pytest.approx(0.8) and found["fragmentation.share"][0] == pytest.approx(0.04)
    assert found["context.cublas_workspace_gib"][0] == pytest.approx(0.0625 + 0.05, abs=0.001)


def test_stored_measurements_are_predicted_again_and_summarised() -> None:
    script = load("memory")
    rows = [{"case": script.asdict(case)} for case in script.grid()[:3]]
    script.predict_again(rows)
    for row in rows:
        predicted = row["predicted"]
        row["measured"] = {
            "peak_allocated_gib": predicted["allocated_gib"], "peak_reserved_gib": predicted["reserved_gib"],
            "peak_device_gib": predicted["device_gib"] * 2, "tokens_per_second": predicted["tokens_per_second"],
        }
    said = script.summarise(
        [*rows, {"case": rows[0]["case"], "predicted": rows[0]["predicted"], "failed": "out of memory: x"}]
    )
    assert "3 of 4 cases measured" in said and "ran out of memory: 1" in said
    assert "device_gib         median 50.00%" in said


def test_runs_that_were_measured_on_a_card_stand_beside_the_replay_as_it_is_now() -> None:
    script = load("reference_runs")
    stored = sorted(script.RESULTS.glob("reference-*.md"))[-1]
    assert stored.read_text(encoding="utf-8") == script.page(stored.stem.removeprefix("reference-")), (
        "the model has changed: python benchmarks/reference_runs.py"
    )
    predicted = {run.name: script.predict(run) for run in script.RUNS}
    off = {run.name: predicted[run.name][0] / run.gib - 1 for run in script.RUNS}
    same = [run.name for run in script.RUNS if run.whole_logits]  # eager, and everything that memory depends on
    assert len(same) == 2 and all(abs(off[name]) < 0.001 for name in same)
    sketch = [run for run in script.RUNS if run.name.startswith("sketch")]
    recast = [run for run in sketch if "LoRA" in run.name and run.setup.precision == "fp8"]  # and bf16 weights kept
    compiled = [off[run.name] for run in sketch if run not in recast]
    assert len(compiled) == 4 and all(0 < share < 0.1 for share in compiled)
    speeds = [predicted[run.name][1] / run.tokens_per_second - 1 for run in sketch]
    assert len(recast) == 2 and all(abs(share) < 0.15 for share in speeds)


def test_a_cards_kernel_that_is_wrong_or_fails_is_told_and_the_others_are_tried(monkeypatch, capsys) -> None:
    import torch

    def fail(*_):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    script = load("gpu_kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(script, "attention", lambda call, *_: {"output": math.nan if call.window else 0.002})
    monkeypatch.setattr(script, "products", fail)
    monkeypatch.setattr(script, "adapters", lambda form, *_: {"output": 0.005, "gradients": 0.9})
    monkeypatch.setattr(script, "set_compiler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py"])
    assert script.main() == 1
    said = capsys.readouterr().out.splitlines()[1:]
    wrong = [line for line in said if line.startswith("BEYOND")]
    assert len(said) == 14 and len(wrong) == 2 + 6 + 2
    assert sum("CUBLAS_STATUS_NOT_SUPPORTED" in line for line in wrong) == 6


def test_losses_are_compared_of_what_the_packages_there_can_train(tmp_path, monkeypatch, capsys) -> None:
    script = load("loss_bands")

    def train(run, given):
        if run["method"] == "qlora":
            raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes")
        return {**run, "losses": [1.0], "held_out_before": 1.0, "held_out_after": 1.0, "seconds": 1.0}

    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "WINDOW", 1)
    monkeypatch.setattr(sys, "argv", ["loss_bands.py", "--data", "rows.json"])
    script.main()
    (told,) = tmp_path.glob("loss_bands-*.json")
    done = [run["name"] for run in json.loads(told.read_text())["runs"]]
    assert done == [run["name"] for run in script.RUNS if run["method"] != "qlora"]
    assert "not run, No module named 'bitsandbytes'" in capsys.readouterr().out


def test_losses_of_fewer_steps_than_a_mean_has_are_refused_before_any_is_taken(monkeypatch, capsys) -> None:
    script = load("loss_bands")
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("it trained"))
    monkeypatch.setattr(sys, "argv", ["loss_bands.py", "--data", "none.json", "--steps", "20"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--steps 20: losses are compared as means of 50 steps" in capsys.readouterr().err


@pytest.mark.slow
def test_every_precision_whose_losses_are_compared_trains(few_words, tmp_path, monkeypatch, capsys) -> None:
    script, rows = load("loss_bands"), tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"Count to {n}.", "output": "1, 2 and on."} for n in range(40)]))
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "WINDOW", 1)
    monkeypatch.setattr(
        sys, "argv", ["loss_bands.py", "--data", str(rows), "--model", str(few_words), "--steps", "2", "--length", "64"]
    )
    script.main()
    (told,) = tmp_path.glob("loss_bands-*.json")
    runs = {run["name"]: run for run in json.loads(told.read_text())["runs"]}
    assert list(runs) == [run["name"] for run in script.RUNS]
    assert all(math.isfinite(loss) for run in runs.values() for loss in run["losses"])
    held = {name: run["held_out_before"] for name, run in runs.items()}
    assert len(set(held.values())) == 6  # fp32, bf16, an FP8 base, its products too, nf4, and all products in FP8
