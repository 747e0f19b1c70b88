"""Safetensors folders, read tensor by tensor, so that a model never has to fit in memory (stream.py writes them).

A model folder holds `model.safetensors`, or several shards and `model.safetensors.index.json` whose
`weight_map` says which tensor lies in which shard (the format of huggingface_hub and transformers).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from loadmaster import model_files
from loadmaster.errors import ExportRejected
from loadmaster.files import read_json
from loadmaster.model_files import SINGLE, is_sharded

HEAD = "lm_head.weight"
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
"""safetensors' names, in the order in which it lays them into a file: wide ones first, so that all are aligned."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
WHOLE = (HEAD, "embed_out.weight", *EMBEDDINGS)
"""Ends of the names of what is never held in few bits: embeddings and heads."""


def shards(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from, in order.

    Raises ExportRejected where there are none, or where the index names a file that is not there.
    """
    files = (is_sharded(folder) and model_files.shards(folder)) or [folder / SINGLE]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ExportRejected(
            f"{folder} is not a complete model: {', '.join(missing)} is not there. "
            "Download or save it again as safetensors."
        )
    return files


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an adapter or a model."""
    return [folder / "adapter_model.safetensors"] if is_adapter(folder) else shards(folder)


def weight_bytes(folder: Path) -> int:
    """Of a model's shards."""
    return sum(shard.stat().st_size for shard in shards(folder))


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of every tensor -> the shard that holds it, read from the shards themselves."""
    return {name: shard for shard in shards(folder) for name in tensor_names(shard)}


def tensor_names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as file:
        return list(file.keys())


Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name of a tensor -> its dtype and shape."""


def tensor_shapes(shard: Path) -> Shapes:
    """What a shard holds, from its header alone."""
    with safe_open(shard, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (DTYPES[part.get_dtype()], tuple(part.get_shape())) for name, part in slices.items()}


def read_tensor(shard: Path, name: str) -> torch.Tensor:
    """One tensor; its pages are unmapped with it, which those of a file that stays open are not."""
    with safe_open(shard, framework="pt") as file:
        return file.get_tensor(name)


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
