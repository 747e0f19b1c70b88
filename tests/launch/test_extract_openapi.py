"""The committed extract of the provider's description is what the script makes of the full one."""

from __future__ import annotations

import json
from pathlib import Path

from jsonschema import Draft202012Validator

from tests.launch.extract_openapi import OPERATIONS, PROSE, TARGET, write

FULL = Path(__file__).parents[3] / "shared" / "reference" / "runpod-openapi-v2.json"


def test_the_extract_is_current_where_the_full_description_is_at_hand():
    text = TARGET.read_text(encoding="utf-8")
    if FULL.exists():
        assert write(json.loads(FULL.read_text(encoding="utf-8"))) == text
    extract = json.loads(text)
    assert list(extract["operations"]) == list(OPERATIONS)
    assert "2026-08-20" in extract["source"]


def test_the_extract_has_no_prose_and_every_reference_leads_somewhere():
    extract = json.loads(TARGET.read_text(encoding="utf-8"))
    schemas = extract["components"]["schemas"]

    def walk(value, names=False):
        if isinstance(value, dict):
            if not names:
                assert not value.keys() & PROSE
                if "$ref" in value:
                    assert value["$ref"].removeprefix("#/components/schemas/") in schemas
            for key, item in value.items():
                walk(item, key in ("properties", "schemas", "operations") and not names)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(extract)
    for name, schema in schemas.items():
        Draft202012Validator.check_schema(schema), name
