"""Files that would fill the memory, or take hours, though they take no room on the disk."""

from __future__ import annotations

import time
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from loadmaster.data import readers
from loadmaster.errors import DataError

TOO_LONG = readers.TOO_LONG
MIB = 2**20


def read(path) -> list[object]:
    return [row.error or row.value for row in readers.read_file(path, path.name)]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("rows.jsonl", '{"n": 1}\n' + "x" * 5000 + '\n{"n": 2}\n', [{"n": 1}, TOO_LONG, {"n": 2}]),
        ("rows.json", '{"n": 1}\n' + "x" * 5000, [{"n": 1}, TOO_LONG]),
        ("rows.json", '{"data": [' + '{"n": 1}, ' * 500 + '{"n": 2}]}', [{"n": 1}] * 500 + [{"n": 2}]),
        ("rows.json", "x" * 5000 + '\n{"n": 1}\n', [TOO_LONG, {"n": 1}]),
        ("rows.csv", "n\n1\n" + "x" * 5000 + "\n2\n", [{"n": "1"}, f"broken CSV: a line {TOO_LONG}"]),
        ("rows.csv", 'n\n1\n"' + "x\n" * 2500, [{"n": "1"}, "broken CSV: field larger than field limit (1000)"]),
    ],
)
def test_what_is_too_long_for_a_row_is_said_and_not_held(tmp_path, monkeypatch, name, content, found):
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    (tmp_path / name).write_text(content)
    assert read(tmp_path / name)[: len(found)] == found


@pytest.mark.parametrize("text", ['[{"n": 1}]', '{\n "n": 1\n}'])
def test_one_json_value_that_the_memory_cannot_hold_is_not_read(tmp_path, monkeypatch, text):
    monkeypatch.setattr(readers, "host_memory_gib", lambda: 1e-9)
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=r"(?s)is one JSON value of .* as \.jsonl"):
        read(tmp_path / "rows.json")


def test_of_a_long_group_of_rows_of_a_parquet_file_no_more_is_held_than_its_first(tmp_path):
    texts = [f"{n:x} " * 100 for n in range(2**40, 2**40 + 20_000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet", compression="none")
    before = pyarrow.total_allocated_bytes()
    rows = readers.read_file(tmp_path / "rows.parquet", "rows.parquet")
    assert next(rows).value == {"text": texts[0]}
    assert pyarrow.total_allocated_bytes() - before < 8 * MIB < (tmp_path / "rows.parquet").stat().st_size


def test_a_text_that_all_rows_of_a_parquet_file_repeat_is_not_held_as_often(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 3 * MIB)
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 500, pyarrow.int32()), pyarrow.array(["x" * MIB]))
    pyarrow.parquet.write_table(pyarrow.table({"text": same}), tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < MIB
    tracemalloc.start()
    rows = readers.read_file(tmp_path / "rows.parquet", "rows.parquet")
    assert len(next(rows).value["text"]) == MIB
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50 * MIB


def test_as_many_rows_of_a_parquet_file_are_made_at_once_as_its_sizes_allow(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 1000] * 500}), tmp_path / "rows.parquet")
    metadata = pyarrow.parquet.read_metadata(tmp_path / "rows.parquet")
    size = metadata.row_group(0).total_byte_size
    assert 1000 < size < 5000  # of which all rows have their text
    for longest, rows in ((4 * size, readers.MORE_ROWS), (4 * size - 1, readers.PARQUET_ROWS)):
        monkeypatch.setattr(readers, "LONGEST_ROW", longest)
        assert readers._rows_at_once(metadata) == rows


def test_a_row_of_a_parquet_file_that_is_too_long_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    table = pyarrow.table({"text": ["a", "x" * 2000, "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [{"text": "a"}, TOO_LONG, {"text": "b"}]


def test_categories_are_no_part_of_each_row_and_not_made_for_each_few(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_ROW", 5000)
    texts = [f"{number:0100}" for number in range(120_000)]
    column = pyarrow.array([*texts, None, "x" * 6000]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    began = time.process_time()
    assert read(tmp_path / "rows.parquet") == [*({"text": text} for text in texts), {}, TOO_LONG]
    assert time.process_time() - began < 2  # the categories made for every 16 rows take longer


@pytest.mark.parametrize("twice", [[], ["c7"]])
def test_a_hundred_thousand_columns_take_a_moment(tmp_path, twice):
    names = [f"c{number}" for number in range(100_000)] + twice
    (tmp_path / "rows.csv").write_text(",".join(names) + "\n" + ",".join("1" for _ in names) + "\n")
    (tmp_path / "rows.jsonl").write_text("{" + ",".join(f'"{name}": 1' for name in names) + "}\n")
    began = time.monotonic()
    (of_csv,), (of_json,) = read(tmp_path / "rows.csv"), read(tmp_path / "rows.jsonl")
    assert time.monotonic() - began < 5
    if twice:
        assert (of_csv, of_json) == ("the header names c7 twice", "broken JSON: 'c7' stands twice in one object")
    else:
        assert len(of_csv) == len(of_json) == 100_000
