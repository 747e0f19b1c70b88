import json

import pytest
import torch
from torch import nn

from loadmaster.config.schema import OptimizerConfig
from loadmaster.errors import TrainingFailed
from loadmaster.training import checkpoint
from loadmaster.training.optimizer import TrainingOptimizer


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
    checkpoint.save(folder / f"step-{step}", *trained, {"step": step, "job_hash": "h", **state})


def test_weights_optimizer_and_generators_come_back_bit_for_bit(tmp_path, trained):
    named, optimizer = trained
    save(tmp_path, 3, trained, tokens=17)
    wanted = torch.rand(5), [p.detach().clone() for _, p in named]
    states = {k: v.clone() for k, v in optimizer.state()[0].items()}
    for _, p in named:
        p.data.zero_()
    optimizer.reset()
    state = checkpoint.load(tmp_path / "step-3", named, optimizer)
    assert state["tokens"] == 17
    assert torch.equal(torch.rand(5), wanted[0])
    assert all(torch.equal(p, w) for (_, p), w in zip(named, wanted[1], strict=True))
    assert all(torch.equal(v, states[k]) for k, v in optimizer.state()[0].items())


@pytest.mark.parametrize(
    "tear",
    [
        lambda f: (f / "optimizer.safetensors").write_bytes(b""),
        lambda f: (f / "weights.safetensors").unlink(),
        lambda f: (f / "checksums.json").unlink(),
        lambda f: (f / "state.json").write_text('{"step": 5, "job_ha'),
        lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:-1] + b"\x01"),
    ],
    ids=["empty", "missing", "no-checksums", "cut-state", "one-byte"],
)
def test_a_torn_newest_checkpoint_is_passed_over(tmp_path, trained, tear):
    save(tmp_path, 4, trained)
    save(tmp_path, 5, trained)
    tear(tmp_path / "step-5")
    heard = []
    found = checkpoint.newest_whole(tmp_path, "h", heard.append)
    assert found.state["step"] == 4
    assert "step-5 is torn" in heard[0]


def test_a_partial_folder_is_not_a_checkpoint(tmp_path, trained):
    (tmp_path / ".step-9.partial").mkdir(parents=True)
    assert checkpoint.newest_whole(tmp_path, "h", print) is None


def test_a_checkpoint_of_another_job_is_refused(tmp_path, trained):
    save(tmp_path, 4, trained)
    with pytest.raises(TrainingFailed, match="other settings"):
        checkpoint.newest_whole(tmp_path, "another", print)


def test_newest_and_best_are_kept(tmp_path, trained):
    for step, loss in [(1, 3.0), (2, 0.5), (3, 1.0), (4, None), (5, 2.0)]:
        save(tmp_path, step, trained, eval_loss=loss)
    checkpoint.prune(tmp_path, keep_last=2, keep_best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-2", "step-4", "step-5"]


def test_nothing_pickled_is_written(tmp_path, trained):
    save(tmp_path, 1, trained)
    names = sorted(p.name for p in (tmp_path / "step-1").iterdir())
    assert names == ["checksums.json", "optimizer.safetensors", "rng.safetensors", "state.json", "weights.safetensors"]
    assert set(json.loads((tmp_path / "step-1" / "checksums.json").read_text())) == set(checkpoint.FILES)


def test_a_failed_write_says_how_to_go_on_and_keeps_the_earlier_one(tmp_path, trained, monkeypatch):
    save(tmp_path, 1, trained)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(TrainingFailed, match=r"No space left.*start again to resume"):
        save(tmp_path, 2, trained)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
