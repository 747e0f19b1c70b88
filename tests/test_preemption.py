"""Real processes, real signals, the real small model: nothing is lost and nothing repeats."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, finish, metrics, start

STEPS = 9
JOB = [
    "model=smollm2_135m",
    "sequence_length=64",
    "batch.global_size=1",
    f"max_steps={STEPS}",
    "lora.dropout=0.1",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=null",
    "data.validation=null",
    "evaluation.task=none",
    "tracker=none",
    "stop_after=train",
    "hardware=cpu",
    "run_dir=run",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = finish(folder, *JOB)
    assert done.returncode == 0, done.stderr
    return metrics(folder / "run")


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 240
    while len(metrics(folder / "run")) < step:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_at_a_random_step_then_stopped_by_a_signal_the_same_command_continues_bit_for_bit(
    tmp_path, uninterrupted
):
    process = start(tmp_path, *JOB)
    wait_for_step(process, tmp_path, random.randint(3, STEPS - 4))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process = start(tmp_path, *JOB)
    wait_for_step(process, tmp_path, len(metrics(tmp_path / "run")) + 1)
    stopped_after = stop(process, tmp_path, signal.SIGTERM)
    done = finish(tmp_path, *JOB)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in (tmp_path / "log.txt").read_text()
    assert f"resuming after step {stopped_after}" in done.stdout
    assert json.loads((tmp_path / "run/result.json").read_text())["resumed_after_step"] == stopped_after
    joined = metrics(tmp_path / "run")
    assert [row["step"] for row in joined] == list(range(1, STEPS + 1))
    assert joined == uninterrupted


def stop(process, folder, number) -> int:
    """The step after which a signal stopped the run, with a checkpoint."""
    process.send_signal(number)
    assert process.wait(timeout=120) == 75
    log = (folder / "log.txt").read_text()
    assert "checkpoint saved" in log and "Traceback" not in log
    stopped_after = len(metrics(folder / "run"))
    assert (folder / "run" / "checkpoints" / f"step-{stopped_after}" / "checksums.json").exists()
    return stopped_after


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_exits_75(tmp_path):
    """What follows does not depend on which signal it was."""
    process = start(tmp_path, *JOB)
    wait_for_step(process, tmp_path, 3)
    stop(process, tmp_path, signal.SIGINT)


ENTRIES = {
    "train.py": [str(ROOT / "train.py")],
    "loadmaster": ["-m", "loadmaster", "train"],
    "on another machine": ["-m", "loadmaster.cli", "train"],
    "on several": [str(ROOT / "launch/torchrun.py"), "--nproc-per-node=1", "-m", "loadmaster.cli", "train"],
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_sigterm_while_modules_load_is_a_stop_and_not_a_failure(entry, tmp_path):
    """A scheduler puts what ends with 75 back into the queue; 143 it would give up."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *ENTRIES[entry], *JOB], cwd=tmp_path, stdout=log, stderr=log, env=environment
        )
    caught = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", caught.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert (tmp_path / "log.txt").read_text().startswith("stopped on request; the same command")
    assert not (tmp_path / "run").exists()
