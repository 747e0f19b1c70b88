"""Rows as tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loadmaster.data import collate, packed_rows


def test_padding_is_a_document_of_its_own_without_loss():
    rows = packed_rows([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1]), ([4], [1])], sequence_length=5)
    batch = collate(list(rows), pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7, -100, 9], [4, -100, -100, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]


def test_rows_are_padded_to_the_length_asked_for_and_never_cut():
    rows = list(packed_rows([([5, 6, 7], [0, 1, 1])], sequence_length=4))
    assert collate(rows, 0, to_length=6).input_ids.shape == (1, 6)
    with pytest.raises(ValueError, match="a row of 3 tokens does not fit a batch of length 2"):
        collate(rows, 0, to_length=2)


def test_importing_the_data_room_does_not_import_torch():
    code = "import sys, loadmaster.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
