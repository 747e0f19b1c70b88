"""Files of every kind, with the line of each row, and paths that lead nowhere."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys

import pytest

from loadmaster.data.sources import open_source
from loadmaster.errors import DataError


def rows_of(path) -> list[tuple[str, object]]:
    rows = open_source([str(one) for one in path] if isinstance(path, list) else str(path)).rows()
    return [(row.origin.rpartition("/")[2], row.error or row.value) for row in rows]


def test_jsonl_rows_have_their_line_and_broken_lines_do_not_stop_the_rest(write_jsonl):
    path = write_jsonl([{"n": 1}, "", '{"n": 2', {"n": 3}])
    (first, broken, last) = rows_of(path)
    assert (first, last) == (("rows.jsonl:1", {"n": 1}), ("rows.jsonl:4", {"n": 3}))
    assert broken[0] == "rows.jsonl:3" and broken[1].startswith("broken JSON")


def test_brackets_that_stand_too_deep_in_one_another_are_a_broken_row(tmp_path):
    deep = "[" * 50_000
    for name, before in (("rows.jsonl", '{"n": '), ("rows.json", '[{"n": '), ("object.json", '{"n": ')):
        (tmp_path / name).write_text(before + deep)
        ((origin, said),) = rows_of(tmp_path / name)
        assert origin == f"{name}:1" and said.startswith("broken JSON: brackets stand too deep")
    (tmp_path / "rows.csv").write_text(f"text\n{deep}]\n")
    assert rows_of(tmp_path / "rows.csv") == [("rows.csv:2", {"text": f"{deep}]"})]


def test_json_array_rows_have_the_line_they_start_on(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\ufeff\n[\n  {"n": 1,\n   "m": "a\\nb"},\n\n  {"n": 2}, {"n": 3}\n]\n', encoding="utf-8")
    assert [(origin, value["n"]) for origin, value in rows_of(path)] == [
        ("rows.json:3", 1),
        ("rows.json:6", 2),
        ("rows.json:6", 3),
    ]


def test_rows_of_an_array_on_one_line_are_counted(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"n": 1, "text": "a\nb"}, {"n": 2}]) + "\n")
    assert [(origin, value["n"]) for origin, value in rows_of(tmp_path / "rows.json")] == [
        ("rows.json:1", 1), ("rows.json:2", 2),
    ]


def test_every_line_is_right_in_an_indented_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"n": n, "text": "x\ny"} for n in range(50)], indent=2))
    lines = path.read_text().splitlines()
    for origin, value in rows_of(path):
        line = int(origin.rpartition(":")[2])
        assert lines[line - 1].strip() == "{" and f'"n": {value["n"]},' in lines[line]


@pytest.mark.parametrize(
    ("text", "good", "origin", "reason"),
    [
        ('[{"n": 1},\n {"n": oops}]', 1, "rows.json:2", "broken JSON"),
        ('[{"n": 1}\n {"n": 2}]', 1, "rows.json:2", "a comma or ] must"),
        ('[{"n": 1},\n', 1, "rows.json:2", "broken JSON"),
        ('[{"n": 1},\n {"n": "x', 1, "rows.json:2", "Unterminated string starting at '\"x'"),
        ('[{"n": 1}\n', 1, "rows.json:2", "the file ends where a comma or ] must"),
        ('{\n "rows": []\n}', 0, "rows.json:1", "one JSON object over several lines"),
        ('[{"n": 1}, {"n": oops}]', 1, "rows.json:2", "broken JSON"),  # of one line: the second row
        ('[{"n": 1}, {"n": 2}\n', 2, "rows.json:3", "the file ends where a comma or ] must"),
        ('[{"n": 1},\n {"n": 2}]\n\n[{"n": 3}]', 2, "rows.json:4", "'[{\"n\": 3}]' stands behind the list's end"),
        ('[{"n": 1}] x', 1, "rows.json:1", "'x' stands behind the list's end"),
        ('[{"n": 1},\n {"n": 2, "n": 3}]', 1, "rows.json:2", "'n' stands twice in one object"),
        ('{"n": 1}\n{"n": 2, "m": {"k": 0, "k": 0}}', 1, "rows.json:2", "'k' stands twice in one object"),
    ],
)
def test_broken_json_files_say_where(tmp_path, text, good, origin, reason):
    path = tmp_path / "rows.json"
    path.write_text(text)
    rows = rows_of(path)
    assert len(rows) == good + 1
    assert rows[-1][0] == origin and reason in rows[-1][1]


def test_json_lines_in_a_json_file_are_read_as_lines(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    assert rows_of(path) == [("rows.json:1", {"n": 1}), ("rows.json:2", {"n": 2})]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_rows_under_the_only_key_of_an_object_have_the_line_they_start_on(tmp_path, mark):
    path = tmp_path / "rows.json"
    path.write_text(mark + '\n{ "a \\" [": [\n  {"n": 1},\n\n  {"n": 2}]\n}\n', encoding="utf-8")
    assert rows_of(path) == [("rows.json:3", {"n": 1}), ("rows.json:5", {"n": 2})]
    path.write_text(mark + '{"data":[{"n":1},{"n":2}]}', encoding="utf-8")
    assert rows_of(path) == [("rows.json:1", {"n": 1}), ("rows.json:2", {"n": 2})]


def test_rows_under_one_of_several_keys_are_not_read_and_the_remedy_takes_them_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({"version": 1, "data": [{"n": 1}]}))
    (row,) = open_source("mine.json").rows()
    assert (row.origin, row.error) == ("mine.json:1", "the file is one JSON object, with rows under data")
    subprocess.run(row.remedy.removeprefix("take them out: ").replace("python", sys.executable), shell=True, check=True)
    assert rows_of(tmp_path / "rows.json") == [("rows.json:1", {"n": 1})]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "x"}]},
        {"chat": [{"role": "user", "content": "x"}]},
        {"turns": [{"from": "human", "value": "x"}]},
        {"conversations": [{"speaker": "x"}]},
        {"text": "x", "spans": [{"start": 1}]},
        {"prompt": "x", "completion": "y", "sources": [{"url": "z"}]},
        {"data": ["x"]},
        {"data": []},
    ],
)
def test_a_file_of_one_row_is_not_taken_for_an_object_that_holds_rows(tmp_path, row):
    (tmp_path / "rows.json").write_text(json.dumps(row) + "\n")
    assert rows_of(tmp_path / "rows.json") == [("rows.json:1", row)]


@pytest.mark.parametrize(
    ("name", "content", "origin"),
    [
        ("rows.jsonl", '{"n": 1}\n{"n": "Döbel"}\n'.encode("latin-1"), "rows.jsonl:2"),
        ("rows.json", '[{"n": "Döbel"}]'.encode("latin-1"), "rows.json:1"),
        ("rows.csv", "n\nDöbel\n".encode("latin-1"), "rows.csv:2"),
        ("rows.csv", "n\nDöbel\n".encode("utf-16"), "rows.csv:1"),
        ("rows.jsonl", '{"n": 1}\n{"n": 2}\n'.encode("utf-16"), "rows.jsonl:1"),
    ],
)
def test_a_file_that_is_not_utf8_is_to_be_saved_as_such(tmp_path, name, content, origin):
    (tmp_path / name).write_bytes(content)
    (bad,) = (row for row in open_source(str(tmp_path / name)).rows() if row.error)
    assert bad.origin.endswith(origin) and bad.error.startswith("is not UTF-8 text")
    assert bad.remedy.startswith("save the file as UTF-8")


LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "is_what", "remedy"),
    [
        ("rows.jsonl", gzip.compress(LINE, mtime=0), "is packed by gzip", "unpack it first"),
        ("rows.csv", b"PK\x03\x04" + LINE, "is a zip archive", "unpack it first (unzip); save the sheet as .csv"),
        ("rows.jsonl", b"PAR1\x15\x04", "is a Parquet file", "name it .parquet"),
        ("rows.json", b"PAR1\x15\x04", "is a Parquet file", "name it .parquet"),
        ("rows.parquet", LINE, "is JSON", "name it .jsonl"),
        ("rows.csv", LINE, "is JSON", "name it .jsonl"),
        ("rows.csv", b'[\n  {\n    "text": "a"}]', "is JSON", "name it .json, "),
        ("rows.jsonl", b'[\n  {"text": "a"}\n]', "is a JSON list over several lines", "name it .json, "),
        ("rows.jsonl", b'{\n  "text": "a"\n}\n', "holds JSON objects over several lines", "jq -c ."),
        ("rows.jsonl", b"id,text\n1,a\n", "is CSV", "name it .csv"),
        ("rows.parquet", b"id,text\n1,a\n", "is CSV", "name it .csv"),
        ("rows.json", b"prompt;completion\r\na;b\r\n", "is CSV", "name it .csv"),
        ("rows.jsonl", b"prompt\tcompletion\na\tb\n", "is CSV", "name it .csv"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS", "git lfs pull"),
        ("rows.json", b"<!DOCTYPE html>\n<html>", "is a web page", "fetch the file itself"),
        ("rows.jsonl", LINE.decode().encode("utf-16-le"), "is not UTF-8 text: it begins as UTF-16", "-f UTF-16LE"),
        ("rows.jsonl", LINE.decode().encode("utf-16-be"), "is not UTF-8 text: it begins as UTF-16", "-f UTF-16BE"),
        ("rows.jsonl", LINE.decode().encode("utf-32-le"), "is not UTF-8 text: it begins as UTF-32", "-f UTF-32LE"),
        ("rows.jsonl", bytes(40), "is not text: it begins with zeros", "the file is damaged"),
        ("rows.jsonl", LINE.decode().encode("utf-32"), "is not UTF-8 text: it begins as UTF-32", "-f UTF-32 "),
    ],
)
def test_a_file_that_is_something_else_than_its_name_says_is_called_what_it_is(
    tmp_path, name, content, is_what, remedy
):
    (tmp_path / name).write_bytes(content)
    (bad,) = open_source(str(tmp_path / name)).rows()
    assert bad.origin.endswith(f"{name}:1") and bad.error.startswith(is_what) and remedy in bad.remedy


def test_a_folder_named_as_a_file_of_rows_holds_them_and_a_link_to_none_is_named(tmp_path):
    (tmp_path / "first.jsonl").mkdir()
    (tmp_path / "first.jsonl/rows.jsonl").write_bytes(LINE)
    assert [row.value for row in open_source(str(tmp_path)).rows()] == [{"text": "a"}]
    (tmp_path / "second.jsonl").symlink_to("blobs/none")
    with pytest.raises(DataError, match=r"second\.jsonl is a link to blobs/none, which is not there"):
        open_source(str(tmp_path))


def test_parquet_rows_lose_the_nulls_that_columns_add(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "x", "name": None}]},
        {"messages": [{"role": "user", "content": "y", "name": "n"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == [
        ("rows.parquet:1", {"messages": [{"role": "user", "content": "x"}]}),
        ("rows.parquet:2", {"messages": [{"role": "user", "content": "y", "name": "n"}]}),
    ]
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    assert "is not readable Parquet" in rows_of(tmp_path / "torn.parquet")[0][1]


def test_a_parquet_file_with_two_columns_of_one_name_says_so(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == [("rows.parquet:1", "names the column text twice")]


def test_folders_and_lists_are_read_in_order_without_hidden_files(tmp_path, write_jsonl):
    write_jsonl([{"n": 2}], "b.jsonl")
    write_jsonl([{"n": 1}], "a.jsonl")
    write_jsonl([{"n": 0}], ".hidden.jsonl")
    (tmp_path / "notes.md").write_text("not data")
    assert [origin for origin, _ in rows_of(tmp_path)] == ["a.jsonl:1", "b.jsonl:1"]
    listed = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    assert [origin for origin, _ in rows_of(listed)] == ["b.jsonl:1", "a.jsonl:1"]


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path, write_jsonl):
    first = open_source(str(write_jsonl([{"n": 1}], "a.jsonl"))).fingerprint()
    assert open_source(str(write_jsonl([{"n": 1}], "b.jsonl"))).fingerprint() == first
    assert open_source(str(write_jsonl([{"n": 2}], "a.jsonl"))).fingerprint() != first


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("???", "data.path is not set"),
        ([], "an empty list"),
        ("./none.jsonl", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
    ],
)
def test_paths_that_lead_nowhere_say_so(path, reason):
    with pytest.raises(DataError, match=reason):
        open_source(path)


def test_a_misspelt_file_name_is_answered_with_the_nearest(tmp_path, write_jsonl):
    write_jsonl([{"n": 1}], "tickets.jsonl")
    with pytest.raises(DataError, match=r"did you mean .*tickets\.jsonl"):
        open_source(str(tmp_path / "tikets.jsonl"))


def test_what_cannot_be_opened_is_not_answered_with_itself(tmp_path):
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path / "gone.jsonl"))
    assert "did you mean" not in str(caught.value)


def csv_rows(tmp_path, content: bytes) -> list[tuple[str, object]]:
    (tmp_path / "rows.csv").write_bytes(content)
    return rows_of(tmp_path / "rows.csv")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_csv_rows_have_the_line_they_start_on_and_quoted_newlines(tmp_path, mark, end):
    lines = [b"prompt,completion", b'"Two,', b'lines ""?""",Yes.', b"", "Ein Fisch,Döbel".encode(), b"Empty,"]
    first, *rest = csv_rows(tmp_path, mark + end.join(lines))
    assert first == ("rows.csv:2", {"prompt": f'Two,{end.decode()}lines "?"', "completion": "Yes."})
    assert rest == [
        ("rows.csv:5", {"prompt": "Ein Fisch", "completion": "Döbel"}),
        ("rows.csv:6", {"prompt": "Empty", "completion": ""}),
    ]


