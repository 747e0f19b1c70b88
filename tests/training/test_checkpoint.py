import json
import shutil
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

from loadmaster import host_memory
from loadmaster.config.schema import OptimizerConfig
from loadmaster.errors import TrainingFailed
from loadmaster.training import checkpoint, checkpoint_folders, staging
from loadmaster.training.checkpoint import Checkpoints
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed
from loadmaster.training.world import World


@pytest.fixture
def trained():
    torch.manual_seed(0)
    named = [("a", nn.Parameter(torch.randn(8, 4))), ("b", nn.Parameter(torch.randn(4)))]
    optimizer = TrainingOptimizer(named, OptimizerConfig(), "adamw", False)
    for _, p in named:
        p.grad = torch.ones_like(p)
    optimizer.step(0.1)
    return named, optimizer


def save(folder, step, trained, **state):
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(folder / f"step-{step}", *trained, {"step": step, "job_hash": "h", **state})
    checkpoints.wait()


def shard(folder):
    """The one file of tensors of a checkpoint that one process wrote."""
    (path,) = (folder / "tensors").glob("*.safetensors")
    return path


@pytest.mark.parametrize("at_a_time", [checkpoint.READ_BYTES, 100, 1])
def test_weights_optimizer_and_generators_come_back_bit_for_bit(tmp_path, trained, monkeypatch, at_a_time):
    monkeypatch.setattr(checkpoint, "READ_BYTES", at_a_time)
    named, optimizer = trained
    save(tmp_path, 3, trained, tokens=17)
    wanted = torch.rand(5), [p.detach().clone() for _, p in named]
    states = {k: v.clone() for k, v in optimizer.state()[0].items()}
    for _, p in named:
        p.data.zero_()
    optimizer.reset()
    state = Checkpoints(World(), Placed()).load(tmp_path / "step-3", named, optimizer)
    assert state["tokens"] == 17
    assert torch.equal(torch.rand(5), wanted[0])
    assert all(torch.equal(p, w) for (_, p), w in zip(named, wanted[1], strict=True))
    found = optimizer.state()[0]
    assert found.keys() == states.keys() and all(torch.equal(v, states[k]) for k, v in found.items())


@pytest.mark.parametrize(
    "tear",
    [
        lambda f: shard(f).write_bytes(b""),
        lambda f: shard(f).unlink(),
        lambda f: (f / "checksums.json").unlink(),
        lambda f: (f / "state.json").write_text('{"step": 5, "job_ha'),
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-1] + b"\x01"),
    ],
    ids=["empty", "missing", "no-checksums", "cut-state", "one-byte"],
)
def test_a_torn_newest_checkpoint_is_passed_over(tmp_path, trained, tear):
    save(tmp_path, 4, trained)
    save(tmp_path, 5, trained)
    tear(tmp_path / "step-5")
    heard = []
    found = checkpoint_folders.newest_whole(tmp_path, "h", heard.append)
    assert found.state["step"] == 4
    assert "step-5 is torn" in heard[0]


def test_a_partial_folder_is_not_a_checkpoint(tmp_path, trained):
    (tmp_path / ".step-9.partial").mkdir(parents=True)
    assert checkpoint_folders.newest_whole(tmp_path, "h", print) is None


def test_a_checkpoint_of_another_job_is_refused(tmp_path, trained):
    save(tmp_path, 4, trained)
    with pytest.raises(TrainingFailed, match="other settings or other data, or by a version"):
        checkpoint_folders.newest_whole(tmp_path, "another", print)


def test_newest_and_best_are_kept(tmp_path, trained):
    for step, loss in [(1, 3.0), (2, 0.5), (3, 1.0), (4, None), (5, 2.0)]:
        save(tmp_path, step, trained, eval_loss=loss)
    checkpoint_folders.prune(tmp_path / "step-5", keep_last=2, keep_best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-4", "step-5"]


def test_the_best_whole_one_is_found(tmp_path, trained):
    for step, loss in [(1, 1.0), (2, 0.5), (3, 1.0), (4, None)]:
        save(tmp_path, step, trained, eval_loss=loss)
    found = partial(checkpoint_folders.best_whole, tmp_path, "h", print, World())
    assert found().state["step"] == 2
    shard(tmp_path / "step-2").write_bytes(b"")
    assert found().state["step"] == 3
    for step in (1, 3):
        shutil.rmtree(tmp_path / f"step-{step}")
    assert found() is None


def test_a_torn_checkpoint_of_a_later_step_is_not_kept_in_the_place_of_a_whole_one(tmp_path, trained):
    save(tmp_path, 2, trained)
    save(tmp_path, 5, trained, eval_loss=0.1)
    shard(tmp_path / "step-5").write_bytes(b"")
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(tmp_path / "step-4", *trained, {"step": 4, "job_hash": "h"}, keep=(1, 1))
    checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]


