"""A rank that is stuck, stopped, killed or fails ends the job on every rank, in bounded time, and is named."""

import gc
import io
import re
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loadmaster.errors import LoadmasterError, StoppedOnRequest, TrainingFailed
from loadmaster.training.liveness import (
    LONG_PHASE_S,
    PREPARE,
    STEP_FACTOR,
    STEP_FLOOR_S,
    WRITER,
    Beat,
    Sighting,
    age,
    judge,
    limit_s,
    printer,
    see,
    straggler_message,
    stragglers,
)
from loadmaster.training.stop import StopSignal
from loadmaster.training.watchdog import Watchdog, as_they_begin, is_communication
from loadmaster.training.world import World
from loadmaster.world_stages import StageRun
from tests.training.processes import run_ranks

SCRIPT = Path(__file__).with_name("watched.py")


def sightings(nodes=2, per_node=2, **odd):
    """Ranks that work at step 12, heard of just now; odd: rank -> what is different, a beat's or a sighting's field."""
    made = []
    for rank in range(nodes * per_node):
        other = odd.get(f"rank{rank}", {})
        beat = Beat(rank, rank // per_node, f"gpu{rank // per_node}", count=9, mark=3, step=12, phase="update")
        beat = replace(beat, **{k: v for k, v in other.items() if k in Beat.__dataclass_fields__})
        made.append(Sighting(beat, **{k: v for k, v in other.items() if k in ("quiet_s", "idle_s")}))
    return made


IDLE = {"idle_s": 400.0}


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({}, None),
        # A rank that has waited long is well as long as another one goes on: that one is slow, or saves.
        ({"rank0": IDLE, "rank1": IDLE, "rank2": IDLE}, None),
        (
            {"rank0": IDLE, "rank1": IDLE, "rank2": {**IDLE, "mark": 1, "phase": "data", "where": "rows.py:7 in read"},
             "rank3": IDLE},
            "no progress for 400 s: rank 2 on node 1 (gpu1) is still at step 12 in data, rows.py:7 in read; "
            "ranks 0, 1, 3 wait for it",
        ),
        # Saving may take longer than a step.
        ({"rank0": {**IDLE, "mark": 1, "phase": "save"}, "rank1": IDLE, "rank2": IDLE, "rank3": IDLE}, None),
        (
            {"rank2": {"quiet_s": 61.0}, "rank3": {"quiet_s": 62.0}},
            "node 1 (host gpu1, ranks 2 to 3) has given no sign of life for 62 s: the host, its network or all of its "
            "processes are gone (rank 2 was last seen at step 12 in update; rank 3 was last seen at step 12 in update)",
        ),
        (
            {"rank2": {"quiet_s": 61.0}},
            "rank 2 on node 1 (gpu1) has given no sign of life for 61 s: the process was killed, stopped or is stuck "
            "(rank 2 was last seen at step 12 in update)",
        ),
        ({"rank2": {"quiet_s": 900.0, "state": "done"}}, None),
        ({"rank3": {"state": "ended", "reason": "rank 3 on node 1 (gpu1) failed: the disk is full"}},
         "rank 3 on node 1 (gpu1) failed: the disk is full"),
    ],
)
def test_what_is_wrong_is_said_with_names(odd, said):
    assert judge(sightings(**odd), silence_s=60.0, hang_s=None, slowest_step_s=2.0) == said


def test_every_rank_at_the_same_point_is_no_rank_s_fault():
    said = judge(sightings(**{f"rank{r}": IDLE for r in range(4)}), 60.0, None, 2.0)
    assert said.startswith("no progress for 400 s: every rank is at the same point, and none goes on (rank 0 on node 0")


def test_the_limit_follows_the_steps_unless_it_is_set():
    assert limit_s("forward", None, 2.0) == STEP_FLOOR_S
    assert limit_s("forward", None, 60.0) == 1200.0
    assert limit_s("save", None, 2.0) == LONG_PHASE_S
    assert limit_s("forward", 30.0, 60.0) == 30.0
    assert (limit_s("save", 30.0, 2.0), limit_s("save", 7200.0, 2.0)) == (LONG_PHASE_S, 7200.0)


def test_a_long_first_step_is_not_taken_for_one_that_hangs():
    """16 micro-batches of a 70B model over what host memory sends: minutes, and no step before to go by."""
    watch = Watchdog(World(), None)
    in_step = {f"rank{r}": {"idle_s": 400.0, "step": 1, "phase": "step"} for r in range(4)}
    assert judge(sightings(**in_step), 60.0, None, watch.slowest_s)
    watch.expect(16 * 12.0)
    assert judge(sightings(**in_step), 60.0, None, watch.slowest_s) is None
    assert limit_s("step", None, watch.slowest_s) == STEP_FACTOR * 16 * 12.0
    watch.at(1, "step")
    watch.at(2, "step")  # one was seen, and it took no time
    assert limit_s("step", None, watch.slowest_s) == STEP_FLOOR_S