def test_csv_rows_that_do_not_fit_the_header_do_not_stop_the_rest(tmp_path):
    long = "x" * 200_000
    content = f'text,n\na,1\nb\nc,2,3\n"d" d,4\n{long},5\n'.encode() + b'caf\xe9,6\nl,7\n"open,8\nm,9\n'
    rows = csv_rows(tmp_path, content)
    assert rows[0] == ("rows.csv:2", {"text": "a", "n": "1"})
    assert rows[1] == ("rows.csv:3", "has too few cells: 1, for 2 columns")
    assert rows[2] == ("rows.csv:4", "has too many cells: 3, for 2 columns")
    assert rows[3][0] == "rows.csv:5" and rows[3][1].startswith("broken CSV")
    assert rows[4] == ("rows.csv:6", {"text": long, "n": "5"})
    assert rows[5] == ("rows.csv:7", "is not UTF-8 text")
    assert rows[6] == ("rows.csv:8", {"text": "l", "n": "7"})
    assert rows[7][0] == "rows.csv:9" and rows[7][1].startswith("broken CSV") and len(rows) == 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\n\na,b\n", "the header is empty"),
        (b",\na,b\n", "the header is empty"),
        (b",prompt,completion\n0,a,b\n", "column 1 has no name in the header"),
        (b"a,b,a\n1,2,3\n", "the header names a twice"),
        (b"prompt|completion\na|b\n", "the columns are separated by '|'"),
        (b"pr\xf6mpt,completion\na,b\n", "is not UTF-8 text"),
    ],
)
def test_a_csv_file_without_a_header_that_names_its_columns_says_so(tmp_path, content, reason):
    ((origin, said),) = csv_rows(tmp_path, content)
    assert origin == "rows.csv:1" and reason in said


