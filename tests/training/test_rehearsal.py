"""What the rehearsal itself does beside the run's own steps takes no memory that the plan would have to count."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loadmaster.config.schema import OptimizerConfig
from loadmaster.errors import TrainingFailed
from loadmaster.training import rehearsal
from loadmaster.training.checkpoint import Checkpoints
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.placement import Placed
from loadmaster.training.rehearsal import fingerprint, is_finite
from loadmaster.training.world import World


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made = max(self.made, result.nbytes if isinstance(result, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whether_weights_are_finite_is_seen_without_a_copy_of_them(dtype):
    weights = torch.randn(100, 1000).to(dtype)
    with Largest() as largest:
        assert is_finite(weights)
    assert largest.made <= 4
    assert is_finite(weights[:0]) and is_finite(torch.full((10,), torch.finfo(dtype).max, dtype=dtype))
    for value in (math.nan, math.inf, -math.inf):
        weights[7, 7] = value
        assert not is_finite(weights)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_a_fingerprint_shows_every_bit_and_every_place(dtype, monkeypatch):
    monkeypatch.setattr(rehearsal, "PIECE", 64)
    whole = torch.randn(3 * 64 + 5).mul(50).to(dtype)
    whole[0] = 3
    mark, seen = fingerprint(whole), set()
    assert mark == fingerprint(whole.clone()) == fingerprint(whole.reshape(1, -1))
    for place in (0, 63, 64, 3 * 64 + 4):
        for bit in range(8 * whole.element_size()):
            changed = whole.clone()
            changed.view(torch.uint8)[place * whole.element_size() + bit // 8] ^= 1 << bit % 8
            seen.add(fingerprint(changed))
    assert mark not in seen and len(seen) == 4 * 8 * whole.element_size()
    whole[:4] = torch.tensor([1, 2, 3, 4])
    for order in ([1, 0, 2, 3], [2, 1, 0, 3], [1, 2, 3, 0]):
        moved = whole.clone()
        moved[:4] = whole[order]
        assert fingerprint(moved) != fingerprint(whole)
    pieces = list(whole.split(64))
    assert fingerprint(torch.cat([pieces[1], pieces[0], *pieces[2:]])) != fingerprint(whole)
    assert fingerprint(whole[:0]) == 0 != fingerprint(whole[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.int16, torch.float64])
def test_whatever_a_state_is_made_of_has_a_fingerprint(dtype):
    whole = torch.tensor([[0, 1, 1], [0, 0, 1]]).to(dtype)
    assert fingerprint(whole.t()) == fingerprint(whole.t().contiguous()) != fingerprint(whole)
    assert fingerprint(whole[0, 1]) != fingerprint(whole[0, 0])  # of no dimension


def test_signs_alone_show_in_a_fingerprint():
    """Of these two places the numbers are opposite in all bits that a sign of fp32 meets, were it not mixed."""
    whole = torch.zeros(2**17)
    signed = whole.clone()
    signed[[75628, 126277]] = -0.0
    assert fingerprint(signed) != fingerprint(whole)


def test_a_fingerprint_takes_the_memory_of_a_piece(monkeypatch):
    monkeypatch.setattr(rehearsal, "PIECE", 64)
    with Largest() as largest:
        fingerprint(torch.ones(100, 1000, dtype=torch.bfloat16).mul_(2))
    assert largest.made <= max(100 * 1000 * 2, 64 * 8)
    weights = torch.ones(100, 1000, dtype=torch.bfloat16)
    with Largest() as largest:
        assert fingerprint(weights) != fingerprint(weights[:50])
    assert largest.made == weights.nbytes  # views of itself


@pytest.mark.parametrize("on_a_gpu", [False, True])
def test_one_bit_of_a_checkpoint_that_reads_back_otherwise_ends_the_rehearsal(tmp_path, monkeypatch, on_a_gpu):
    trained = [(name, nn.Parameter(torch.randn(8, 8))) for name in ("first", "second")]
    optimizer = TrainingOptimizer(trained, OptimizerConfig(), "adamw", False)
    checkpoints = Checkpoints(World(), Placed())
    if on_a_gpu:  # what lies there is told by its fingerprint
        monkeypatch.setattr(rehearsal, "_sha256", fingerprint)
    rehearsal._save_and_reload(tmp_path / "whole", trained, optimizer, checkpoints)
    load = checkpoints.load

    def otherwise(*arguments):
        load(*arguments)
        trained[1][1].detach().view(torch.int32)[3, 4] ^= 1

    monkeypatch.setattr(checkpoints, "load", otherwise)
    with pytest.raises(TrainingFailed, match="did not read back as written: second"):
        rehearsal._save_and_reload(tmp_path / "torn", trained, optimizer, checkpoints)
