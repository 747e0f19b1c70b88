"""Types in words, and the field that was most likely meant."""

from __future__ import annotations

from typing import get_args

import pytest

from loadmaster.config.fields import choices, describe, fields, nearest, nearest_key, written
from loadmaster.config.schema import RowField
from loadmaster.config.synonyms import ALIASES, MEANT, NO_FIELD, OTHER_QUANTITIES, VALUES
from loadmaster.data.file_kinds import ROW_FIELDS


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("micro_batch_size", "an integer above 0, or auto"),
        ("max_steps", "an integer above 0, or null"),
        ("sequence_length", "an integer from 2 to 10000000"),
        ("checkpoint.keep_best", "an integer of at least 0"),
        ("seed", "an integer of at least 0 and below 9223372036854775808"),
        ("optimizer.warmup_ratio", "a number from 0 to 1"),
        ("lora.dropout", "a number of at least 0 and below 1"),
        ("data.validation", "text, a number above 0 and below 1, or null"),
        ("data.path", "text, or a list of texts"),
        ("data.packing", "true or false"),
        ("sharding", "one of auto, none, ddp, fsdp, zero1, zero2, zero3"),
        ("export.formats", "a list of adapter, bf16, fp8, fp8_block, int4, int4_gptq, int4_awq, nvfp4, gguf"),
        (
            "export.thresholds",
            "a mapping from adapter, bf16, fp8, fp8_block, int4, int4_gptq, int4_awq, nvfp4, gguf, or null",
        ),
    ],
)
def test_types_are_described_in_words(key: str, words: str):
    assert describe(fields()[key].annotation) == words


def test_every_field_of_the_schema_can_be_described():
    assert all(describe(field.annotation) for field in fields().values())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lora.rnk", "lora.rank"),
        ("lora.r", "lora.rank"),
        ("loar.rank", "lora.rank"),
        ("rank", "lora.rank"),
        ("optimiser.lr", "optimizer.lr"),
        ("Seed", "seed"),
        ("max_step", "max_steps"),
        ("hardware.gpus", "hardware.gpu"),
        ("xyzzy", None),
    ],
)
def test_the_nearest_key_is_found(wrong: str, right: str | None):
    assert nearest_key(wrong) == right


def test_what_other_tools_call_a_field_leads_to_a_field_that_exists():
    assert set(ALIASES.values()) <= set(fields())
    assert not set(ALIASES) & set(fields())
    assert MEANT.keys() | OTHER_QUANTITIES <= ALIASES.keys()
    assert not NO_FIELD.keys() & {name for key in fields() for name in (key, key.rpartition(".")[2])}
    assert not NO_FIELD.keys() & ALIASES.keys()


def test_what_other_tools_call_a_value_leads_to_a_value_that_the_field_takes():
    asked = [(ALIASES[name], value) for name, value in MEANT.items()]
    asked += [(key, value) for key, values in VALUES.items() for value in values.values()]
    assert [(key, value) for key, value in asked if choices(fields()[key].annotation)
            and value not in choices(fields()[key].annotation)] == []
    assert [key for key, values in VALUES.items() if set(values) & set(choices(fields()[key].annotation))] == []


def test_the_beginning_of_a_name_beats_a_similar_name():
    assert nearest("h100", ["h200", "h100_80gb"]) == "h100_80gb"


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), ((1, "a"), "[1,a]"), (0.5, "0.5")])
def test_values_are_written_as_in_yaml(value: object, text: str):
    assert written(value) == text


def test_every_field_that_tells_what_a_row_is_can_be_named():
    assert set(get_args(RowField)) >= ROW_FIELDS