@pytest.mark.parametrize("mark", [";", "\t"])
def test_columns_may_be_apart_by_semicolons_or_tabs(tmp_path, mark):
    content = f'\ufeffprompt{mark}"the answer"\r\n"a{mark} b"{mark}c, d\r\n'.encode()
    assert csv_rows(tmp_path, content) == [("rows.csv:2", {"prompt": f"a{mark} b", "the answer": "c, d"})]


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "\ufeffSEP=;"])
def test_a_line_before_the_header_may_say_by_what_columns_are_apart(tmp_path, line):
    content = f"{line}\r\nprompt, in words;completion\r\na, b;c\r\nd\r\n".encode()
    row = {"prompt, in words": "a, b", "completion": "c"}
    assert csv_rows(tmp_path, content) == [("rows.csv:3", row), ("rows.csv:4", "has too few cells: 1, for 2 columns")]


def test_csv_files_of_folders_are_read_and_an_empty_one_has_no_rows(tmp_path, write_jsonl):
    (tmp_path / "A.CSV").write_text("n\n2\n")
    (tmp_path / "c.csv").write_text("")
    assert rows_of(tmp_path) == [("A.CSV:2", {"n": "2"})]
    write_jsonl([{"n": 1}], "b.jsonl")  # beside it they are tables about the rows, or the same rows
    assert rows_of(tmp_path) == [("b.jsonl:1", {"n": 1})]


