"""Safetensors folders, read and written shard by shard, so that a model never has to fit in memory.

A model folder holds `model.safetensors`, or several shards and `model.safetensors.index.json` whose
`weight_map` says which tensor lies in which shard (the format of huggingface_hub and transformers).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loadmaster.errors import ExportRejected
from loadmaster.files import read_json, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises ExportRejected where there are none, or where the index names a file that is not there.
    """
    sharded = (folder / INDEX).exists()
    names = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if sharded else [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ExportRejected(
            f"{folder} is not a complete model: {', '.join(missing)} is not there. "
            "Download or save it again as safetensors."
        )
    return [folder / name for name in names]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor -> the shard that holds it, read from the shards themselves."""
    return {name: shard for shard in shards(folder) for name in tensor_names(shard)}


def tensor_names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


def read_tensor(shard: Path, name: str) -> torch.Tensor:
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor(name)


def readable_by_all(path: Path) -> None:
    """Give a file the mode that the umask would: safetensors writes 0600, which a server's user cannot read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def rewrite(source: Path, target: Path, change: Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]):
    """Write the shards of `source` to `target`, each tensor replaced by what `change(name, tensor)` yields.

    Peak memory: the tensors of one output shard, besides the pages of the input that the system maps.
    Writes an index where there is more than one shard; `total_size` is in bytes.
    """
    weight_map: dict[str, str] = {}
    total_size = 0
    files = shards(source)
    for shard in files:
        output: dict[str, torch.Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not iterable)
                for new_name, tensor in change(name, file.get_tensor(name)):
                    output[new_name] = tensor.contiguous()
                    weight_map[new_name] = shard.name
                    total_size += tensor.numel() * tensor.element_size()
        save_file(output, target / shard.name, metadata={"format": "pt"})
        readable_by_all(target / shard.name)
    if len(files) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def ties_embeddings(folder: Path) -> bool:
    """Whether embedding and head are one tensor: config.json says so, and the files hold no other head.

    transformers keeps a head apart whose stored values differ from the embedding's, whatever the config says.
    """
    files = tensor_files(folder)
    if not read_json(folder / "config.json").get("tie_word_embeddings", HEAD not in files):
        return False
    embedding = embedding_name(files)
    if HEAD not in files or embedding is None:
        return True
    return torch.equal(read_tensor(files[HEAD], HEAD), read_tensor(files[embedding], embedding))


def embedding_name(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.endswith(EMBEDDINGS)), None)
