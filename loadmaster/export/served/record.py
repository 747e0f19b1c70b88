"""run_dir/serve-check.json: what a real server has made of each export, until it is checked again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.export.manifest import exported, read_manifest
from loadmaster.files import read_json

NAME = "serve-check.json"


def checked_figures(run_dir: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Figures of this very export, its "server" and "created_utc" with them; None: no server could be asked about it.

    Raises LoadmasterError where the file is damaged.
    """
    path, name, exported_utc = run_dir / NAME, manifest["format"], manifest["created_utc"]
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        figures = record["formats"].get(name)
        if figures is None or not figures.get("checked", True):
            return None
        servers = record.get("server", "").split(", ")  # vLLM first; figures that were kept name their own
        figures = {
            "server": servers[-1 if name == "gguf" else 0], "created_utc": record["created_utc"], **figures,
            "passed": figures["passed"], "failures": figures["failures"],
        }
        return None if figures["created_utc"] < exported_utc else figures
    except (ValueError, LookupError, TypeError, AttributeError):
        raise LoadmasterError(f"{path} is damaged: remove it and start `loadmaster serve-check {run_dir}`") from None


def earlier(run_dir: Path) -> dict[str, dict[str, Any]]:
    """format -> figures of a check of it before, of all exports that are still the same."""
    found = {}
    for name in exported(run_dir):
        with suppress(ExportRejected, KeyError):  # no manifest that is understood, so nothing is known of it
            if figures := checked_figures(run_dir, read_manifest(run_dir / "export" / name)):
                found[name] = figures
    return found