def test_ages_go_by_the_reader_s_clock():
    first = see(None, Beat(0, 0, "a", count=1), 99.0)
    assert (first.quiet_s, first.idle_s) == (0.0, 0.0)
    beats_on = see(first, Beat(0, 0, "a", count=2), 5.0)
    assert (beats_on.quiet_s, beats_on.idle_s) == (0.0, 5.0)
    silent = see(beats_on, Beat(0, 0, "a", count=2), 5.0)
    assert (silent.quiet_s, silent.idle_s) == (5.0, 10.0)
    assert see(silent, Beat(0, 0, "a", count=3, step=1), 5.0).idle_s == 0.0
    assert age(silent, 7.0).quiet_s == 12.0


def test_outside_steps_a_rank_moves_on_as_long_as_its_stack_changes():
    """Loading and evaluating can take hours, and nothing there counts."""
    before = Sighting(Beat(0, 0, "a", phase="load", stack=1), idle_s=900.0)
    assert see(before, Beat(0, 0, "a", phase="load", stack=2), 5.0).idle_s == 0.0
    assert see(before, Beat(0, 0, "a", phase="load", stack=1), 5.0).idle_s == 905.0
    step = Sighting(Beat(0, 0, "a", phase="step", stack=1), idle_s=900.0)
    assert see(step, Beat(0, 0, "a", phase="step", stack=2), 5.0).idle_s == 905.0


def test_what_is_prepared_in_threads_and_processes_may_take_hours_and_who_is_gone_is_still_named():
    """A download and a pool of processes leave the main thread at one line."""
    seen = [Sighting(Beat(rank, 0, "a", phase=PREPARE), idle_s=20_000.0) for rank in range(2)]
    assert judge(seen, 60.0, 60.0, 0.0) is None
    assert "no sign of life" in judge([replace(seen[0], quiet_s=61.0), seen[1]], 60.0, None, 0.0)


def test_a_stage_prepares_in_that_phase(tmp_path, monkeypatch):
    class Materials:
        @property
        def prepared(self):
            passed.append("prepared")
            return SimpleNamespace(summary={"train": None, "validation": None})

    passed = []
    monkeypatch.setattr(Watchdog, "at", lambda self, step, phase: passed.append(phase))
    (tmp_path / "plan.json").touch()
    none, launch = SimpleNamespace(name="none"), SimpleNamespace(hang_timeout_s="auto")
    job = SimpleNamespace(launch=launch, stop_after="train", tracker=none)
    plan, stop = SimpleNamespace(
        compile=False, optimizer="adamw", offload="none", method="lora", precision="bf16", master_weights=True,
        sharding="none", model=SimpleNamespace(vocabulary_size=1),
    ), StopSignal()
    stop.requested = True
    with pytest.raises(StoppedOnRequest):
        StageRun(job, plan, tmp_path, World(), stop, None, Materials()).run("train")
    assert passed == [PREPARE, "prepared", "prepared", "start"]  # made, and looked through


