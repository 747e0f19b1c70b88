from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.export.process import LAUNCHER_VARIABLES, answering_s, run_step


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Run the given source as a step: its module sees `spec`; returns the result, with the progress in `lines`."""
    monkeypatch.syspath_prepend(tmp_path)
    lines: list[str] = []

    def run(source: str, timeout_s: float = 60):
        (tmp_path / "a_step.py").write_text(
            "import os, sys, time\nfrom loadmaster.errors import DataError\n"
            "from loadmaster.export.process import progress, read_spec, step, write_result\n"
            f"def main(arguments):\n    spec = read_spec(arguments)\n    {source}\nstep(main, sys.argv[1:])\n"
        )
        return run_step("a_step", {"number": 7}, tmp_path, timeout_s, lines.append)

    run.lines = lines
    return run


def test_a_step_gets_its_spec_reports_progress_and_gives_its_result(step):
    source = (
        "print('noise'); progress('half way'); write_result(spec, {'twice': 2 * spec['number'], 'nan': float('nan')})"
    )
    result = step(source)
    assert result["twice"] == 14 and result["nan"] != result["nan"]
    assert step.lines == ["half way"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("progress('loading x'); raise RuntimeError('boom 17')", r"exit code 1, at: loading x(.|\n)*boom 17"),
        ("raise DataError('line 3 is empty')", r"exit code 2, at: starting\nline 3 is empty$"),
        ("os.kill(os.getpid(), 11)", "signal 11"),
        ("os.kill(os.getpid(), 9)", "ran out of memory"),
        ("pass", "exit code 0"),
    ],
    ids=["exception", "error of the user's", "crash", "killed", "no result"],
)
def test_however_a_step_dies_is_an_export_rejected_with_what_it_said(step, source, message):
    with pytest.raises(ExportRejected, match=message):
        step(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory')",
            r"starting\nout of GPU memory in the export stage(.|\n)*evaluation.batch_size, or on a larger card$",
        ),
        (
            "from loadmaster.models.spread import NoRoom; raise NoRoom('one layer is larger')",
            r"could not be done, at: starting\none layer is larger$",
        ),
        ("raise OSError(28, 'No space left on device')", r"could not be done, at: starting\nthe disk is full"),
    ],
    ids=["a full card", "no room", "a full disk"],
)
def test_what_the_machine_lacks_says_nothing_of_the_export(step, source, message):
    with pytest.raises(LoadmasterError, match=message) as caught:
        step(source)
    assert caught.value.exit_code == LoadmasterError.exit_code


def test_a_step_that_hangs_is_ended_and_said_to_hang(step):
    with pytest.raises(ExportRejected, match="did not finish in 5 s, at: waiting"):
        step("progress('waiting'); time.sleep(600)", timeout_s=5)


def test_a_request_to_stop_that_reaches_a_step_is_for_who_started_it_to_heed(step):
    """A scheduler tells every process; the step's end would else be an export that failed."""
    assert step("os.kill(os.getpid(), 15); os.kill(os.getpid(), 2); write_result(spec, 'goes on')") == "goes on"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_long_answers_of_a_large_model_on_a_slow_machine_are_no_hang():
    """70B in bf16: a CPU with 50 GB/s of memory needs 2.8 s a token; a card with 300 GB/s (L4) 0.5 s."""
    for device, bandwidth in (("cpu", 50e9), ("cuda", 300e9)):
        assert answering_s(2048, 140_000_000_000, device) > 2 * 2048 * 140e9 / bandwidth
    assert answering_s(2048, 16_000_000_000, "cuda") < 1800  # a card that hangs is not paid for all day


def test_a_step_does_not_join_the_launchers_process_group(step, monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    seen = set(step("write_result(spec, sorted(os.environ))"))
    assert not seen & {*LAUNCHER_VARIABLES, "TORCHELASTIC_RUN_ID"}
    assert "PATH" in seen and "RANK" in os.environ


STARTER = """
import sys
from contextlib import suppress
from pathlib import Path
from loadmaster.export.process import run_step
run_step("a_step", {}, Path(sys.argv[1]), 600, lambda line: print(line, flush=True))
"""


def test_a_step_ends_when_the_process_that_started_it_is_killed(tmp_path):
    (tmp_path / "a_step.py").write_text(
        "import os, sys, time\nfrom loadmaster.export.process import progress, step\n"
        "step(lambda arguments: (progress(str(os.getpid())), time.sleep(600)), sys.argv[1:])\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    of_step = Path(f"/proc/{int(starter.stdout.readline())}/stat")
    assert of_step.exists()
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 120
    with suppress(OSError):  # it is gone
        # Whoever takes orphans over may be slow to reap one: a zombie has ended.
        while of_step.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)
