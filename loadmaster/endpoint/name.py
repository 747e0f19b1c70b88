"""What an endpoint is called, and whose export it serves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from loadmaster.errors import UsageError
from loadmaster.files import read_json
from loadmaster.launch.provider import PREFIX
from loadmaster.launch.runpod.client import asked_for
from loadmaster.launch.runpod.types import CreateEndpoint, Endpoint

SERVES = "LOADMASTER_SERVES"
"""Variable of the endpoint that says which job's export it serves; no server reads it."""
NAMED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def endpoint_called(name: str) -> str:
    """With the beginning by which `ours` finds it. Raises UsageError for what is no name."""
    name = asked_for(name).removeprefix(PREFIX)
    if not NAMED.fullmatch(name):
        raise UsageError(f"--name {name!r} is no name of an endpoint: letters, digits, dots, dashes, at most 64")
    return f"{PREFIX}{name}"


def deployed_name(run_dir: Path) -> str | None:
    """Of the endpoint that was last deployed from this run; None: none, or it is not known."""
    try:
        name = read_json(run_dir / "deployment.json").get("name")
    except (OSError, ValueError, AttributeError):
        return None
    return asked_for(name) if isinstance(name, str) else None


def origin(manifest: dict[str, Any]) -> str:
    """Of which job, base model and data the export is, JSON."""
    base, data = manifest.get("base_model") or {}, manifest.get("data") or {}
    facts = {"job_hash": manifest.get("job_hash"), "base_model": base.get("name"), "data": data.get("sha256")}
    return json.dumps(facts, sort_keys=True)


def replaced(before: Endpoint, request: CreateEndpoint) -> str | None:
    """What another job deployed under this name, in a sentence; None: it was this one."""
    try:
        there = json.loads(before.env[SERVES])
        words = f"job {str(there['job_hash'])[:12]} (base {there['base_model']}, data {str(there['data'])[:12]})"
    except (KeyError, TypeError, ValueError):
        return "it does not say which job deployed it; this replaces what is there, --name NAME makes another beside it"
    if before.env[SERVES] == (request.env or {}).get(SERVES):
        return None
    return f"this replaces what {words} deployed; --name NAME makes another endpoint beside it"
