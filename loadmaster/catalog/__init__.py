"""Dated facts about GPUs, machines, prices and public models. No code here computes; preflight does.

gpus.yaml, machines.yaml, prices.yaml, serving.yaml and shapes/*.json are read once a process.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


@cache
def _read(name: str) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((FOLDER / name).read_text(encoding="utf-8"), Loader=loader)


def gpus() -> dict[str, dict[str, Any]]:
    """Facts of each GPU by its name here (`h100_80gb`); units are in the keys."""
    return _read("gpus.yaml")["gpus"]


def machines() -> list[dict[str, Any]]:
    """Machines that can be rented: GPU, count, host memory, disk, links between nodes."""
    return _read("machines.yaml")["machines"]


def prices() -> dict[str, Any]:
    """Prices in US dollars with the date and source of each."""
    return _read("prices.yaml")


def serving() -> dict[str, Any]:
    """GPU pools of endpoints, and how long a worker takes to start."""
    return _read("serving.yaml")


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """config.json values of public models by Hub id (lower case)."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((FOLDER / "shapes").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        for name in entry["names"]:
            found[name.lower()] = {**entry["config"], "_parameters": entry["parameters"], "_name": name}
    return found
