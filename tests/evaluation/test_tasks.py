"""Task metrics against tables of answers."""

from __future__ import annotations

import pytest

from loadmaster.errors import DataError
from loadmaster.evaluation.tasks import METRICS, parse_object, task_metric

TICKET = '{"product":"kettle","order":"123","paid":true,"items":1}'


@pytest.mark.parametrize(
    "answer",
    [
        TICKET,
        f"  {TICKET}\n",
        '{ "order": "123", "product": "kettle",\n "items": 1, "paid": true }',
        '{"product":"kettl\\u0065","order":"123","paid":true,"items":1.0}',
    ],
)
def test_the_same_object_is_right_however_it_is_spaced_ordered_or_escaped(answer):
    assert task_metric("json_fields", [answer], [TICKET])["metric"] == 1.0


@pytest.mark.parametrize(
    ("answer", "valid", "fields_right"),
    [
        ("", 0, 0),
        ("Sure! " + TICKET, 0, 0),
        (TICKET + " Anything else?", 0, 0),
        ("```json\n" + TICKET + "\n```", 0, 0),
        (TICKET[:-1], 0, 0),
        (TICKET + TICKET, 0, 0),
        (TICKET.replace('"', "'"), 0, 0),
        (TICKET.replace("1}", "1,}"), 0, 0),
        (TICKET.replace(":1}", ":NaN}"), 0, 0),
        (TICKET.replace(":1}", ":-Infinity}"), 0, 0),
        (TICKET.replace("}", ',"product":"kettle"}'), 0, 0),
        (TICKET.replace(":1}", ':{"a":1,"a":2}}'), 0, 0),
        (f"[{TICKET}]", 0, 0),
        ('"kettle"', 0, 0),
        ("null", 0, 0),
        ("{" * 100_000, 0, 0),
        ('{"a":' * 100_000, 0, 0),
        ("1" * 10_000, 0, 0),
        ("{}", 1, 0),
        (TICKET.replace("kettle", "Kettle"), 1, 3),
        (TICKET.replace('"123"', "123"), 1, 3),
        (TICKET.replace('"123"', "null"), 1, 3),
        (TICKET.replace("true", "1"), 1, 3),
        (TICKET.replace(":1}", ":true}"), 1, 3),
        (TICKET.replace('"items":1', '"item":1'), 1, 3),
        (TICKET.replace("}", ',"note":null}'), 1, 4),
    ],
)
def test_a_wrong_answer_is_wrong_and_says_how_far(answer, valid, fields_right):
    figures = task_metric("json_fields", [answer], [TICKET])
    assert (figures["metric"], figures["valid_json"], figures["field_match"]) == (0.0, valid, fields_right / 4)


def test_json_figures_are_means_over_rows_and_over_the_rows_that_have_a_field():
    references = ['{"a":1,"b":null}', '{"a":2,"b":"x"}', '{"a":3}']
    answers = ['{"a":1,"b":null}', '{"a":2,"b":"y"}', "three"]
    assert task_metric("json_fields", answers, references) == {
        "metric": 1 / 3,
        "valid_json": 2 / 3,
        "field_match": (1 + 1 / 2 + 0) / 3,
        "per_field": {"a": 2 / 3, "b": 1 / 2},
        "rows": 3,
    }


def test_nested_values_are_compared_as_json():
    reference = '{"items":[{"n":1,"ok":true}],"where":{"x":[]}}'
    for answer, right in [
        ('{"where":{"x":[]},"items":[{"ok":true,"n":1}]}', 1.0),
        ('{"where":{"x":[]},"items":[{"ok":1,"n":1}]}', 0.0),
        ('{"where":{"x":[]},"items":[]}', 0.0),
        ('{"where":{"x":{}},"items":[{"ok":true,"n":1}]}', 0.0),
        ('{"where":{"x":[],"y":1},"items":[{"ok":true,"n":1}]}', 0.0),
        ('{"where":{},"items":[{"ok":true,"n":1}]}', 0.0),
    ]:
        assert task_metric("json_fields", [answer], [reference])["metric"] == right, answer


def test_a_field_that_is_left_out_is_not_one_that_is_null():
    figures = task_metric("json_fields", ['{"a":1}'], ['{"a":1,"b":null}'])
    assert (figures["metric"], figures["field_match"], figures["per_field"]) == (0.0, 0.5, {"a": 1.0, "b": 0.0})


def test_an_empty_object_is_matched_only_by_itself():
    assert task_metric("json_fields", ["{}"], ["{}"])["field_match"] == 1.0
    assert task_metric("json_fields", ["none"], ["{}"])["field_match"] == 0.0
    assert parse_object("{}") == {}


def test_a_reference_that_is_no_json_object_names_the_row_and_another_task():
    with pytest.raises(DataError, match=r"number 2 .*'Paris'.*exact_match"):
        task_metric("json_fields", ["{}", "{}"], ["{}", "Paris"])


def test_exact_match_ignores_white_space_at_the_ends_only():
    answers = ["Paris\n", "paris", "New  York", "Paris, France", "", " "]
    references = ["Paris", "Paris", "New York", "Paris", " ", ""]
    assert task_metric("exact_match", answers, references) == {"metric": 0.5, "rows": 6}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_leads_with_metric_and_refuses_an_empty_set(name):
    figures = task_metric(name, [TICKET], [TICKET])
    assert next(iter(figures)) == "metric"
    assert figures["metric"] == 1.0
    assert figures["rows"] == 1
    with pytest.raises(DataError, match="no held-out conversation"):
        task_metric(name, [], [])


def test_the_registry_has_every_task_of_the_schema():
    from typing import get_args, get_type_hints

    from loadmaster.config.schema import EvaluationConfig

    assert set(get_args(get_type_hints(EvaluationConfig)["task"])) == {"none", *METRICS}
