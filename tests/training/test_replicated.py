"""DistributedDataParallel as the loop wraps it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from loadmaster.training.sharding import Replicated
from loadmaster.training.strategy import Strategy
from loadmaster.training.world import World


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_frozen_bases_scales_are_not_sent_before_each_step(alone):
    layer = nn.Linear(4, 4)
    layer.register_buffer("scale", torch.ones(4))
    strategy = object.__new__(Replicated)
    assert isinstance(strategy, Strategy)
    strategy.world = World()
    wrapped = strategy.wrap(nn.Sequential(layer))
    assert list(wrapped.modules_buffers) == [] and wrapped.parameters_to_ignore == {"0.scale"}
    assert wrapped(torch.ones(2, 4)).sum().backward() is None and layer.weight.grad is not None
