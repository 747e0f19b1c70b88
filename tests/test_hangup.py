"""A terminal that closes: real runs on real pseudo-terminals, whose other end goes away in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster.files import read_json
from tests.runs import command, environment, metrics
from tests.terminal import OnTerminal

JOB = [
    "hardware=cpu", "sequence_length=64", "data.max_rows=24", "batch.global_size=2", "checkpoint.every_steps=5000",
    "evaluation.every_steps=null", "evaluation.task=none", "tracker=none", "stop_after=train", "run_dir=run",
]


def words(model: Path, steps: int, *overrides: str) -> list[str]:
    return [f"model.path={model}", *JOB, f"max_steps={steps}", *overrides]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("hardware.count=2", "sharding=fsdp", "micro_batch_size=1")])
def test_a_run_whose_terminal_closes_saves_a_checkpoint_and_the_same_command_goes_on(more, few_words, tmp_path):
    run = tmp_path / "run"
    there = OnTerminal(command(*words(few_words, 5000, *more)), tmp_path)
    there.until(lambda: len(metrics(run)) >= 3)
    there.close()
    assert there.code() == 75
    done = len(metrics(run))
    assert 3 <= done < 5000 and (run / "checkpoints" / f"step-{done}" / "checksums.json").is_file()
    assert read_json(run / "result.json").get("failure") is None
    again = OnTerminal(command(*words(few_words, 5000, *more)), tmp_path)
    again.until(lambda: len(metrics(run)) >= done + 2)
    again.process.send_signal(signal.SIGHUP)  # from elsewhere: this terminal is there, and is spoken to
    assert again.code() == 75
    assert f"resuming after step {done} of" in again.said
    assert "checkpoint saved" in again.said and "stopped on request" in again.said


@pytest.mark.slow
def test_what_nohup_starts_trains_to_its_end_without_its_terminal(few_words, tmp_path):
    """And writes to a terminal that is gone, where a shell has SIGHUP ignored and redirects nothing."""
    there = OnTerminal(command(*words(few_words, 60)), tmp_path, nohup=True)
    there.until(lambda: len(metrics(tmp_path / "run")) >= 3)
    there.close()
    assert there.code() == 0
    assert len(metrics(tmp_path / "run")) == 60 and (tmp_path / "run/adapter").is_dir()


def test_a_terminal_that_closes_while_modules_load_is_a_stop(tmp_path):
    there = OnTerminal(command("run_dir=run"), tmp_path)
    caught = Path(f"/proc/{there.process.pid}/status")

    def listens() -> bool:
        mask = next(line for line in caught.read_text().splitlines() if line.startswith("SigCgt:"))
        return bool(int(mask.split()[1], 16) >> (signal.SIGHUP - 1) & 1)

    there.until(listens)
    there.close()
    assert there.code() == 75
    assert not (tmp_path / "run").exists()


SPEAKER = """
import os, sys, time
from pathlib import Path
from loadmaster.streams import Output, settle_streams
settle_streams()
print("there", flush=True)
while not Path("closed").exists():
    time.sleep(0.01)
print("a line")
print("another", file=sys.stderr)
Output().print("a third")
os.write(1, b"from below")  # as native code and children do
sys.stdout.write("the end of a line, which is written when Python ends")
Path("spoken").touch()
"""


def test_what_is_written_to_a_terminal_that_is_gone_goes_nowhere(tmp_path):
    there = OnTerminal([sys.executable, "-c", SPEAKER], tmp_path, nohup=True)
    there.until(lambda: "there" in there.said)
    there.close()
    (tmp_path / "closed").touch()
    assert there.code() == 0 and (tmp_path / "spoken").exists()


def test_a_disk_that_fails_under_a_log_is_no_terminal_that_is_gone(tmp_path):
    """Only terminals are forgiven."""
    said = tmp_path / "log"
    code = (
        "import sys; from loadmaster.streams import settle_streams; before = sys.stdout; settle_streams(); "
        "print(before is sys.stdout)"
    )
    with open(said, "w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True, env=environment())
    assert said.read_text() == "True\n"
