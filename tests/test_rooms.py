"""The house's floor plan: a room imports only from rooms above it, and planning needs no torch."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loadmaster"
ROOMS = [
    "catalog",
    "config",
    "preflight",
    "data",
    "models",
    "training",
    "evaluation",
    "export",
    "launch",
    "endpoint",
    "report",
]
HEAVY = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "loadmaster" and len(parts) > 1 and parts[1] in ROOMS:
                assert parts[1] in allowed, f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("room", ["catalog", "config", "preflight"])
def test_planning_needs_no_torch(room):
    for path in (PACKAGE / room).rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


def test_a_tokenizer_is_read_without_what_a_model_needs():
    """Seconds of every `loadmaster data`, and of every launch that counts the rows' tokens."""
    assert not {name for name in imports(PACKAGE / "models/tokenizer.py") if name.startswith(("torch", "peft"))}
    inside = {name for name in imports(PACKAGE / "models/tokenizer.py") if name.startswith("loadmaster.")}
    assert inside == {"loadmaster.errors", "loadmaster.models.libraries"}
    of_data = ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8"))
    (function,) = (node for node in ast.walk(of_data) if isinstance(node, ast.FunctionDef) and node.name == "_data")
    assert "loadmaster.models.load" not in {n.module for n in ast.walk(function) if isinstance(n, ast.ImportFrom)}
