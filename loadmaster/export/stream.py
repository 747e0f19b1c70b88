"""Write model folders tensor by tensor, from disk to disk: memory of about one tensor, whatever the model's size.

safetensors' own writer wants all tensors of a file at once, and a shard may be the whole model. The format lets
one do better: 8 bytes with the length of a JSON header, the header with dtype, shape and place of each tensor,
then the data without holes. What a tensor becomes is known from its shape before it is computed, so the header is
written first, the space is taken from the disk (a full disk says so before an hour of work), and each tensor goes to
its place as it is made. The files are byte for byte those that safetensors writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loadmaster.export.weights import DTYPES, Shapes, read_tensor, shards, tensor_shapes
from loadmaster.files import write_json
from loadmaster.model_files import INDEX, SINGLE

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {dtype: position for position, dtype in enumerate(NAMES)}
CHUNK = 2**22
"""Elements worked on at once: their temporaries stay in the processor's cache."""


class Change(Protocol):
    """What becomes of each tensor of a model."""

    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Shapes:
        """Names, dtypes and shapes of the tensors that take its place; empty: it is left out."""

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, made."""


class Unchanged:
    def layout(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Shapes:
        return {name: (dtype, shape)}

    def tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, tensor


class ShardWriter:
    """One safetensors file, its tensors written in any order. Raises OSError where the disk has no room for it."""

    def __init__(self, path: Path, shapes: Shapes):
        self.path = path
        names = sorted(shapes, key=lambda name: (ORDER[shapes[name][0]], name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        self.places: dict[str, int] = {}
        for name in names:
            dtype, shape = shapes[name]
            start, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            self.places[name] = start
        self.shapes, self.size = dict(shapes), end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.start = 8 + len(text)
        self.file = open(path, "wb")  # noqa: SIM115 (closed by close)
        if hasattr(os, "posix_fallocate"):  # Linux
            os.posix_fallocate(self.file.fileno(), 0, self.start + end)
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.left = set(names)

    def write(self, name: str, tensor: Tensor) -> None:
        dtype, shape = self.shapes[name]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, its header says {dtype} {shape}")
        self.left.remove(name)
        self.file.seek(self.start + self.places[name])
        self.file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))

    def close(self) -> None:
        self.file.close()
        if self.left:
            raise ValueError(f"{self.path.name}: {len(self.left)} tensors were not written")


def rewrite(source: Path, change: Change, targets: Mapping[Path, Change]) -> None:
    """Write the shards of `source` to every target folder: each tensor through `change`, then through the target's.

    All targets are made in one pass, so a tensor is read and merged once. An index is written but for
    one shard called model.safetensors; its `total_size` is in bytes.
    """
    files = shards(source)
    weight_map: dict[Path, dict[str, str]] = {target: {} for target in targets}
    total_size = dict.fromkeys(targets, 0)
    for shard in files:
        shapes = tensor_shapes(shard)
        changed = {new: spec for name, spec in shapes.items() for new, spec in change.layout(name, *spec).items()}
        with ExitStack() as stack:
            writers = []
            for target, then in targets.items():
                layout = {new: spec for name, spec in changed.items() for new, spec in then.layout(name, *spec).items()}
                writer = ShardWriter(target / shard.name, layout)
                stack.callback(writer.file.close)
                writers.append((writer, then))
                weight_map[target] |= dict.fromkeys(layout, shard.name)
                total_size[target] += writer.size
            for name in shapes:
                for new, tensor in change.tensors(name, read_tensor(shard, name)):
                    for writer, then in writers:
                        for last, made in then.tensors(new, tensor):
                            writer.write(last, made)
            for writer, _ in writers:
                writer.close()
    if [file.name for file in files] != [SINGLE]:
        for target in targets:
            index = {"metadata": {"total_size": total_size[target]}, "weight_map": weight_map[target]}
            write_json(target / INDEX, index)


def row_chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices over the rows of a matrix, about CHUNK elements each."""
    rows = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield slice(start, start + rows)
