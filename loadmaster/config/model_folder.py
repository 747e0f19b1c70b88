"""What is wrong with a model's folder, as far as that shows without loading it: a second now for an hour later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loadmaster.files import read_json, torn_safetensors
from loadmaster.model_files import INDEX, is_sharded

OBJECTS = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json", "adapter_config.json")
"""Files that hold one JSON object."""
TOKENIZERS = ("tokenizer*", "tokenization*", "vocab*", "*.model", "tekken.json")
"""What a tokenizer of any kind has a file of."""


def lacking(folder: Path) -> list[str]:
    """What training needs besides config.json and this folder has no file of; a plan does without."""
    needed = {"weights (*.safetensors)": ("*.safetensors",), "tokenizer": TOKENIZERS}
    return [what for what, names in needed.items() if not any(next(folder.glob(name), None) for name in names)]


def run_of(folder: Path) -> Path | None:
    """The run directory that this folder is, or whose adapter or export it is; None for any other folder."""
    runs = [folder, *([folder.parent] if (folder / "adapter_config.json").is_file() else [])]
    if folder.parent.name == "export" and folder.name in ("adapter", "gguf"):  # the formats without a config.json
        runs.append(folder.parent.parent)
    return next((run for run in runs if (run / "stages.json").is_file() and (run / "plan.json").is_file()), None)


def broken_files(folder: Path) -> Iterator[str]:
    """What is torn or not what its name says, a phrase for each file; files that are absent are not looked at."""
    for name in (*OBJECTS, INDEX):
        if (folder / name).exists():
            content, problem = _object(folder / name)
            if problem:
                yield f"{name} {problem}"
            elif name == INDEX and is_sharded(folder):
                yield from _missing_shards(folder, content)
    for file in sorted(folder.glob("*.safetensors")):
        try:
            problem = torn_safetensors(file)
        except OSError as error:
            problem = _unreadable(error)
        if problem:
            yield f"{file.name} {problem}"


def _object(file: Path) -> tuple[dict[str, Any], str | None]:
    try:
        content = read_json(file)
    except OSError as error:
        return {}, _unreadable(error)
    except (ValueError, RecursionError) as error:
        return {}, f"is no JSON ({error})"
    return (content, None) if isinstance(content, dict) else ({}, "holds no JSON object")


def _missing_shards(folder: Path, index: dict[str, Any]) -> Iterator[str]:
    """Shards that the index names and the folder lacks; a folder without any weights is one for planning only."""
    weights = index.get("weight_map")
    if not isinstance(weights, dict):
        yield f"{INDEX} has no weight_map"
        return
    if not any(folder.glob("*.safetensors")):
        return
    names = {str(name) for name in weights.values()}
    if outside := sorted(name for name in names if Path(name).is_absolute() or ".." in Path(name).parts):
        yield f"{INDEX} names files of other folders ({', '.join(outside[:3])})"
        return
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        yield f"{len(missing)} of the shards that {INDEX} names are not there ({', '.join(missing[:3])})"


def _unreadable(error: OSError) -> str:
    return f"cannot be read ({(error.strerror or str(error)).lower()})"