def test_what_a_killed_process_left_half_written_or_half_deleted_goes(tmp_path, trained):
    save(tmp_path, 2, trained)
    for left in (".step-3.partial", ".step-1.deleted"):
        (tmp_path / left / "tensors").mkdir(parents=True)
    checkpoint_folders.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]
    checkpoint_folders.clear(tmp_path / "none")


def test_nothing_pickled_is_written(tmp_path, trained):
    save(tmp_path, 1, trained)
    files = {str(p.relative_to(tmp_path / "step-1")) for p in (tmp_path / "step-1").rglob("*") if p.is_file()}
    assert {path.rsplit(".", 1)[1] for path in files} == {"json", "safetensors"}
    assert set(json.loads((tmp_path / "step-1" / "checksums.json").read_text())) == files - {"checksums.json"}


def test_a_failed_write_says_how_to_go_on_and_keeps_the_earlier_one(tmp_path, trained, monkeypatch):
    save(tmp_path, 1, trained)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(TrainingFailed, match=r"No space left.*start again to resume"):
        save(tmp_path, 2, trained)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_what_one_rank_cannot_write_alone_is_told_before_all_talk_about_the_tensors(tmp_path, trained, monkeypatch):
    """The others would wait, in a collective, for a rank that tells them in another one."""
    talked, checkpoints = [], Checkpoints(World(), Placed())
    monkeypatch.setattr(Checkpoints, "_write_tensors", lambda *_: talked.append("all"))
    of_another = iter([None, "No space left on device"])  # the folder is there, its generators are not
    monkeypatch.setattr(checkpoints, "_gather", lambda mine: [mine, next(of_another)])
    checkpoints.save(tmp_path / "step-1", *trained, {"step": 1, "job_hash": "h"})
    with pytest.raises(TrainingFailed, match="No space left on device"):
        checkpoints.wait()
    assert not talked


def test_the_loop_may_change_weights_while_they_are_written(tmp_path, trained, monkeypatch):
    named, optimizer = trained
    written, go_on = [], threading.Event()
    save_tensors = Checkpoints._write_tensors

    def slow(self, folder, tensors):
        go_on.wait(30)
        written.append(True)
        save_tensors(self, folder, tensors)

    monkeypatch.setattr(Checkpoints, "_write_tensors", slow)
    before = [p.detach().clone() for _, p in named]
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(tmp_path / "step-1", named, optimizer, {"step": 1, "job_hash": "h"})
    assert not written
    for _, p in named:
        p.data.zero_()
    go_on.set()
    checkpoints.wait()
    checkpoints.load(tmp_path / "step-1", named, optimizer)
    assert all(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))


def test_what_fails_behind_the_loop_is_known_before_the_next_save_and_raised_by_it(tmp_path, trained, monkeypatch):
    """torch raises CheckpointException for it, which is no Exception: it must not end the thread in silence."""
    from loadmaster.training.shard_files import ShardWriter

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write_file", full_disk)
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(tmp_path / "step-1", *trained, {"step": 1, "job_hash": "h"})
    deadline = time.monotonic() + 120
    while not checkpoints.failed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(TrainingFailed, match=r"step-1 could not be written: .*No space left"):
        checkpoints.save(tmp_path / "step-2", *trained, {"step": 2, "job_hash": "h"})
    assert list(tmp_path.iterdir()) == []