def test_a_csv_cell_with_a_list_of_turns_is_that_list_and_any_other_is_text(tmp_path):
    turns = '[{"role": "user", "content": "hi"}]'
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], [turns, '[{"name": "x"}]'], ["[1, 2]", "[not JSON]"]])
    assert [row for _, row in rows_of(tmp_path / "a.csv")] == [
        {"prompt": [{"role": "user", "content": "hi"}], "completion": '[{"name": "x"}]'},
        {"prompt": "[1, 2]", "completion": "[not JSON]"},
    ]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rows.txt", r'one JSON object \{"text": ...\} a line'),
        ("rows.jsonl.gz", "unpack it first"),
        ("rows.xlsx", r"save the sheet as \.csv"),
        ("rows.tsv", r"name it \.csv, where tabs are read too"),
        ("rows.pickle", r"write it as \.jsonl"),
    ],
)
def test_other_files_are_refused_with_what_to_make_of_them(tmp_path, name, remedy):
    (tmp_path / name).write_text("a")
    with pytest.raises(DataError, match=rf"only files with \.json, \.jsonl, \.ndjson, \.csv.*\n    fix: .*{remedy}"):
        open_source(str(tmp_path / name))


def test_a_folder_without_a_file_that_is_read_is_refused(tmp_path):
    (tmp_path / "rows.tsv").write_text("a")
    with pytest.raises(DataError, match="a folder with no"):
        open_source(str(tmp_path))


