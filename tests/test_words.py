import io
from pathlib import Path

from rich.console import Console

from loadmaster.config.show import show_error
from loadmaster.errors import DataError
from loadmaster.launch.context import Launch
from loadmaster.preflight.table import _alternative
from loadmaster.words import counted, visible, without_password


def test_one_of_a_thing_is_no_plural():
    assert [counted(number, "row") for number in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]


def test_an_address_is_shown_without_its_password():
    asked = "https://me:ab@c@host:1/a and http://token@host/b@1, not ssh://host/a@b or me@host"
    shown = "https://...@host:1/a and http://...@host/b@1, not ssh://host/a@b or me@host"
    assert without_password(asked) == shown


def test_control_characters_are_shown_as_pictures_and_lines_stay_lines():
    assert visible("a\x1b]52;c;eA==\x07\tb\r\n\x7f\x9b2J") == "a\u241b]52;c;eA==\u2407\tb\r\n\u2421\ufffd2J"


def test_what_a_machine_says_does_not_steer_the_terminal_here():
    console = Console(file=io.StringIO(), force_terminal=True)
    Launch(None, console, "", Path(), None).echo("  | \x1b[2Jstep 1")
    assert console.file.getvalue() == "  | \u241b[2Jstep 1\n"


def test_the_error_of_a_row_shows_its_control_characters():
    stream = io.StringIO()
    show_error(DataError("no token is trained (my.jsonl:1)\n  <|user|>\x1b]52;c;eA==\x1b\\"), stream)
    assert stream.getvalue() == "error: no token is trained (my.jsonl:1)\n  <|user|>\u241b]52;c;eA==\u241b\\\n"


def test_the_rate_of_a_plan_that_would_fit_is_no_plural_at_one():
    option = {"change": "method=qlora", "hardware": "CPU", "plan": "qlora", "needs_gib": 1.0, "budget_gib": 2.0}
    option |= {"usd_per_hour": None, "cost_usd": None, "hours": None}
    assert ", 1 token/s)" in _alternative(option | {"tokens_per_second": 1.2})
    assert ", less than 1 token/s)" in _alternative(option | {"tokens_per_second": 0.2})