def test_where_the_host_has_no_room_for_a_copy_the_loop_waits_for_the_writing(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(staging, "free_host_bytes", lambda: 100.0)
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(tmp_path / "step-1", *trained, {"step": 1, "job_hash": "h"})
    assert not checkpoints.behind and (tmp_path / "step-1" / "checksums.json").is_file()
    figures = checkpoints.figures()
    assert figures["count"] == 1 and not figures["behind"] and figures["stall_s_max"] >= figures["write_s_mean"]


def test_a_rank_writes_several_files_so_that_none_has_to_be_put_together_whole(tmp_path, trained, monkeypatch):
    from loadmaster.training import shard_files

    monkeypatch.setattr(shard_files, "FILE_BYTES", 150)  # a weight of 128 bytes each
    save(tmp_path, 1, trained)
    assert len(list((tmp_path / "step-1" / "tensors").glob("shard-00001-model-*"))) == 4
    before = [p.detach().clone() for _, p in trained[0]]
    for _, p in trained[0]:
        p.data.zero_()
    Checkpoints(World(), Placed()).load(tmp_path / "step-1", *trained)
    assert all(torch.equal(p, b) for (_, p), b in zip(trained[0], before, strict=True))


WRITING = """
import resource, sys, torch
import torch.distributed.checkpoint as dcp
from pathlib import Path
from loadmaster.training.shard_files import ShardWriter

tensors = {str(i): torch.ones(2**23) for i in range(12)}  # 384 MiB
taken = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
dcp.save({"small": torch.ones(4)}, storage_writer=ShardWriter(Path(sys.argv[1]) / "small"), no_dist=True)
before = taken()
dcp.save(tensors, storage_writer=ShardWriter(Path(sys.argv[1]) / "large"), no_dist=True)
print(taken() - before)
"""


@pytest.mark.parametrize("version", [0, 1])
def test_what_a_container_has_left_is_what_copies_are_made_in(tmp_path, monkeypatch, version):
    _, largest, current, inactive = host_memory.CGROUPS[version]
    for name, text in ((largest, "5000\n"), (current, "3000\n"), ("memory.stat", f"rss 7\n{inactive} 400\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "CGROUPS", [(tmp_path, largest, current, inactive)])
    assert host_memory.free_host_bytes() == 2400


@pytest.mark.slow
def test_what_is_written_is_not_put_together_in_memory(tmp_path):
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITING, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    assert int(said.splitlines()[-1]) < 64


def test_the_figures_are_of_the_saves_so_far_without_the_rehearsals(tmp_path, trained):
    checkpoints = Checkpoints(World(), Placed())
    assert checkpoints.figures() is None
    for step in (1, 2):
        checkpoints.save(tmp_path / f"step-{step}", *trained, {"step": step})
        checkpoints.wait()
    checkpoints.written, checkpoints.stalls_s = [(2**30, 1.0), (2**31, 3.0)], [0.1, 0.3]
    figures = checkpoints.figures()
    assert (figures["count"], figures["gib"], figures["write_s_mean"]) == (2, 2.0, 2.0)
    assert (figures["stall_s_mean"], figures["stall_s_max"]) == (pytest.approx(0.2), 0.3)
    checkpoints.forget_figures()
    assert (checkpoints.figures(), checkpoints.written) == (None, [])


def test_as_many_of_the_newest_and_of_the_best_are_kept_as_was_asked_for(tmp_path, trained, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint, "prune", lambda *given: asked.append(given))
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(tmp_path / "step-1", *trained, {"step": 1}, (3, 7))
    checkpoints.wait()
    assert asked == [(tmp_path / "step-1", 3, 7)]


def test_a_checkpoint_of_more_or_fewer_weights_is_refused(tmp_path, trained):
    save(tmp_path, 1, trained)
    named, optimizer = trained
    for other in (named[:1], [*named, ("c", nn.Parameter(torch.ones(2)))]):
        with pytest.raises(TrainingFailed, match="holds other weights than this job trains"):
            Checkpoints(World(), Placed()).load(tmp_path / "step-1", other, optimizer)


def test_a_fault_of_the_program_is_not_said_to_be_the_disks_and_is_raised_once(tmp_path, trained, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "save_file", broken)
    checkpoints = Checkpoints(World(), Placed())
    checkpoints.save(tmp_path / "step-1", *trained, {"step": 1})
    with pytest.raises(ZeroDivisionError):
        checkpoints.wait()
    checkpoints.wait()
    assert not checkpoints.failed
