"""`launch=slurm`, launch/slurm.sbatch and srun on a real Slurm of two nodes, and mpirun: training, stops, resumes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch import real_slurm
from tests.runs import ROOT, environment, metrics

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if said := real_slurm.missing():
        pytest.skip(said)
    with real_slurm.cluster(tmp_path_factory.mktemp("slurm")) as env:
        yield {**environment(), "SLURM_CONF": env["SLURM_CONF"], "MASTER_ADDR": "127.0.0.1"}


def words(tiny: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"model.path={tiny}", "hardware=cpu", "hardware.count=1", "hardware.nodes=2", "sequence_length=64",
        "batch.global_size=4", "micro_batch_size=1", f"max_steps={STEPS}", "data.max_rows=40",
        "checkpoint.every_steps=4", "evaluation.every_steps=null", "evaluation.task=none", "tracker=none",
        "stop_after=train", f"run_dir={folder / 'run'}", *more,
    ]


def launch(tiny: Path, folder: Path, env: dict[str, str], *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *words(tiny, folder, *more), "launch=slurm"]
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)


def said(folder: Path) -> str:
    logs = [*folder.glob("**/slurm.log"), folder / "log.txt"]
    return "\n".join(path.read_text() for path in logs if path.exists())


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while len(metrics(folder / "run")) < step:
        assert process.poll() is None and time.monotonic() < deadline, said(folder)
        time.sleep(0.05)


def test_two_nodes_train_and_the_exit_code_comes_back(tiny, tmp_path, slurm):
    process = launch(tiny, tmp_path, slurm)
    assert process.wait(timeout=400) == 0, said(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert "2 ranks on 2 nodes" in log and f"step {STEPS} of {STEPS}" in log
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["hardware"]["nodes"] == 2


def test_sigterm_of_slurm_saves_requeues_and_goes_on_to_the_end(tiny, tmp_path, slurm):
    """What Slurm does before a time limit and on preemption, by hand: SIGTERM to every task."""
    process = launch(tiny, tmp_path, slurm, "max_steps=60", "checkpoint.every_steps=500")
    wait_for_step(process, tmp_path, 5)
    job = (tmp_path / "log.txt").read_text().split("submitted job ")[1].split(";")[0]
    subprocess.run(["scancel", "--signal=TERM", job], env=slurm, check=True)
    assert process.wait(timeout=600) == 0, said(tmp_path)
    log = said(tmp_path)
    assert "checkpoint saved" in log and "resuming after step" in log
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 61))


def test_ctrl_c_at_the_launcher_saves_and_leaves_nothing_in_the_queue(tiny, tmp_path, slurm):
    process = launch(tiny, tmp_path, slurm, "max_steps=5000", "checkpoint.every_steps=500")
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 75, said(tmp_path)
    assert "checkpoint saved" in said(tmp_path)
    queue = subprocess.run(["squeue", "-h", "-t", "PD,R"], env=slurm, capture_output=True, text=True, check=True)
    assert queue.stdout == ""
    done = len(metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{done}" / "checksums.json").is_file()


def test_the_batch_script_by_hand(tiny, tmp_path, slurm):
    command = [
        "sbatch", "--wait", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path}/log.txt",
        str(ROOT / "launch" / "slurm.sbatch"), *words(tiny, tmp_path),
    ]
    env = {**slurm, "PYTHON": sys.executable, "NPROC_PER_NODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=400, check=False)
    assert done.returncode == 0, said(tmp_path)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_srun_alone_with_a_task_for_each_process_joins_that_world(tiny, tmp_path, slurm):
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "train.py", *words(tiny, tmp_path)]
    with open(tmp_path / "log.txt", "w") as log:
        done = subprocess.run(command, cwd=ROOT, env=slurm, stdout=log, stderr=log, timeout=400, check=False)
    assert done.returncode == 0, said(tmp_path)
    assert "2 ranks on 2 nodes" in said(tmp_path)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun (apt-get install openmpi-bin)")
def test_open_mpis_mpirun_joins_as_well(tiny, tmp_path):
    command = [
        "mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "train.py",
        *words(tiny, tmp_path, "hardware.count=2", "hardware.nodes=1"),
    ]
    with open(tmp_path / "log.txt", "w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=log, stderr=log, timeout=400, check=False)
    assert done.returncode == 0, said(tmp_path)
    assert "2 ranks on 1 node" in said(tmp_path)
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
