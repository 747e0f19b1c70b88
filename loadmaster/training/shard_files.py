"""A rank's part of a checkpoint as several safetensors files: to write it takes no second copy of it in memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from loadmaster.preflight.trained import in_groups

FILE_BYTES = 2 * 2**30
"""Tensors in a file: what was not copied to the host before comes there file by file."""


class ShardWriter(dcp.HuggingFaceStorageWriter):
    """torch.distributed.checkpoint's writer, with as many files a rank as FILE_BYTES asks for.

    Its own puts each file together in memory, twice, before it writes it.
    """

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        files = in_groups(plan.items, _bytes, FILE_BYTES)
        written: Future = Future()
        results = []
        for number, items in enumerate(files if plan.items else [], 1):
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-{number:05d}-of-{len(files):05d}.safetensors"
            results += self._write_file(name, items, planner)
        written.set_result(results)
        return written

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        path = Path(self.fs.concat_path(self.path, name))
        tensors = {item.index.fqn: planner.resolve_data(item).detach().cpu().contiguous() for item in items}
        offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets} for item in items}
        about = {CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION)}
        save_file(tensors, path, metadata={**about, FORMAT_KEY: FORMAT_VALUE})
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes = {item.index: tensors[item.index.fqn].nbytes for item in items}
        return [WriteResult(index, size, _StorageInfo(name, 0, size)) for index, size in sizes.items()]


def _bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize
