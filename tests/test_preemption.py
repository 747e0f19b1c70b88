"""Real processes, real signals, the real small model: nothing is lost and nothing repeats."""

import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.runs import finish, metrics, start

STEPS = 9
JOB = [
    "model=smollm2_135m",
    "sequence_length=128",
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


def test_kill_9_at_a_random_step_then_the_same_command_continues_bit_for_bit(tmp_path, uninterrupted):
    process = start(tmp_path, *JOB)
    wait_for_step(process, tmp_path, random.randint(3, STEPS - 2))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = finish(tmp_path, *JOB)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    joined = metrics(tmp_path / "run")
    assert [row["step"] for row in joined] == list(range(1, STEPS + 1))
    assert joined == uninterrupted


def test_sigterm_while_modules_load_is_a_stop_and_not_a_failure(tmp_path):
    """A scheduler puts what ends with 75 back into the queue; 143 it would give up."""
    process = start(tmp_path, *JOB)
    caught = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", caught.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "log.txt").read_text().startswith("stopped on request; the same command")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_a_checkpoint_and_exits_75(tmp_path, uninterrupted, number):
    process = start(tmp_path, *JOB)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75
    log = (tmp_path / "log.txt").read_text()
    assert "checkpoint saved" in log and "Traceback" not in log
    stopped_after = len(metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped_after}" / "checksums.json").exists()
    if number == signal.SIGTERM:  # once is enough: what follows a signal does not depend on which one it was
        done = finish(tmp_path, *JOB)
        assert done.returncode == 0 and f"resuming after step {stopped_after}" in done.stdout
        assert metrics(tmp_path / "run") == uninterrupted
