"""benchmarks/speed.py: what it measures, what it leaves behind, and that it runs beside a peer on a CPU."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed"] = module
    spec.loader.exec_module(module)
    return module


def run_of(speed, folder: Path, budget: float = 100.0):
    arguments = argparse.Namespace(budget=budget, out=folder / "speed.json", peer=[], peer_folder=[])
    return speed.Run(arguments, folder)


def test_every_bar_and_the_whole_ladder_are_measured(speed):
    rungs = speed.bars()
    assert {each["bar"] for each in rungs} == {"ceiling", "ladder", *(f"bar{n}" for n in range(1, 7))}
    assert {each.get("peer") for each in rungs} == {None, "trl", "unsloth"}
    full = {(each["shape"], each.get("precision")) for each in rungs if each["bar"] == "bar3" and each["kind"] == "run"}
    assert full == {(size, precision) for size in ("llama-3.1-8b", "llama-3.2-3b") for precision in ("bf16", "fp8")}
    names = [(each["bar"], each["name"]) for each in rungs]
    assert len(set(names)) == len(names)
    lengths = {each["sequence_length"]: each["memory_gib"] for each in rungs if each["bar"] == "bar5"}
    assert lengths == {78_475: 24, 342_733: None}
    # A step's attention at 300 TFLOP/s, and a minute to load, come to less than the rung may take.
    for each in (each for each in rungs if each["bar"] == "bar5"):
        step_s = 4.5 * 32 * 2 * 4096 * each["sequence_length"] ** 2 / 300e12
        assert (each["warm_up"] + each["steps"]) * step_s + 60 < each["limit_s"] < 600


def test_a_rungs_limit_of_memory_is_put_as_torch_takes_it(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import speed_rungs
    import torch

    set_to = []
    for name, stand_in in (
        ("is_available", lambda: True), ("current_device", lambda: 0), ("mem_get_info", lambda *_: (0, 80 * 2**30))
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: set_to.append(given), raising=False)
    monkeypatch.setattr(speed_rungs, "ceilings", lambda device: {"device": device.type})
    assert speed_rungs.run({"kind": "ceiling", "memory_gib": 24}) == {"device": "cuda"}
    [(share, card)] = set_to
    assert card == 0 and 23 < share * 80 < 23.5  # a card of 24 GiB, without the CUDA context


def test_a_rung_for_a_card_that_pytorch_cannot_use_is_told_and_not_run_on_the_processors(
    speed, monkeypatch, tmp_path, capsys
):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import speed_rungs
    import torch

    from loadmaster.preflight import hardware

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "local_gpus", lambda: [("NVIDIA H100 80GB HBM3", 79.65, 9.0)])
    (tmp_path / "config.json").write_text(json.dumps(speed.TINY))
    each = next(each for each in speed.bars() if each["name"] == "lora, bf16")
    (tmp_path / "rung.json").write_text(json.dumps({**each, "model": str(tmp_path), "documents": "none"}))
    speed_rungs.main(str(tmp_path / "rung.json"))
    said = capsys.readouterr().out
    assert said.startswith("ROW ") and "that PyTorch cannot use" in json.loads(said[4:])["failed"]


def test_one_rung_is_had_by_its_name(speed, tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(speed.Run, "measure", lambda self, each: measured.append((each["bar"], each["name"])))
    told = ["speed.py", "--folder", str(tmp_path), "--out", str(tmp_path / "speed.json"), "--name", "342,733"]
    monkeypatch.setattr(sys, "argv", told)
    speed.main()
    assert measured == [("bar5", "qlora, one row of 342,733 tokens in 80 GB")]
    monkeypatch.setattr(sys, "argv", [*told, "--only", "bar1"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "qlora, one row of 342,733 tokens" in capsys.readouterr().err


def test_what_the_budget_leaves_no_time_for_and_peers_that_are_not_there_are_said(speed, tmp_path, capsys):
    run = run_of(speed, tmp_path, budget=0)
    run.measure(speed.bars()[0])
    run.measure(next(each for each in speed.bars() if each["kind"] == "peer"))
    stored = json.loads((tmp_path / "speed.json").read_text())
    assert "budget" in stored["rows"][0]["not_run"] and "--peer trl=PYTHON" in stored["rows"][1]["not_run"]
    assert stored["versions"]["torch"] and stored["card"] and stored["command"].startswith("python ")
    page = (tmp_path / "speed.md").read_text()
    assert all(row["not_run"] in page for row in stored["rows"])


def test_a_package_that_is_not_there_ends_no_run(speed, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "VERSIONS", ("torch", "a-package-of-nobody"))
    monkeypatch.setattr(speed, "RESULTS", tmp_path)
    assert run_of(speed, tmp_path).about["versions"]["a-package-of-nobody"] is None


def test_a_checkpoint_may_take_longer_to_write_than_a_rung_to_run(speed, tmp_path, monkeypatch):
    limits, run = {}, run_of(speed, tmp_path, budget=1000)

    def ran(command, timeout, **_):
        limits[json.loads((tmp_path / "rung.json").read_text())["kind"]] = timeout
        return subprocess.CompletedProcess(command, 0, 'ROW {"tokens_per_second": 1.0}\n', "")

    monkeypatch.setattr(speed.subprocess, "run", ran)
    run.measure(speed.on_a_cpu(speed.bars()[1]))
    assert limits == {"checkpoint": speed.CHECKPOINT_S, "run": speed.LIMIT_S} and speed.CHECKPOINT_S > speed.LIMIT_S


def test_a_start_is_timed_from_nothing_though_the_folder_has_an_earlier_one(speed, tmp_path, monkeypatch):
    found, run = [], run_of(speed, tmp_path)
    monkeypatch.setattr(run, "placed", lambda each: {**each, "model": "tiny"})

    class Started:
        def __init__(self, command, env, **_):
            run_dir = next(Path(word.partition("=")[2]) for word in command if word.startswith("run_dir="))
            cache = Path(env["LOADMASTER_CACHE"])
            found.append((run_dir.exists(), cache.exists(), Path(env["TRITON_CACHE_DIR"]).is_relative_to(cache)))
            for folder in (run_dir, cache):
                folder.mkdir(exist_ok=True)
            (run_dir / "metrics.jsonl").write_text("{}")
            figures = {"start_s": {"load": 6.25, "total": 41.0}, "compiler_cache": {"found": 3, "made": 0}, "steps": 1}
            (run_dir / "result.json").write_text(json.dumps(figures))

        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def poll(self): ...
        def wait(self): ...

    monkeypatch.setattr(speed.subprocess, "Popen", Started)
    starts = [each for each in speed.bars() if each["kind"] == "start"]
    for each in 2 * starts:
        row = {"bar": each["bar"], "name": each["name"], "settings": each, **run.start(each)}
        assert row["first_step_s"] < 5 and "steps" not in row
        assert "load 6.2 s, total 41.0 s, 3 graphs found, 0 graphs made" in speed.page(run.about, [row])
        speed.one_line(row)
    assert found == 2 * [(False, False, True), (False, True, True)]


def test_a_second_run_adds_to_the_first_and_replaces_its_own(speed, tmp_path):
    first = run_of(speed, tmp_path, budget=0)
    for each in speed.bars()[:2]:
        first.measure(each)
    second = run_of(speed, tmp_path, budget=0)
    second.measure(speed.bars()[1])
    assert [row["name"] for row in second.rows] == [each["name"] for each in speed.bars()[:2]]


def test_a_rung_that_brings_nothing_does_not_pay(speed):
    def row(name, rate, gib):
        figures = {"tokens_per_second": rate, "trained_tokens_per_second": rate, "peak_allocated_gib": gib}
        return {"bar": "ladder", "name": name, **figures}

    rows = [row("a", 100, 10), row("b", 150, 10), row("c", 140, 12), row("d", 130, 8)]
    said = [speed.verdict(each, rows) for each in rows]
    assert said == ["", "+50%", "-7%: does not pay", "-7%, 4.0 GiB less"]


def test_a_rung_stands_beside_the_best_peer_at_its_job_and_under_the_ceiling(speed):
    rates = {
        "qlora, full checkpointing": 110, "qlora, no checkpointing": 150, "TRL, qlora": 60, "TRL with Liger, qlora": 65,
        "Unsloth, qlora": 100, "Unsloth, qlora, no checkpointing": 120, "TRL, full": 40, "full, bf16": 90,
    }
    rows = [{"bar": "ceiling", "name": "a product", "settings": {"kind": "ceiling"}, "bf16_tflops": 0.01}]
    for each in speed.bars():
        if each["name"] in rates:
            figures = dict.fromkeys(("tokens_per_second", "trained_tokens_per_second"), rates[each["name"]])
            rows.append({"bar": each["bar"], "name": each["name"], "settings": each, **figures})
            rows[-1]["plan"] = {"flops_per_token": 5e7} if each["name"] == "full, bf16" else {}
    assert len(rows) == 1 + len(rates)
    said = {row["name"]: [speed.beside_peers(row, rows), speed.of_the_ceiling(row, rows)] for row in rows}
    assert said["qlora, full checkpointing"] == ["1.10x Unsloth, qlora", ""]
    assert said["qlora, no checkpointing"] == ["1.25x Unsloth, qlora, no checkpointing", ""]
    assert said["full, bf16"] == ["2.25x TRL, full", "45% of bf16's ceiling"]
    assert said["Unsloth, qlora"] == said["a product"] == ["", ""]


def test_short_documents_are_as_long_as_instruction_data_has_them(speed, tmp_path):
    import numpy as np

    speed.write_documents(tmp_path / "short", "short", 2048, 1000)
    sizes = [len(json.loads(line)["input_ids"]) for line in (tmp_path / "short").read_text().splitlines()]
    assert 75 < np.median(sizes) < 105 and max(sizes) <= 1024
    speed.write_documents(tmp_path / "full", "full", 2048, 1000)
    assert {len(json.loads(line)["labels"]) for line in (tmp_path / "full").read_text().splitlines()} == {2048}


def test_the_loss_is_the_same_from_packing_up_and_packing_fills_the_rows(speed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import speed_rungs

    model, documents = tmp_path / "tiny", tmp_path / "short.jsonl"
    speed_rungs.make_checkpoint({"model": str(model), "config": speed.TINY})
    speed.write_documents(documents, "short", 64, 512)
    rows = []
    for each in speed.ladder()[:4]:
        placed = {**speed.on_a_cpu(each), "model": str(model), "documents": str(documents)}
        rows.append(speed_rungs.run(placed))
    assert [row["loss"] for row in rows[1:]] == pytest.approx([rows[1]["loss"]] * 3, rel=1e-5)
    assert rows[0]["padding"] > 0.1 and all(row["padding"] < 0.05 for row in rows[1:])
    assert all(row["tokens_per_second"] > row["trained_tokens_per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_a_peer_runs_in_a_process_of_its_own_beside_ours(speed, tmp_path):
    run = run_of(speed, tmp_path, budget=500)
    run.peers = {"trl": (sys.executable, None)}
    names = ("TRL, lora, its defaults", "+ fused loss")
    for each in speed.bars():
        if each["name"] in names:
            run.measure(speed.on_a_cpu(each))
    assert len(run.rows) == 2 and not any("failed" in row for row in run.rows), run.rows
    assert all(row["tokens_per_second"] > 0 for row in run.rows) and run.rows[1]["versions"]["trl"]
