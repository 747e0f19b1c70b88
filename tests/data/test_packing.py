"""Packing: nothing lost, nothing too long, rows nearly full."""

from __future__ import annotations

import numpy as np
import pytest

from loadmaster.data.packing import LongRows, best_fit_decreasing, both_answers, fit_documents, fit_whole, rows_of
from loadmaster.data.rows import packed_rows


@pytest.mark.parametrize("seed", range(20))
def test_every_document_is_in_exactly_one_row_and_no_row_is_too_long(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 400))
    lengths = random.integers(1, capacity + 1, size=int(random.integers(0, 300)))
    rows = best_fit_decreasing(lengths, capacity, seed)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= capacity for row in rows)
    assert rows == best_fit_decreasing(lengths, capacity, seed)


@pytest.mark.parametrize(("median", "capacity"), [(160, 2048), (160, 4096), (400, 4096), (900, 8192)])
def test_rows_are_at_least_97_per_cent_full_with_lengths_like_instruction_data(median, capacity):
    # Lengths of instruction data are near log-normal; sigma 0.8 spans a line to several pages.
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.8, 5_000).astype(int).clip(8, capacity)
    rows = best_fit_decreasing(lengths, capacity)
    assert lengths.sum() / (len(rows) * capacity) >= 0.97


def test_best_fit_takes_the_fullest_row_that_still_holds_the_document():
    # 7 and 6 open rows with 3 and 4 free; 3 must go to the first, 4 to the second.
    assert sorted(map(sorted, best_fit_decreasing(np.array([7, 6, 4, 3]), 10))) == [[0, 3], [1, 2]]
    assert best_fit_decreasing(np.array([7, 6, 3]), 10) == [[0, 2], [1]]  # not into the emptier one


def test_documents_of_equal_length_are_dealt_in_a_seeded_order():
    first, again, other = (best_fit_decreasing(np.full(40, 5), 10, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [rows_of(np.full(40, 5), 10, packing=True, seed=seed) for seed in (1, 2)] == [first, other]


@pytest.mark.parametrize("length", [0, 5])
def test_lengths_that_do_not_fit_are_an_error(length):
    with pytest.raises(ValueError, match="do not fit rows of 4 tokens"):
        best_fit_decreasing(np.array([length]), 4)


def test_packed_rows_hold_every_token_once_and_positions_restart():
    random = np.random.default_rng(1)
    documents, first = [], 0
    for _ in range(60):
        size = int(random.integers(1, 40))
        documents.append((list(range(first, first + size)), random.random(size) < 0.5))
        first += size
    rows = packed_rows(documents, sequence_length=64)
    assert sorted(np.concatenate([row.input_ids for row in rows]).tolist()) == list(range(first))
    masks = {ids[0]: (ids, mask) for ids, mask in documents}
    names = {f"document:{number}": ids for number, (ids, _) in enumerate(documents, 1)}
    for row in rows:
        assert len(row) <= 64
        starts = np.flatnonzero(row.position_ids == 0)
        pieces = np.split(np.arange(len(row)), starts[1:])
        assert [names[name] for name in row.document_ids] == [row.input_ids[piece].tolist() for piece in pieces]
        for piece in pieces:
            ids, mask = masks[int(row.input_ids[piece[0]])]
            assert row.position_ids[piece].tolist() == list(range(len(ids)))
            assert row.labels[piece].tolist() == [i if kept else -100 for i, kept in zip(ids, mask, strict=True)]
    assert rows.tokens == first
    assert rows.trained_tokens == sum(int(np.sum(mask[1:])) for _, mask in documents)


def test_without_packing_each_document_is_a_row():
    rows = packed_rows([([1, 2], [0, 1]), ([3], [1])], sequence_length=8, packing=False)
    assert [row.input_ids.tolist() for row in rows] == [[1, 2], [3]]
    assert rows[-1].document_ids == ["document:2"]
    with pytest.raises(IndexError):
        rows[2]


@pytest.mark.parametrize(
    ("policy", "pieces", "counted"),
    [
        ("cut", [(0, 0, 4), (1, 10, 3)], LongRows(2, 1, 10, 1)),
        ("split", [(0, 0, 4), (0, 8, 2), (1, 10, 3), (2, 17, 4)], LongRows(2, 3, 0, 2)),
    ],
)
def test_long_documents_are_cut_or_split_and_pieces_without_loss_are_dropped_and_counted(
    policy, pieces, counted
):
    lengths = np.array([10, 3, 8])
    trained = np.zeros(21, dtype=bool)
    trained[[2, 4, 9, 11, 19]] = True  # 4 begins a piece of its own: nothing before it predicts it
    source, begins, sizes, counts = fit_documents(lengths, trained, 4, policy)
    assert list(zip(source.tolist(), begins.tolist(), sizes.tolist(), strict=True)) == pieces
    assert counts == counted


def test_a_piece_is_kept_for_its_own_tokens_and_what_fits_exactly_is_whole():
    trained = np.zeros(13, dtype=bool)
    trained[[1, 7, 10]] = True  # 7 is of the next one, and of none of the first's last piece
    source, begins, sizes, counts = fit_documents(np.array([6, 3, 4]), trained, 4, "split")
    assert list(zip(source.tolist(), begins.tolist(), sizes.tolist(), strict=True)) == [(0, 0, 4), (1, 6, 3), (2, 9, 4)]
    assert counts == LongRows(long=1, pieces=1, cut_tokens=0, dropped=1)
    two = fit_documents(np.array([6, 6]), np.zeros(12, dtype=bool), 4, "split")[3]
    assert two == LongRows(long=2, pieces=0, cut_tokens=0, dropped=4)


def test_of_preferences_those_that_are_too_long_are_left_out_and_counted():
    *kept, counts = fit_whole(np.array([3, 9, 4, 2]), 4)
    assert [array.tolist() for array in kept] == [[0, 2, 3], [0, 12, 16], [3, 4, 2]]
    assert counts == LongRows(long=1, dropped=1)


def test_a_rejected_answer_begins_where_its_own_chosen_one_ends():
    source, begins, sizes, splits = map(np.array, ([0, 2], [0, 12], [5, 6], [2, 9, 4]))
    *documents, rows = both_answers(source, begins, sizes, splits, [[1], [0]])
    assert [array.tolist() for array in documents] == [[0, 0, 2, 2], [0, 2, 12, 16], [2, 3, 4, 2]]
    assert rows == [[2, 3], [0, 1]]
