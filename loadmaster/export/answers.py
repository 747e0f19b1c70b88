"""Recorded answers of an export, kept beside it: run_dir/smoke/<format>.json. No torch here.

Beside it and not in it: an artifact is passed on, pushed to a Hub, baked into an image, and held-out prompts are
somebody's data. The hash of the manifest's file list says which export they are of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadmaster.files import read_json, sha256_json, write_json


def keep(run_dir: Path, manifest: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """Write the answers of the export that this manifest describes."""
    told = {"schema": 1, "files": sha256_json(manifest["files"]), "prompts": answers}
    write_json(run_dir / "smoke" / f"{manifest['format']}.json", told)


def kept(run_dir: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of this very export; empty where none are kept, or those of other files."""
    path = run_dir / "smoke" / f"{manifest['format']}.json"
    if not path.is_file():
        return []
    told = read_json(path)
    return told["prompts"] if told["files"] == sha256_json(manifest["files"]) else []
