"""The order of training rows and the exact position in it."""

from __future__ import annotations

import math
from itertools import chain, islice

import pytest

from loadmaster.data.sampler import BatchSampler
from loadmaster.errors import DataError


def flat(batches) -> list[int]:
    return list(chain.from_iterable(batches))


def test_the_steps_of_ever_so_many_epochs_are_known_at_once():
    assert BatchSampler(100, 16, seed=0, epochs=1e9).total_steps() == 7 * 10**9


@pytest.mark.parametrize("rows", [1, 7, 32])
@pytest.mark.parametrize("size", [1, 4, 50])
@pytest.mark.parametrize("epochs", [0.3, 1, 2.5])
def test_resume_after_any_step_yields_exactly_the_rest(rows, size, epochs):
    whole = list(BatchSampler(rows, size, seed=3, epochs=epochs))
    assert len(whole) == BatchSampler(rows, size, seed=3, epochs=epochs).total_steps()
    for done in range(len(whole) + 1):
        before = BatchSampler(rows, size, seed=3, epochs=epochs)
        assert list(islice(before, done)) == whole[:done]
        after = BatchSampler(rows, size, seed=3, epochs=epochs)
        after.load_state_dict(before.state_dict())
        assert list(after) == whole[done:]


def test_each_epoch_has_every_row_once_in_its_own_order():
    batches = list(BatchSampler(10, 4, seed=0, epochs=2))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = flat(batches[:3]), flat(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_a_fractional_epoch_ends_early():
    assert sum(map(len, BatchSampler(10, 4, seed=0, epochs=1.25))) == 13
    assert sum(map(len, BatchSampler(10, 4, seed=0, epochs=0.1))) == 1


def test_order_depends_on_the_seed():
    assert list(BatchSampler(30, 4, seed=1)) == list(BatchSampler(30, 4, seed=1))
    assert list(BatchSampler(30, 4, seed=1)) != list(BatchSampler(30, 4, seed=2))


def test_resume_under_another_global_batch_continues_with_the_next_row():
    before = BatchSampler(20, 6, seed=5)
    seen = flat(islice(before, 2))
    after = BatchSampler(20, 4, seed=5)
    after.load_state_dict(before.state_dict())
    assert seen + flat(after) == after.order(0).tolist()


def test_endless_epochs_go_on():
    assert len(list(islice(BatchSampler(3, 2, seed=0, epochs=math.inf), 100))) == 100


@pytest.mark.parametrize("change", [{"number_of_rows": 11}, {"seed": 8}, {"fingerprint": "other"}])
def test_a_position_in_other_data_is_refused(change):
    made = {"number_of_rows": 10, "global_size": 4, "seed": 7, "fingerprint": "this"}
    with pytest.raises(DataError, match=f"position is in other data: {next(iter(change))} was"):
        BatchSampler(**made).load_state_dict(BatchSampler(**{**made, **change}).state_dict())
