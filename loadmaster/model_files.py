"""Which files of a folder a model is loaded from, as transformers chooses them.

`model.safetensors`, or where there is none the shards that `model.safetensors.index.json` names. Others may lie beside
them: all of it once more, as Mistral's `consolidated.safetensors`, or what an earlier save left there.
"""

from __future__ import annotations

from pathlib import Path

from loadmaster.files import as_object, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_sharded(folder: Path) -> bool:
    return (folder / INDEX).exists() and not (folder / SINGLE).is_file()


def weight_map(folder: Path) -> dict[str, str]:
    """Name of each tensor -> its shard, as the index says."""
    listed = as_object(as_object(read_json(folder / INDEX)).get("weight_map"))
    return {name: str(file) for name, file in listed.items()}


def shards(folder: Path) -> list[Path]:
    """The files, in order, there or not; of a folder with neither, all safetensors."""
    if is_sharded(folder):
        return sorted({folder / file for file in weight_map(folder).values()})
    return [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
