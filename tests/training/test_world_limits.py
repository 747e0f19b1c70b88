"""How long a collective may wait where torch's debugging wraps groups, which keep the limit of their making."""

from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import torch.distributed as dist

from loadmaster.training.world import first_limit, wait_at_most


@pytest.mark.parametrize(("level", "made_with"), [(dist.DebugLevel.OFF, 1), (dist.DebugLevel.DETAIL, 2)])
def test_a_group_that_keeps_its_first_limit_is_given_the_later_one(level, made_with, monkeypatch, tmp_path):
    before = dist.get_debug_level()
    dist.set_debug_level(level)
    try:
        limit = first_limit(1, 2)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wait_at_most(2)
    finally:
        dist.set_debug_level(before)
        dist.destroy_process_group()
    assert limit == timedelta(seconds=made_with)
