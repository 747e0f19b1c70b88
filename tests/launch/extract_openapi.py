"""Cut the provider's OpenAPI description down to the operations that loadmaster calls, without its prose.

    python tests/launch/extract_openapi.py FULL_DESCRIPTION.json

writes tests/launch/runpod_v2.json: the operations below with their parameters, bodies and answers, and every
schema these refer to. Descriptions, summaries, titles and examples are left out: what remains are facts that a
validator reads. Source: Runpod's published description of REST API v2 (openapi 3.1, version 2.0.0), as stored
on 2026-08-20.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).with_name("runpod_v2.json")
SOURCE = "Runpod REST API v2, published OpenAPI description, version 2.0.0, stored 2026-08-20"
OPERATIONS = (
    "listPods", "createPod", "getPod", "deletePod", "getPodLogs",
    "listClusters", "createCluster", "getCluster", "deleteCluster", "listClusterPods",
    "listNetworkVolumes", "createNetworkVolume", "getNetworkVolume", "deleteNetworkVolume",
    "listEndpoints", "createEndpoint", "updateEndpoint", "deleteEndpoint", "listEndpointWorkers",
    "listServerlessBilling", "listGpuTypes",
)
PROSE = {"description", "summary", "title", "example", "examples", "tags", "x-enum-varnames"}
SCHEMAS = "#/components/schemas/"


def extract(full: dict[str, Any]) -> dict[str, Any]:
    operations = {}
    for path, methods in full["paths"].items():
        for method, operation in methods.items():
            if isinstance(operation, dict) and operation.get("operationId") in OPERATIONS:
                parameters = [*methods.get("parameters", []), *operation.get("parameters", [])]
                operations[operation["operationId"]] = {
                    "method": method.upper(),
                    "path": path,
                    "parameters": [_parameter(full, parameter) for parameter in parameters],
                    "request": _json_schema(operation.get("requestBody", {})),
                    "responses": {
                        status: _json_schema(_resolve(full, response))
                        for status, response in operation["responses"].items()
                    },
                }
    missing = set(OPERATIONS) - set(operations)
    if missing:
        raise SystemExit(f"the description lacks {', '.join(sorted(missing))}")
    schemas = full["components"]["schemas"]
    return {
        "source": SOURCE,
        "made_by": "tests/launch/extract_openapi.py",
        "operations": {name: operations[name] for name in OPERATIONS},
        "components": {"schemas": {name: _bare(schemas[name]) for name in _reached(operations, schemas)}},
    }


def _parameter(full: dict[str, Any], parameter: dict[str, Any]) -> dict[str, Any]:
    found = _resolve(full, parameter)
    return {
        "name": found["name"],
        "in": found["in"],
        "required": found.get("required", False),
        "schema": _bare(found["schema"]),
    }


def _json_schema(holder: dict[str, Any]) -> dict[str, Any] | None:
    for media, content in holder.get("content", {}).items():
        if media.endswith("json"):
            return _bare(content["schema"])
    return None


def _resolve(full: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in value:
        found: Any = full
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


def _bare(value: Any, names: bool = False) -> Any:
    """Without prose. names: the keys of this object are names of properties, not keywords."""
    if isinstance(value, dict):
        return {k: _bare(v, k == "properties" and not names) for k, v in value.items() if names or k not in PROSE}
    return [_bare(item) for item in value] if isinstance(value, list) else value


def _reached(operations: Any, schemas: dict[str, Any]) -> list[str]:
    found, waiting = set(), [operations]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix(SCHEMAS)
            if name in schemas and name not in found:
                found.add(name)
                waiting.append(_bare(schemas[name]))
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return sorted(found)


def write(full: dict[str, Any]) -> str:
    return json.dumps(extract(full), indent=1) + "\n"


if __name__ == "__main__":
    TARGET.write_text(write(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