def test_a_hub_dataset_that_cannot_be_loaded_is_a_data_error_with_a_remedy(monkeypatch):
    import datasets

    def unreachable(path, name, split):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach the Hub\n    fix: .*HF_TOKEN"):
        open_source("owner/name")


def test_a_file_name_that_could_be_a_hub_id_is_answered_with_the_nearest_file(tmp_path, write_jsonl, monkeypatch):
    write_jsonl([{"n": 1}], "tickets.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"did you mean 'tickets\.jsonl'"):
        open_source("tickets.jsn")


def test_hub_rows_are_numbered_and_cleaned(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "x", "name": None}]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: rows if split == "train_sft" else None)
    read = list(open_source("owner/name", "train_sft").rows())
    assert [(row.origin, row.value) for row in read] == [
        ("owner/name:1", {"messages": [{"role": "user", "content": "x"}]})
    ]


def test_a_subset_of_a_hub_dataset_is_read_and_where_it_has_several_they_are_named(monkeypatch, tmp_path):
    import datasets

    load = datasets.load_dataset
    for name in ("main", "socratic"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "4"}))
    card = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic")]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(card)}---\n")
    local = {"path": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: load(name=name, split=split, **local))
    assert [row.value["question"] for row in open_source("owner/name", subset="socratic").rows()] == ["socratic"]
    with pytest.raises(DataError, match=r"Config name is missing.*'main', 'socratic'.*\n    fix: .*data\.subset"):
        open_source("owner/name")


def test_files_and_hub_datasets_in_one_list_are_read_in_that_order(monkeypatch, write_jsonl):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "hub"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: rows)
    paths = [str(write_jsonl([{"text": name}], f"{name}.jsonl")) for name in ("first", "last")]
    source = open_source([paths[0], "owner/name", paths[1]])
    assert [row.value["text"] for row in source.rows()] == ["first", "hub", "last"]
    assert len(source.fingerprint()) == 3 and source.names()[1] == "owner/name"
    with pytest.raises(DataError, match=r"'gone\.jsonl': no such file"):
        open_source(["owner/name", "gone.jsonl"])
