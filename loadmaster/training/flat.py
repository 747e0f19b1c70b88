"""Parts that are ranges of a parameter's elements, as DeepSpeed cuts them, and their place in a checkpoint.

A rank holds elements `start` to `end` of a parameter laid out as one row of numbers, which may begin and end inside a
row of its first dimension. A checkpoint knows rectangles only: rows of the first dimension. So a row that is cut is
written by the rank that holds its first element, which gets the rest of it from those that follow; nothing else moves.
Read back, each rank reads all rows that it holds something of, and takes its range out of them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from loadmaster.training.placement import Placed


@dataclass(frozen=True)
class Cut:
    """How a parameter of `shape` is cut over all ranks: rank r holds elements bounds[r] to bounds[r + 1].

    For a parameter that lies between others in one long row, bounds are cut off at 0 and at its size.
    """

    shape: torch.Size
    bounds: tuple[int, ...]

    @property
    def row(self) -> int:
        """Elements of a row of the first dimension."""
        return math.prod(self.shape[1:])

    def owner(self, row: int) -> int:
        """The rank that holds the first element of a row."""
        first = row * self.row
        return next(r for r in range(len(self.bounds) - 1) if self.bounds[r] <= first < self.bounds[r + 1])


class Rows(Tensor):
    """Some rows of a tensor of `whole` size, as torch.distributed.checkpoint asks for them; it takes tensors only."""

    whole: torch.Size
    offsets: torch.Size
    part: Tensor

    @staticmethod
    def of(whole: torch.Size, first: int, part: Tensor) -> Rows:
        """part: the rows from `first` on, on the host."""
        rows = Tensor._make_subclass(Rows, part)
        rows.whole, rows.offsets, rows.part = whole, torch.Size([first, *[0] * (len(whole) - 1)]), part
        return rows

    def size(self) -> torch.Size:
        return self.whole

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(self.offsets, self.part.size())

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        data = TensorWriteData(self._chunk(), properties, self.whole)
        return [WriteItem(MetadataIndex(fqn, self.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.part


@dataclass(frozen=True)
class _Copy:
    cut: Cut
    elements: Tensor


class FlatPlaced(Placed):
    """Parts by element ranges. `cuts` and `weight` are by parameter: all ranks' bounds, this rank's elements."""

    def __init__(self, rank: int, size: int, sharded: bool, gather: Callable[[nn.Parameter], Tensor]):
        """gather: a parameter whole on every rank's host; sharded: whether models hold less than the whole."""
        super().__init__()
        self._rank, self._ranks, self._sharded, self._gather = rank, size, sharded, gather
        self._cuts: dict[nn.Parameter, Cut] = {}
        self._weights: dict[nn.Parameter, Callable[[], Tensor]] = {}

    def enter(self, parameter: nn.Parameter, cut: Cut, weight: Callable[[], Tensor]) -> None:
        self._cuts[parameter], self._weights[parameter] = cut, weight

    @property
    def sharded(self) -> bool:
        return self._sharded

    @property
    def shard_name(self) -> str:
        return f"{self._rank}-of-{self._ranks}"

    def span(self, parameter: nn.Parameter) -> tuple[int, int]:
        """This rank's elements: the first, and the one after the last."""
        bounds = self._cuts[parameter].bounds
        return bounds[self._rank], bounds[self._rank + 1]

    def part(self, parameter: nn.Parameter) -> Tensor:
        return self._weights[parameter]()

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return self._gather(parameter)

    def holds(self, parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> bool:
        start, end = self.span(parameter)
        if start == end:
            return True
        row = self._cuts[parameter].row
        first, last = start // row, -(-end // row)
        found = read(first, last).reshape(-1)[start - first * row : end - first * row]
        return torch.equal(found, self.part(parameter).cpu())

    def place(self, parameter: nn.Parameter, part: Tensor) -> _Copy:
        return _Copy(self._cuts[parameter], part.cpu())

    def complete(self, copies: dict[str, Any]) -> dict[str, Any]:
        given: list[dict[str, tuple[int, Tensor]]] = [{} for _ in range(self._ranks)]
        kept = {}
        for key, copy in copies.items():
            start, end = copy.cut.bounds[self._rank], copy.cut.bounds[self._rank + 1]
            row = copy.cut.row
            first = -(-start // row)
            head = min(end, first * row) - start
            if head:  # of a row that begins on an earlier rank
                given[copy.cut.owner(start // row)][key] = (start, copy.elements[:head].clone())
            if first * row < end:
                kept[key] = replace(copy, elements=copy.elements[head:])
        ends: dict[str, list[tuple[int, Tensor]]] = {}
        for part in exchange(given):
            for key, piece in part.items():
                ends.setdefault(key, []).append(piece)
        return {key: self._rows(copy, ends.get(key, [])) for key, copy in kept.items()}

    def _rows(self, copy: _Copy, ends: list[tuple[int, Tensor]]) -> Rows:
        pieces = [copy.elements, *(tensor for _, tensor in sorted(ends, key=lambda piece: piece[0]))]
        elements = torch.cat(pieces) if len(pieces) > 1 else copy.elements
        first = -(-copy.cut.bounds[self._rank] // copy.cut.row)
        return Rows.of(copy.cut.shape, first, elements.view(-1, *copy.cut.shape[1:]).contiguous())

    def empty(self, parameter: nn.Parameter, dtype: torch.dtype) -> Rows:
        cut = self._cuts[parameter]
        start, end = self.span(parameter)
        first, last = start // cut.row, -(-end // cut.row)
        return Rows.of(cut.shape, first, torch.empty(last - first, *cut.shape[1:], dtype=dtype))

    def filled(self, parameter: nn.Parameter, loaded: Rows) -> Tensor:
        start, end = self.span(parameter)
        row = self._cuts[parameter].row
        first = start // row
        return loaded.part.reshape(-1)[start - first * row : end - first * row]


def exchange(given: list[Any]) -> list[Any]:
    """What every rank has for this one, in order of rank, where given[r] is what this one has for rank r.

    Any picklable objects; all ranks call it. Nobody gets what is for others.
    """
    if len(given) == 1:
        return given
    sent = [torch.frombuffer(bytearray(pickle.dumps(each)), dtype=torch.uint8) for each in given]
    sizes = torch.tensor([each.numel() for each in sent])
    incoming = torch.empty_like(sizes)
    dist.all_to_all_single(incoming, sizes)
    received = torch.empty(int(incoming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(sent), incoming.tolist(), sizes.tolist())
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(incoming.tolist())]
