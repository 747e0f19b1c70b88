"""docs/configuration.md says what the schema, the groups, the recipes and the rules say."""

from __future__ import annotations

import subprocess
import sys

from loadmaster.config.docs import PAGE, page
from loadmaster.config.fields import fields
from loadmaster.config.rules import RULES


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m loadmaster.config.docs"


def test_every_field_has_a_help_text_and_is_on_the_page_with_every_rule():
    text = page()
    for key, field in fields().items():
        assert field.help.endswith("."), key
        assert f"| `{key}` |" in text
    for rule in RULES:
        assert rule.explanation in text


def test_the_rules_stand_in_one_order_whichever_is_imported_first():
    code = "import loadmaster.config.{}; from loadmaster.config.rules import RULES; print([r.name for r in RULES])"
    orders = {
        subprocess.run([sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True).stdout
        for first in ("rules", "job_rules", "serving_rules")
    }
    assert orders == {f"{[rule.name for rule in RULES]}\n"}
