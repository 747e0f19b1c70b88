"""Optimizer states whose form depends on how parameters are cut, read from a checkpoint that was cut otherwise.

    adamw_8bit, paged_adamw_8bit   codes of 8 bits in blocks of 256 elements of a rank's part, scaled each; in
                                   fp32 where the part has fewer than 4,096 elements (bitsandbytes)
    adafactor                      of each matrix the mean square of its rows and of its columns, over a rank's part

Each rank saves them as they are, so the same number of ranks goes on bit for bit. Another number puts its parts
together from the pieces that lie in them. Blocks that stay whole (parts of whole blocks, as in every model whose rows
are a multiple of 256) are taken as they are; others become numbers and are rounded once more. Rows' means are cut and
joined, columns' means averaged by the rows that they are of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loadmaster.errors import TrainingFailed

PREFIX = "opaque/"
BLOCK = 256


@dataclass(frozen=True)
class Piece:
    """Rows `first` to `last` of a parameter: the states that one rank had of them."""

    first: int
    last: int
    states: dict[str, Tensor]


class OldLayout:
    """The states in a checkpoint's folder, by the shards that wrote them: keys are opaque/2-of-4/NAME/STATE."""

    def __init__(self, folder: Path):
        self._where: dict[str, dict[int, dict[str, Path]]] = {}
        counts = set()
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (no dict)
                    if key.startswith(PREFIX):
                        shard, name, state = _parts(key)
                        counts.add(shard.partition("-of-")[2])
                        shards = self._where.setdefault(name, {})
                        shards.setdefault(int(shard.partition("-of-")[0]), {})[state] = path
        if len(counts) > 1:
            raise TrainingFailed(f"{folder} holds optimizer states of two layouts ({', '.join(sorted(counts))} shards)")
        self.shards = int(counts.pop()) if counts else 0
        """How many parts each parameter was in; 0: no such states."""

    def states(self, name: str, shape: torch.Size, first: int, last: int) -> dict[str, Tensor]:
        """States of rows `first` to `last` of a parameter of this shape; of codes see `joined`."""
        each = -(-shape[0] // self.shards)
        pieces = []
        for index, files in sorted(self._where.get(name, {}).items()):
            start, end = index * each, min((index + 1) * each, shape[0])
            if start < last and end > first:
                pieces.append(Piece(start, end, {state: self._read(index, name, state) for state in files}))
        return joined(pieces, shape, first, last)

    def _read(self, index: int, name: str, state: str) -> Tensor:
        with safe_open(self._where[name][index][state], framework="pt") as file:
            return file.get_tensor(f"{PREFIX}{index}-of-{self.shards}/{name}/{state}")


def joined(pieces: list[Piece], shape: torch.Size, first: int, last: int) -> dict[str, Tensor]:
    """What the pieces, in order, say of rows `first` to `last`; pure. Raises TrainingFailed for what does not fit.

    Codes become fp32 numbers, under the state's name; where whole blocks are taken, codes1 and absmax1 are those.
    """
    found: dict[str, Any] = {}
    for state in [name for name in (pieces[0].states if pieces else {}) if name[:4] != "qmap" and name[:6] != "absmax"]:
        parts = [(piece, max(first, piece.first), min(last, piece.last)) for piece in pieces]
        if state == "exp_avg_sq_col":
            weights = [end - start for _, start, end in parts]
            columns = sum(piece.states[state].float() * w for (piece, *_), w in zip(parts, weights, strict=True))
            found[state] = (columns / sum(weights)).to(pieces[0].states[state].dtype)
            continue
        if all(piece.states[state].dtype == torch.uint8 for piece in pieces):
            found |= _blocks(parts, state, shape)
        rows = [_rows(piece, state, shape)[start - piece.first : end - piece.first] for piece, start, end in parts]
        found[state] = torch.cat(rows).contiguous()
    return found


def _blocks(parts: list[tuple[Piece, int, int]], state: str, shape: torch.Size) -> dict[str, Tensor]:
    """Codes and scales as they are, where each piece gives whole blocks; else nothing."""
    row, number = shape[1:].numel(), state.removeprefix("state")
    spans = [(piece, (start - piece.first) * row, (end - piece.first) * row) for piece, start, end in parts]
    if any(begin % BLOCK or stop % BLOCK for _, begin, stop in spans):
        return {}
    codes = [piece.states[state].reshape(-1)[begin:stop] for piece, begin, stop in spans]
    scales = [piece.states[f"absmax{number}"][begin // BLOCK : stop // BLOCK] for piece, begin, stop in spans]
    return {f"codes{number}": torch.cat(codes), f"absmax{number}": torch.cat(scales)}


def _rows(piece: Piece, state: str, shape: torch.Size) -> Tensor:
    """A state as [rows, ...]."""
    value, count = piece.states[state], piece.last - piece.first
    if value.dtype == torch.uint8:
        number = state.removeprefix("state")
        flat = piece.states[f"qmap{number}"][value.reshape(-1).int()]
        scales = piece.states[f"absmax{number}"].repeat_interleave(BLOCK)[: flat.numel()]
        value = (flat * scales).view(value.shape)
    if value.numel() % count or value.shape[0] != count:
        raise TrainingFailed(
            f"the optimizer's state {state} in the checkpoint is of another layout than {count} rows of "
            f"{list(shape)}: go on with as many processes as wrote it, or give another run_dir"
        )
    return value


def _parts(key: str) -> tuple[str, str, str]:
    """opaque/2-of-4/model.layers.0.weight/state1 -> its shard, the parameter, the state."""
    shard, rest = key.removeprefix(PREFIX).split("/", 1)
    name, state = rest.rsplit("/", 1)
    return shard, name, state