@pytest.mark.parametrize(
    ("plan", "headers", "said"),
    [
        ({"compile": True}, True, "decoder layers cannot be compiled: a C compiler .* compile=false"),
        ({"optimizer": "adamw_bf16"}, True, "adamw_bf16 cannot be compiled: a C compiler .* another optimizer"),
        ({"compile": True}, False, "decoder layers cannot be compiled: Python's headers"),
        ({"compile": True, "optimizer": "adamw_bf16"}, True, "cannot .* compile=false.* and another optimizer"),
        ({}, True, None),
    ],
)
def test_without_a_compiler_nothing_is_downloaded_for_a_gpu(tmp_path, monkeypatch, plan, headers, said):
    from loadmaster.models import compiled

    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    if headers:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", "cc")
        monkeypatch.setattr(compiled.sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    (tmp_path / "plan.json").touch()
    job = SimpleNamespace(launch=SimpleNamespace(hang_timeout_s="auto"))
    plan = SimpleNamespace(**{"compile": False, "optimizer": "adamw", "offload": "none", **plan})
    stage = StageRun(job, plan, tmp_path, World(device=torch.device("cuda", 0)), StopSignal(), None, None)
    if said is None:
        return stage._refuse_missing_compiler()
    with pytest.raises(LoadmasterError, match=re.compile(said, re.DOTALL)):
        stage.run("train")
    monkeypatch.setenv("C_INCLUDE_PATH" if not headers else "CC", "cc")
    stage._refuse_missing_compiler()
    monkeypatch.setattr(compiled, "missing_for_a_gpu", None)  # a CPU's compiler is asked for when it is needed
    StageRun(job, plan, tmp_path, World(), StopSignal(), None, None)._refuse_missing_compiler()


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_what_is_compiled_for_the_host_asks_for_a_cpp_compiler(tmp_path, monkeypatch, offload):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setenv("C_INCLUDE_PATH", "here")
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    plan = SimpleNamespace(compile=True, optimizer="adamw", offload=offload)
    stage = StageRun(None, plan, tmp_path, World(device=torch.device("cuda", 0)), StopSignal(), None, None)
    if offload == "none":
        return stage._refuse_missing_compiler()
    with pytest.raises(LoadmasterError, match=r"(?s)cannot be compiled: a C\+\+ compiler .* gcc g\+\+ "):
        stage._refuse_missing_compiler()
    monkeypatch.setenv("CXX", "c++")
    stage._refuse_missing_compiler()


def test_a_beat_survives_the_way_through_the_store():
    beat = Beat(3, 1, "gpu1", 5, 2, 12, "forward", "loop.py:3 in f", 77, 0.25, "ended", "because")
    assert Beat.decode(beat.encode()) == beat


@pytest.mark.parametrize(
    ("busy_s", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.1], []),
        ([1.0, 1.0, 1.5, 1.0], [2]),
        ([1.0, 1.5], [1]),
        ([1.0, 3.0, 1.0, 2.0], [1, 3]),
        ([0.0, 0.0, 1.0], []),
        ([1.0], []),
    ],
)
def test_the_straggler_is_who_takes_longer_than_most(busy_s, slow):
    assert stragglers(busy_s) == slow


def test_a_straggler_is_named():
    odd = {f"rank{r}": {"busy_s": 0.9 if r == 2 else 0.5} for r in range(4)}
    assert straggler_message(sightings(**odd)) == (
        "straggler: rank 2 on node 1 (gpu1) (0.900 s a step); the others' own part of a step takes 0.500 s"
    )
    assert straggler_message(sightings()) is None


def test_the_same_straggler_is_told_of_once_however_its_figures_change():
    watch, told = Watchdog(World(), None), []
    usual = {f"rank{r}": {"busy_s": 0.5} for r in range(4)}
    for busy_s in (0.9, 0.95, 0.5, 0.9):
        watch._sightings = {s.beat.rank: s for s in sightings(**usual | {"rank2": {"busy_s": busy_s}})}
        told.append(watch.straggler() is not None)
    assert told == [True, False, False, False]


def test_one_rank_of_each_host_speaks():
    beats = [s.beat for s in sightings()]
    assert (printer(beats, 0, set()), printer(beats, 1, set())) == (0, 2)
    assert (printer(beats, 1, {2}), printer(beats, 1, {2, 3})) == (3, None)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:31112"), True),
        (RuntimeError("NCCL communicator was aborted on rank 3"), True),
        (ConnectionResetError("reset"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TrainingFailed("the socket wrench is missing"), False),
    ],
)
def test_an_error_of_communication_is_told_from_one_s_own(error, is_it):
    assert is_communication(error) is is_it


def test_alone_there_is_nothing_to_watch(tmp_path):
    with Watchdog(World(), tmp_path / "logs") as watch:
        watch.at(1, "forward")
    assert watch.straggler() is None and not (tmp_path / "logs").exists()


def test_who_waits_for_a_writer_that_gets_on_is_not_stuck():
    """The last checkpoint of a large model: the main thread waits at one line, the writer goes from file to file."""
    written, go_on = threading.Event(), threading.Event()

    def write():
        written.wait()
        go_on.wait()

    writer = threading.Thread(target=write, name=WRITER)
    writer.start()
    watch = Watchdog(World(), None)
    seen = [watch._publish().stack for _ in range(2)]
    written.set()
    while seen[-1] == (now := watch._publish().stack):
        time.sleep(0.01)
    go_on.set()
    writer.join()
    assert seen[0] == seen[1] != now


def test_looking_where_threads_are_keeps_nothing_of_theirs():
    """Frames that were looked at are in no cycle: what a step made would stay on the GPU until cycles are collected."""
    asked, go_on, made = threading.Event(), threading.Event(), []

    def step():
        buffer = torch.zeros(8)
        made.append(weakref.ref(buffer))
        asked.set()
        go_on.wait()

    thread = threading.Thread(target=step)
    gc.disable()
    try:
        thread.start()
        asked.wait()
        Watchdog(World(), None)._publish()
        go_on.set()
        thread.join()
        assert made[0]() is None
    finally:
        gc.enable()


