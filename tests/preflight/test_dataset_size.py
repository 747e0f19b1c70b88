"""How much a data set is said to be before anything is tokenised: the same in whatever form its rows are written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from loadmaster.config.chat_template import opening
from loadmaster.config.compose import compose
from loadmaster.dataset_size import dataset_tokens
from loadmaster.preflight.dataset import text_tokens

ANSWER = "On its way to you, since Monday; it should be there in two or three days. "
ROWS = [{"prompt": f"Where is my parcel {n}?", "completion": ANSWER * (1 + n % 7)} for n in range(6000)]
MIB = 2**20


def tokens(path: Path, *words: str) -> int:
    return dataset_tokens(compose(["data=file", f"data.path={path}", "data.validation=null", *words]).job)


@pytest.fixture(scope="module")
def by_line(tmp_path_factory) -> int:
    file = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tokens(file)


@pytest.mark.parametrize("written", [
    json.dumps(ROWS), json.dumps(ROWS, indent=4), json.dumps({"data": ROWS}), json.dumps({"data": ROWS}, indent=4),
    "".join(json.dumps(row) + "\n" for row in ROWS),
], ids=["line", "indented", "under a key", "under a key, indented", "lines"])  # fmt: skip
def test_large_json_is_weighed_by_its_first_rows(written, by_line, tmp_path) -> None:
    (file := tmp_path / "rows.json").write_text(written)
    assert file.stat().st_size > MIB
    assert tokens(file) == pytest.approx(by_line, rel=0.01)


@pytest.mark.parametrize("key", ["tags", "tools"])
def test_a_list_in_each_line_is_not_the_lists_of_rows(key, by_line, tmp_path) -> None:
    (file := tmp_path / "rows.json").write_text("".join(json.dumps({key: [], **row}) + "\n" for row in ROWS))
    assert tokens(file) == pytest.approx(by_line, rel=0.01)


def test_files_that_are_too_many_to_look_into_are_like_the_first(tmp_path) -> None:
    for number in range(250):
        (tmp_path / f"{number:03}.jsonl").write_text((json.dumps({"text": "a word or two " * 10}) + "\n") * 4)
    each = text_tokens("a word or two " * 10) + 1
    for words, rows in (([], 1000), (["data.max_rows=900"], 900)):
        assert tokens(tmp_path, *words) == pytest.approx(rows * each, rel=0.001)


def test_a_character_is_one_whether_it_is_escaped_or_not(tmp_path) -> None:
    rows = [{"text": f"包裹在路上 {n}"} for n in range(100)]
    (plain := tmp_path / "plain.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (escaped := tmp_path / "escaped.json").write_text(json.dumps(rows))
    true = pytest.approx(sum(text_tokens(row["text"]) + 1 for row in rows), abs=1)
    assert tokens(plain) == true and tokens(escaped) == true


@pytest.mark.parametrize("group", [10_000, 500])
def test_parquet_is_weighed_by_its_rows_however_small_it_is_packed(group, by_line, tmp_path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=group)
    assert file.stat().st_size < 0.2 * sum(len(json.dumps(row)) for row in ROWS)
    assert tokens(file) == pytest.approx(by_line, rel=0.03)


def test_parquet_whose_later_rows_are_longer(tmp_path) -> None:
    rows = [{"text": f"{n % 10} of many. " * (20 if n < 2000 else 60)} for n in range(4000)]
    file = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file, row_group_size=500, use_dictionary=False)
    true = sum(text_tokens(row["text"]) + 1 for row in rows)
    assert tokens(file) == pytest.approx(true, rel=0.03)


def test_a_list_that_no_memory_holds_is_weighed_by_its_beginning(tmp_path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS[:70] * 200))
    of_each = tokens(file) / (70 * 200)
    os.truncate(file, 2**43)  # a hole, which takes no room
    assert tokens(file, "data.max_rows=100") == pytest.approx(100 * of_each, rel=0.01)


HUGE = {"text": "word " * 300_000}


@pytest.mark.parametrize(("name", "content"), [
    ("rows.json", json.dumps([HUGE, {"text": "a"}])), ("rows.jsonl", json.dumps(HUGE) + "\n" + json.dumps(HUGE)),
    ("rows.json", "[" * 2_000_000), ("rows.json", '[{"text": "a"}, ' + '{"a": ' * 300_000),
    ("rows.json", json.dumps([[1]] * 300_000)), ("rows.jsonl", "x\n" * 700_000), ("rows.jsonl", "\n" * 2_000_000),
    ("rows.json", '[{"text": "caf\udce9"}' + ', {"text": "caf\udce9"}' * 100_000),
    ("rows.parquet", "PAR1" + "\0" * 1_500_000 + "PAR1"), ("rows.parquet", "PAR1"),
    ("rows.csv", 'text\n"' + "a " * MIB),
])  # fmt: skip
def test_files_whose_rows_are_broken_or_endless_are_weighed_all_the_same(name, content, tmp_path) -> None:
    (file := tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    assert 1 <= tokens(file, "data.on_bad_row=skip") <= max(1, file.stat().st_size)


def test_rows_are_counted_over_files_up_to_the_most(tmp_path) -> None:
    for name, text in (("a", "a word or two " * 10), ("b", "a word or two " * 50)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * 200)
    short, long = (text_tokens("a word or two " * times) + 1 for times in (10, 50))
    for most, expected in ((100, 100 * short), (250, 200 * short + 50 * long), (900, 200 * (short + long))):
        assert tokens(tmp_path, f"data.max_rows={most}") == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(("words", "share"), [
    ([], 0.5), (["data.on_long_row=split"], 1), (["data.on_long_row=drop"], 0), (["data.on_long_row=refuse"], 1),
])  # fmt: skip
def test_what_is_cut_off_or_left_out_is_not_planned_for(words, share, tmp_path) -> None:
    text = "a word or two " * 400
    (file := tmp_path / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * 50)
    length = round((text_tokens(text) + 1) / 2)
    expected = max(1, share * 50 * (text_tokens(text) + 1))
    assert tokens(file, f"sequence_length={length}", *words) == pytest.approx(expected, rel=0.002)


def test_a_pair_is_as_long_as_both_of_its_answers(tmp_path) -> None:
    pair = {"prompt": "Where is it?", "chosen": "on its way " * 20, "rejected": "who knows " * 20}
    (file := tmp_path / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 50)
    both = tokens(file, "objective=dpo") / 50
    assert tokens(file, "objective=dpo", f"sequence_length={round(both * 1.1)}") == round(both * 50)
    assert tokens(file, "objective=dpo", f"sequence_length={round(both * 0.8)}") == 1


BY_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BRIEF = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + BY_TURNS


@pytest.mark.parametrize(("template", "begins"), [
    (BY_TURNS, ""), (BRIEF, "<|im_start|>system\nBe brief."), ("{{ bos_token }}" + BY_TURNS, ""),
    ("{% generation %}{% endgeneration %}{{ strftime_now('%%') }} on." + BY_TURNS, "% on."),
    ("{% if tools is not none %}Tools.{% endif %}" + BY_TURNS, ""), ("{{ messages[0].content[0].text }}", None),
    ("{{ raise_exception('no') }}", None), ("{% for", None), ("{{ messages[9].role.name }}", None),
])  # fmt: skip
def test_what_a_template_writes_in_place_of_a_system_message(template, begins) -> None:
    assert opening(template) == begins


def test_the_model_says_what_stands_in_place_of_a_system_message(smollm2, tmp_path) -> None:
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:700]))
    (tmp_path / "brief.jinja").write_text(BRIEF)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps({"chat_template": BY_TURNS}))
    (tmp_path / "none").mkdir()
    for folder in ("model", "none"):
        (tmp_path / folder / "config.json").write_text("{}")

    def of_each(*words: str) -> float:
        return tokens(file, *words) / 700

    bare, stop = of_each("model.name=Qwen/Qwen3-8B"), "stop_after=plan"
    assert of_each(f"model.path={tmp_path}/model", stop) == bare == of_each("model.name=google/gemma-2-2b-it")
    assert of_each("model.name=Qwen/Qwen2.5-7B-Instruct") == bare + 20 == of_each(f"model.path={tmp_path}/none", stop)
    assert of_each("model.name=Qwen/Qwen2.5-7B-Instruct", f"model.chat_template={tmp_path}/brief.jinja") == (
        pytest.approx(bare + text_tokens("<|im_start|>system\nBe brief."), abs=0.01)
    )
    assert of_each(f"model.path={smollm2}") == pytest.approx(bare + 21, abs=2)


def test_text_of_the_house_is_near_what_a_tokenizer_makes_of_it(tokenizer) -> None:
    pages = [(Path(__file__).parents[2] / name).read_text(encoding="utf-8") for name in ("README.md", "docs/launch.md")]
    tickets = (Path(__file__).parents[2] / "data/tickets/train.jsonl").read_text(encoding="utf-8").splitlines()
    said = [" ".join(turn["content"] for turn in json.loads(line)["messages"]) for line in tickets]
    for text, low in (("\n".join(said), 0.8), *((page, 0.7) for page in pages)):
        assert low < text_tokens(text) / len(tokenizer(text).input_ids) < 1.05
