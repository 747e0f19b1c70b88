"""Where layers go: GPUs in order, then host memory, then disk; the rest of the model on the first GPU."""

from __future__ import annotations

import pytest

from loadmaster.preflight.placement import Placement, Room, place

LAYERS = [10.0] * 8


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (Room((100,), working=10), Placement((8,))),  # 10 + 80 + 10: to the byte
        (Room((99,), working=10, host=None), Placement((6,), 2)),  # one layer's room is kept for those that are brought
        (Room((100, 100), working=10), Placement((8, 0))),
        (Room((60, 60), working=10), Placement((4, 4))),
        (Room((60, 60), working=10, passing=20), Placement((4, 4))),
        (Room((60, 59), working=10, passing=20, host=99), Placement((3, 3), 2)),
        (Room((60,), working=10, host=25), Placement((3,), 2, 3)),
        (Room((60,), working=10), Placement((3,), 0, 5)),
        (Room((60,), working=10, disk=False), None),
        (Room((60,), working=10, host=49, disk=False), None),
        (Room((60,), working=10, host=50, disk=False), Placement((3,), 5)),
        (Room((30,), working=10), Placement((0,), 0, 8)),  # what is outside the layers, a row, and one layer
        (Room((29,), working=10, host=None), None),
        (Room((29, 100), working=10), Placement((0, 8))),  # nothing is brought, so no room is kept
        (Room((19, 100), working=10), None),
    ],
)
def test_layers_go_to_the_first_place_that_has_room(room, expected):
    assert place(LAYERS, 10, room) == expected


def test_layers_of_different_sizes_keep_their_order():
    found = place([30, 10, 10, 30], 0, Room((35, 25), host=30, disk=False))
    assert found is None  # the largest layer's room is kept where one is brought: 35 - 30 holds none of them
    assert place([30, 10, 10, 30], 0, Room((65, 25), host=40)) == Placement((1, 2), 1)


def test_a_placement_in_words():
    assert Placement((46, 34, 0)).words() == "80 of 80 layers on 2 GPUs"
    assert Placement((3,), 2, 3).words() == "3 of 8 layers on 1 GPU, 2 in host memory, 3 on disk"
    assert Placement((3,), 0, 5).words(has_gpus=False) == "3 of 8 layers in host memory, 5 on disk"
    assert Placement((1, 1), 1, 1).places() == [0, 1, "host", "disk"]
    assert Placement((2, 0)).is_whole and not Placement((1, 1)).is_whole and not Placement((1,), 1).is_whole
    assert not Placement((1,), disk=1).is_whole
