"""A rank's part of a checkpoint as several safetensors files: to write it takes no second copy of it in memory."""

from __future__ import annotations

import queue
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

FILE_BYTES = 2 * 2**30
"""Tensors in a file: safetensors puts a file together in memory before it writes it."""


class ShardWriter(dcp.HuggingFaceStorageWriter):
    """torch.distributed.checkpoint's writer, with as many files a rank as FILE_BYTES asks for."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future:
        files: list[list] = [[]]
        size = 0
        for item in plan.items:
            data = item.tensor_data
            taken = data.chunk.sizes.numel() * data.properties.dtype.itemsize
            if files[-1] and size + taken > FILE_BYTES:
                files.append([])
                size = 0
            files[-1].append(item)
            size += taken
        waiting: queue.Queue = queue.Queue()
        for number, items in enumerate(files if plan.items else [], 1):
            name = f"shard-{plan.storage_data['shard_index']:05d}-model-{number:05d}-of-{len(files):05d}.safetensors"
            waiting.put((self.fs.concat_path(self.path, name), name, items))
        return self._write_data(planner, waiting)
