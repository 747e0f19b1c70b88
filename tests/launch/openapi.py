"""What the provider's description says of a request or an answer; an unknown key is an error in both."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

DESCRIPTION = json.loads(Path(__file__).with_name("runpod_v2.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Operation:
    name: str
    method: str
    pattern: re.Pattern
    parameters: list[dict[str, Any]]
    request: dict[str, Any] | None
    responses: dict[str, dict[str, Any] | None]


def _operations() -> list[Operation]:
    found = []
    for name, operation in DESCRIPTION["operations"].items():
        pattern = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", operation["path"]))
        found.append(
            Operation(
                name,
                operation["method"],
                pattern,
                operation["parameters"],
                operation["request"],
                operation["responses"],
            )
        )
    return found


OPERATIONS = _operations()


def find(method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
    for operation in OPERATIONS:
        match = operation.pattern.fullmatch(path)
        if match and operation.method == method:
            return operation, match.groupdict()
    return None


@cache
def _validator(text: str, closed: bool) -> Draft202012Validator:
    schema = {"allOf": [json.loads(text)], "components": DESCRIPTION["components"]}
    if closed:
        schema["unevaluatedProperties"] = False
    return Draft202012Validator(schema)


def errors(schema: dict[str, Any], value: Any, closed: bool = True) -> list[str]:
    validator = _validator(json.dumps(schema), closed)
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(value)]


def query_errors(operation: Operation, query: dict[str, str]) -> list[str]:
    known = {p["name"]: p for p in operation.parameters if p["in"] == "query"}
    found = [f"query: unknown parameter {name}" for name in query if name not in known]
    for name in query.keys() & known.keys():
        schema = known[name]["schema"]
        found += [f"query {name}: {said}" for said in errors(schema, _coerced(schema, query[name]), closed=False)]
    return found


def _coerced(schema: dict[str, Any], text: str) -> Any:
    kind = schema.get("type")
    if kind == "integer" and text.lstrip("-").isdigit():
        return int(text)
    if kind == "boolean" and text in ("true", "false"):
        return text == "true"
    return text.split(",") if kind == "array" else text


def response_errors(operation: Operation, status: int, value: Any) -> list[str]:
    schema = operation.responses.get(str(status), operation.responses.get("default"))
    if schema is None:
        return [] if value is None else [f"{operation.name} {status} has no body"]
    return [f"{operation.name} {status}: {said}" for said in errors(schema, value)]