def test_who_keeps_the_store_and_is_stopped_is_not_waited_for_as_a_stage_ends(monkeypatch):
    watch, answer, ended = Watchdog(World(1, 2), None, silence_s=0.1), threading.Event(), []
    watch._heard, watch._stack_file = time.monotonic(), io.StringIO()
    watch._sightings = {0: Sighting(Beat(0, 0, "first")), 1: Sighting(watch._beat)}
    watch._threads = [threading.Thread(target=answer.wait)]
    watch._threads[0].start()
    monkeypatch.setattr(watch, "_end", lambda said: (ended.append(said), answer.set()))
    guard = threading.Timer(20, answer.set)
    guard.start()
    watch.__exit__(None, None, None)
    guard.cancel()
    assert len(ended) == 1 and "rank 0" in ended[0]


def run(tmp_path, how, bad_rank, size=4, local_size=2, **more):
    return run_ranks(
        SCRIPT, how, str(bad_rank), str(tmp_path / "logs"), size=size, local_size=local_size, folder=tmp_path, **more
    )


def stacks(tmp_path):
    return {file.name: file.read_text() for file in sorted((tmp_path / "logs").glob("*.stack"))}


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_and_every_stack_is_written(tmp_path):
    done = run(tmp_path, "sleep", 1, size=2, local_size=1)
    assert done.codes == [4, 4], done.output
    for output in done.output:  # one line in each host's log
        assert "rank 1 on node 1" in output and "is still at step 3 in forward" in output and "rank 0 waits" in output
        assert "Traceback" not in output
    written = stacks(tmp_path)
    assert "in misbehave" in written["rank-1.stack"] and "all_reduce" in written["rank-0.stack"]
    assert "at step 3 in update" in written["rank-0.stack"]


@pytest.mark.slow
def test_nothing_wrong_leaves_nothing_behind(tmp_path):
    done = run(tmp_path, "none", 0)
    assert done.codes == [0, 0, 0, 0], done.output
    assert stacks(tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("bad_rank", [0, 3])
def test_a_stopped_rank_is_named_by_all_the_others(tmp_path, bad_rank):
    """SIGSTOP: its sockets stay open and its collectives never end. Rank 0 keeps the store besides."""
    done = run(tmp_path, "stop", bad_rank, unfinished=(bad_rank,))
    assert [code for rank, code in enumerate(done.codes) if rank != bad_rank] == [4, 4, 4], done.output
    for speaker in {0: (1, 2), 3: (0, 2)}[bad_rank]:
        assert f"rank {bad_rank} on node" in done.output[speaker]
        assert "no sign of life" in done.output[speaker] and "Traceback" not in done.output[speaker]


@pytest.mark.slow
def test_a_rank_that_is_stopped_before_there_is_a_watchdog_ends_the_others_too(tmp_path):
    done = run(tmp_path, "early", 1, size=2, unfinished=(1,))
    assert done.codes == [4, None] and "rank 0 lost the others as they began" in done.output[0], done.output
    assert "Traceback" not in done.output[0]


@pytest.mark.slow
@pytest.mark.parametrize("bad_rank", [0, 3])
def test_a_killed_rank_is_named_by_all_the_others(tmp_path, bad_rank):
    done = run(tmp_path, "kill", bad_rank)
    assert [code for rank, code in enumerate(done.codes) if rank != bad_rank] == [4, 4, 4], done.output
    for speaker in {0: (1, 2), 3: (0, 2)}[bad_rank]:
        assert f"rank {bad_rank} on node" in done.output[speaker] and "Traceback" not in done.output[speaker]


@pytest.mark.slow
def test_the_others_say_why_a_rank_failed_and_not_that_it_is_gone(tmp_path):
    done = run(tmp_path, "raise", 3)
    assert done.codes == [4, 4, 4, 4]
    assert "rank 3 on node 1" in done.output[0] and "failed: the disk is full" in done.output[0]


def test_a_rank_whose_others_end_before_the_watch_begins_says_so_and_a_defect_stays_a_defect():
    with pytest.raises(LoadmasterError, match="rank 1 lost the others as they began"), as_they_begin(1):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:26536\nand more")
    with pytest.raises(RuntimeError, match="shape mismatch"), as_they_begin(1):
        raise RuntimeError("shape mismatch")
