"""`python train.py` with a plan for two devices starts its own workers, and ends as they do. Real processes, gloo.

Where it is of no matter how they are started, they are forks of one that has imported what they need: `forked`.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadmaster.errors import DataError, StoppedOnRequest, TrainingFailed
from loadmaster.files import write_json
from loadmaster.training.agent import WorkerKilled
from loadmaster.training.stop import StopSignal
from loadmaster.training.workers import Outcome, _judge, outcome_file
from tests.forks import Forks
from tests.runs import environment, finish, metrics, start

pytestmark = pytest.mark.slow
STEPS = 10


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks(environment())
    yield made
    made.end()


@pytest.fixture
def forked(forks, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    return lambda *words: forks.run(list(words), tmp_path, environment())


def job(base, *overrides: str) -> list[str]:
    return [
        f"model.path={base}", "hardware=cpu", "hardware.count=2", "sequence_length=64", "batch.global_size=4",
        f"max_steps={STEPS}", "data.max_rows=40", "checkpoint.every_steps=3", "evaluation.every_steps=null",
        "evaluation.task=none", "tracker=none", "stop_after=train", "run_dir=run", "micro_batch_size=1",
        "sharding=fsdp", *overrides,
    ]


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 240
    while len(metrics(folder / "run")) < step:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def slow(tmp_path: Path) -> list[str]:
    """Words that make the run long enough to be met in the middle of it."""
    return ["max_steps=20000", "checkpoint.every_steps=5000"]


def test_a_signal_to_the_lead_saves_on_all_ranks_exits_75_and_another_number_of_processes_goes_on(
    few_words, tmp_path, forks
):
    process = start(tmp_path, *job(few_words, *slow(tmp_path)))
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    log = (tmp_path / "log.txt").read_text()
    assert "checkpoint saved" in log and "Traceback" not in log
    done = len(metrics(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{done}" / "checksums.json").is_file()
    # max_steps is part of what shapes the weights: the same job, on one process instead of two.
    process = forks.start(job(few_words, *slow(tmp_path), "hardware.count=1", "sharding=none"), tmp_path, environment())
    wait_for_step(process, tmp_path, done + 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert f"resuming after step {done} of" in (tmp_path / "log.txt").read_text()


def test_a_signal_to_one_worker_stops_all_of_them(few_words, tmp_path, forks):
    process = forks.start(job(few_words, *slow(tmp_path)), tmp_path, environment())
    wait_for_step(process, tmp_path, 2)
    os.kill(workers_of(process.pid)[-1], signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    assert "checkpoint saved" in (tmp_path / "log.txt").read_text()


def test_killing_the_lead_leaves_no_workers(few_words, tmp_path):
    process = start(tmp_path, *job(few_words, *slow(tmp_path)))
    wait_for_step(process, tmp_path, 2)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers are left"
        time.sleep(0.1)


def test_a_killed_worker_ends_the_job_with_4_and_a_sentence(few_words, tmp_path, forks):
    process = forks.start(job(few_words, *slow(tmp_path)), tmp_path, environment())
    wait_for_step(process, tmp_path, 2)
    os.kill(workers_of(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=120) == 4
    log = (tmp_path / "log.txt").read_text()
    assert "SIGKILL" in log and "Traceback" not in log


@pytest.mark.parametrize(
    "first, failure, codes, wanted",
    [
        (75, None, {0: (4, False), 1: (75, True)}, StoppedOnRequest),  # its time was over: rank 0 missed it
        (2, None, {0: (2, False), 1: (75, True)}, DataError),  # rank 1 was ended because of rank 0
        (4, WorkerKilled(1, "rank 1 was ended by SIGKILL"), {0: (75, True)}, TrainingFailed),
        (4, WorkerKilled(1, "rank 1 was ended by SIGKILL"), {0: (4, False)}, TrainingFailed),
        (0, None, {0: (75, False), 1: (75, False)}, StoppedOnRequest),  # agreed
        (75, StoppedOnRequest("while starting"), {}, StoppedOnRequest),
    ],
)
def test_who_failed_first_is_the_cause_and_not_who_was_ended_for_it(first, failure, codes, wanted, tmp_path):
    for rank, (code, stop) in codes.items():
        write_json(outcome_file(tmp_path, rank), vars(Outcome(code, f"rank {rank} says", stop=stop)))
    with pytest.raises(wanted) as raised:
        _judge(tmp_path, 2, first, failure, StopSignal())
    if isinstance(failure, WorkerKilled):
        assert "SIGKILL" in str(raised.value) and "rank-1.log" in str(raised.value)


def test_a_workers_own_error_reaches_the_user_with_its_exit_code(few_words, tmp_path):
    done = finish(tmp_path, *job(few_words, "tracker=none", "tracker.name=mlflow"))
    assert done.returncode == 2
    assert "pip install mlflow" in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_8_bit_states_of_two_processes_go_on_in_one(few_words, tmp_path, forked):
    words = job(few_words, "optimizer.name=adamw_8bit", "method=full", "max_steps=8", "checkpoint.every_steps=4")
    done = forked(*words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    together = [row["loss"] for row in metrics(run)]
    assert "the loop waited" in done.stdout
    saves = json.loads((run / "result.json").read_text())["checkpoints"]
    assert saves["count"] == 2 and saves["behind"] and 0 < saves["stall_s_mean"] <= saves["stall_s_max"]
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-8")
    done = forked(*words, "hardware.count=1", "sharding=none")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 4 of 8" in done.stdout
    assert [row["loss"] for row in metrics(run)] == pytest.approx(together, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_preference_pairs_on_two_processes_are_compared_with_the_base_and_saved_as_on_one(
    tiny, tmp_path, forked, method
):
    """The reference pass switches the adapter off while layers are whole: their shards are still what is trained. Of
    all weights the base is asked before the first step, each process for its part."""
    words = [
        "data=ticket_pairs", "sequence_length=256", "batch.global_size=8", "max_steps=4", "checkpoint.every_steps=2",
        "evaluation.every_steps=2", f"method={method}",
    ]
    done = forked(*job(tiny, *words))
    assert done.returncode == 0, done.stderr
    assert ("reference of the validation answers" in done.stdout) == (method == "full")
    assert not json.loads((tmp_path / "run" / "plan.json").read_text())["reshard_after_forward"]
    alone = forked(*job(tiny, *words, "hardware.count=1", "sharding=none", "run_dir=alone"))
    assert alone.returncode == 0, alone.stderr
    several, one = (metrics(tmp_path / name) for name in ("run", "alone"))
    for key in ("loss", "grad_norm", "reward_margin"):
        assert [row[key] for row in several] == pytest.approx([row[key] for row in one], rel=1e-5, abs=1e-6), key
    assert several[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("trained", "own"),
    [
        ("adapter", ["method=lora", "data.max_rows=11", "data.packing=false", "sequence_length=128"]),
        pytest.param("model", ["method=full", "data.max_rows=22", "sequence_length=256"], marks=pytest.mark.slow),
    ],
)
def test_labelled_answers_on_two_processes_count_as_on_one_and_a_resumed_run_goes_on_as_it_was(
    tiny, tmp_path, forked, trained, own
):
    """One answer a micro-batch, which tells no move, or two; the second step of an epoch has three rows for two
    processes."""
    words = [
        "data=ticket_labels", "batch.global_size=8", "max_steps=4", "checkpoint.every_steps=2",
        "evaluation.every_steps=2", *own,
    ]
    done = forked(*job(tiny, *words))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    alone = forked(*job(tiny, *words, "hardware.count=1", "sharding=none", "run_dir=alone"))
    assert alone.returncode == 0, alone.stderr
    several, one = (metrics(folder) for folder in (run, tmp_path / "alone"))
    assert one[-1]["tokens"] == 2 * one[1]["tokens"] and one[0]["tokens"] > 2 * (one[1]["tokens"] - one[0]["tokens"])
    rewards = ("reward_desirable", "reward_undesirable")
    assert all(any(key in row for row in one) for key in rewards)  # a step may have rows of one label alone
    for key in ("loss", "grad_norm", *rewards):
        found, expected = ([row.get(key, math.nan) for row in rows] for rows in (several, one))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), key
    assert several[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)

    shutil.rmtree(tmp_path / "alone" / trained)
    shutil.rmtree(tmp_path / "alone" / "checkpoints" / "step-4")
    alone = forked(*job(tiny, *words, "hardware.count=1", "sharding=none", "run_dir=alone"))
    assert alone.returncode == 0 and "resuming after step 2 of 4" in alone.stdout, alone.stderr
    assert metrics(tmp_path / "alone") == one


def test_zero3_begins_with_the_weights_that_were_there_before_the_rehearsal(tiny, tmp_path, forked):
    """The tiny model's embeddings are too large to be kept whole on every rank, as a real one's are."""
    words = ["method=full", "max_steps=2"]
    assert forked(*job(tiny, *words, "sharding=zero3")).returncode == 0
    alone = forked(*job(tiny, *words, "hardware.count=1", "sharding=none", "run_dir=alone"))
    assert alone.returncode == 0, alone.stderr
    several, one = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("run", "alone"))
    assert several == pytest.approx(one, rel=1e-5)


def test_two_workers_train_evaluate_and_leave_what_one_process_leaves(few_words, tmp_path):
    done = finish(
        tmp_path, *job(few_words, "stop_after=evaluate", "evaluation.task=json_fields", "evaluation.max_rows=3",
                       "evaluation.max_new_tokens=4", "method=full"),
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert (run / "model" / "model.safetensors").is_file()
    assert json.loads((run / "eval.json").read_text())["after"]["held_out"]["tokens"] > 0
    assert {"rank-0.log", "rank-1.log"} <= {path.name for path in (run / "logs").iterdir()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS and all(len(row["step_s_by_rank"]) == 2 for row in rows)


def test_workers_share_the_threads_that_this_process_may_use(monkeypatch):
    from loadmaster.training.agent import Workers, _defaults

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert [_defaults(Workers(count, []))["OMP_NUM_THREADS"] for count in (8, 32)] == ["2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert "OMP_NUM_THREADS" not in _defaults(Workers(8, []))
