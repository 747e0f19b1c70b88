"""The measured numbers of the memory and speed models, from coefficients.yaml; read once a process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def coefficients() -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = Path(__file__).with_name("coefficients.yaml")
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def value(group: str, name: str) -> float:
    return coefficients()[group][name]["value"]
