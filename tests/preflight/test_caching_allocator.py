"""The simulated allocator of benchmarks/caching_allocator.py, by what PyTorch says and shows of its own."""

import importlib.util
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "caching_allocator.py"
spec = importlib.util.spec_from_file_location("caching_allocator", SCRIPT)
simulated = sys.modules["caching_allocator"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulated)
EMPTY_CACHE, Allocator, OutOfMemory, replay = (
    simulated.EMPTY_CACHE, simulated.Allocator, simulated.OutOfMemory, simulated.replay
)
MIB = 2**20


def reserved(*sizes: float, expandable: bool = False) -> float:
    allocator = Allocator(expandable)
    for size in sizes:
        allocator.malloc(int(size * MIB))
    return allocator.reserved / MIB


@pytest.mark.parametrize(
    ("sizes", "fixed", "growing"),
    [
        ((0.001,), 2, 2),
        ((1, 1), 2, 2),
        ((1, 1, 0.001), 4, 4),
        ((1.001,), 20, 20),
        ((5, 5, 5, 5), 20, 20),
        ((9, 9, 9), 40, 40),  # 2 MiB are left of the first segment; growing ones go on behind them
        ((10,), 10, 20),
        ((11,), 12, 20),
        ((25, 15), 42, 40),
        ((25, 0.5), 28, 42),
    ],
)
def test_segments_are_as_large_as_pytorchs(sizes, fixed, growing) -> None:
    assert reserved(*sizes) == fixed and reserved(*sizes, expandable=True) == growing


def test_sizes_are_rounded_to_512_bytes_and_counted_so() -> None:
    allocator = Allocator()
    assert [allocator.malloc(size).size for size in (1, 512, 513)] == [512, 512, 1024]
    assert allocator.allocated == 2048


def test_the_smallest_block_that_holds_it_is_taken() -> None:
    allocator = Allocator()
    blocks = [allocator.malloc(size * MIB) for size in (40, 30, 20)]
    for block in blocks:
        allocator.free(block)
    assert allocator.malloc(25 * MIB).address == blocks[1].address


def test_what_is_over_is_split_off_where_it_is_more_than_1_mib() -> None:
    for over, size in ((1, 31), (2, 30)):
        allocator = Allocator()
        allocator.free(allocator.malloc(31 * MIB + MIB))  # a segment of 32
        assert allocator.malloc(32 * MIB - over * MIB).size == (32 * MIB if over == 1 else size * MIB)


def test_neighbours_join_again() -> None:
    for expandable in (False, True):
        allocator = Allocator(expandable)
        parts = [allocator.malloc(4 * MIB) for _ in range(5)]
        for place in (1, 3, 2, 0, 4):
            allocator.free(parts[place])
        assert allocator.malloc(20 * MIB).address == parts[0].address and allocator.reserved == 20 * MIB


def test_a_hole_is_taken_before_the_end_that_could_grow() -> None:
    """Though the end is smaller, and would do."""
    allocator = Allocator(expandable=True)
    hole, kept = allocator.malloc(30 * MIB), allocator.malloc(15 * MIB)
    allocator.free(hole)
    assert allocator.reserved == 60 * MIB  # 15 of them behind what is kept
    assert allocator.malloc(10 * MIB).address == hole.address < kept.address


def test_streams_share_nothing() -> None:
    allocator = Allocator()
    allocator.free(allocator.malloc(30 * MIB, stream=1))
    allocator.malloc(30 * MIB)
    assert allocator.reserved == 60 * MIB


def test_a_full_card_is_given_back_what_is_wholly_free() -> None:
    events = [(1, 30 * MIB), (1, 0), (2, 20 * MIB), (2, 0), (3, 40 * MIB)]
    with_room = replay(events, capacity=60 * MIB)
    assert with_room.retries == 1 and with_room.reserved == 40 * MIB
    with pytest.raises(OutOfMemory):
        replay([(1, 30 * MIB), (2, 20 * MIB), (3, 40 * MIB)], capacity=60 * MIB)


def test_what_is_free_in_a_segment_that_is_used_is_lost_to_others_unless_segments_grow() -> None:
    split = [(1, 40 * MIB), (1, 0), (2, 10 * MIB), (3, 40 * MIB)]
    assert replay(split, capacity=60 * MIB, expandable=True).reserved == 60 * MIB
    with pytest.raises(OutOfMemory):
        replay(split, capacity=60 * MIB)


def test_emptying_the_cache_leaves_pages_that_are_used() -> None:
    events = [(1, 50 * MIB), (2, 5 * MIB), (1, 0), EMPTY_CACHE]
    assert replay(events).reserved == 20 * MIB
    assert replay(events, expandable=True).reserved == 20 * MIB  # the third page, of which 5 MiB are used


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("capacity", [None, 400 * MIB])
def test_nothing_is_lost_whatever_comes(expandable, capacity) -> None:
    draw, allocator, held = random.Random(0), Allocator(expandable, capacity), []
    for _ in range(5000):
        if held and draw.random() < 0.5:
            allocator.free(held.pop(draw.randrange(len(held))))
            continue
        try:
            held.append(allocator.malloc(int(10 ** draw.uniform(2, 7.6))))
        except OutOfMemory:
            allocator.free(held.pop(draw.randrange(len(held))))
        assert allocator.allocated == sum(block.size for block in held) <= allocator.reserved
        assert capacity is None or allocator.reserved <= capacity
    spans = sorted((block.address, block.address + block.size) for block in held)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    for block in held:
        allocator.free(block)
    allocator.empty_cache()
    assert allocator.allocated == allocator.reserved == 0
