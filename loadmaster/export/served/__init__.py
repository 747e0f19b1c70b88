"""What a real server says of an export: `loadmaster serve-check` (check.py) and tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadmaster.files import read_json


def recorded(run_dir: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], str] | None:
    """(figures that serve-check has written of this very export, its server); None: it was not checked."""
    path = run_dir / "serve-check.json"
    found = read_json(path) if path.is_file() else {"formats": {}}
    name = manifest["format"]
    figures = found["formats"].get(name)
    if figures is None or not figures.get("checked", True) or found["created_utc"] < manifest["created_utc"]:
        return None
    server = found.get("server", "")
    return figures, server.rpartition(", ")[2] if name == "gguf" else server.partition(", ")[0]
