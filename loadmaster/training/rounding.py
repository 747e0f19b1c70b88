"""fp32 values into bf16 weights, rounded up or down at random, so that the mean is right.

bf16 has steps of 0.4% to 0.8%, and most updates are less than half of one. A weight that is rounded to the nearest
stays what it was for so long, with fp32 masters as well: they move, and the model does not. What is drawn depends on
which parameter it is, on the part of it and on how often it was stepped, and on no generator that differs from rank to
rank: replicas of a weight (ddp, hybrid sharding) are rounded alike, or they would drift apart for good.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from loadmaster.preflight.stepping import PIECE
from loadmaster.training.relayout import BLOCK

Seed = tuple[Tensor, Tensor]


def seed(*numbers: int) -> Seed:
    """Two int32 numbers for some that are not negative; on the host, as a compiled kernel takes them as arguments."""
    one, other = np.random.SeedSequence(numbers).generate_state(2).view(np.int32).tolist()
    return torch.tensor(one, dtype=torch.int32), torch.tensor(other, dtype=torch.int32)


def noise(like: Tensor, drawn_by: Seed) -> Tensor:
    """Numbers from 0 to 65,535 in a tensor's shape, int32, always the same for a seed.

    A hash of each element's place, which compiles into the kernel that adds it and uses all of a host's cores
    (lowbias32, https://nullprogram.com/blog/2018/07/31/); as separate kernels of a GPU its generator is faster.
    """
    one, other = drawn_by
    if like.device.type in ("cuda", "meta") and not torch.compiler.is_compiling():
        number = one.item() << 32 | other.item() & 0xFFFFFFFF
        generator = torch.Generator(like.device).manual_seed(number) if like.is_cuda else None
        return torch.randint(65536, like.shape, dtype=torch.int32, device=like.device, generator=generator)
    found = torch.arange(like.numel(), dtype=torch.int32, device=like.device).bitwise_xor_(one)
    found.bitwise_xor_(found.bitwise_right_shift(16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    found.bitwise_xor_(found.bitwise_right_shift(15).bitwise_and_(0x1FFFF)).add_(other).mul_(0x846CA68B - 2**32)
    return found.bitwise_right_shift_(16).bitwise_and_(0xFFFF).view(like.shape)


def rounded(wide: Tensor, drawn_by: Seed) -> Tensor:
    """fp32 values that bf16 can hold, one of the two beside each."""
    return noise(wide, drawn_by).add_(wide.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)


def _write(weight: Tensor, wide: Tensor, one: Tensor, other: Tensor) -> None:
    weight.copy_(rounded(wide, (one, other)))


class Rounding:
    """Of this rank's part of all parameters; compiled: by one kernel."""

    def __init__(self, shard: int, compiled: bool):
        self.shard = shard
        self.kernel = torch.compile(_write, fullgraph=True, dynamic=True) if compiled else _write

    @torch.no_grad()
    def write(self, weight: Tensor, wide: Tensor, number: int, taken: int) -> None:
        """The parameter of this number, which was stepped so often, becomes `wide`, which may be on the host."""
        if weight.dtype == torch.float32:  # some are, beside others in bf16
            weight.copy_(wide)
            return
        pieces = zip(weight.view(-1).split(PIECE), wide.view(-1).split(PIECE), strict=True)
        for index, (piece, values) in enumerate(pieces):
            self._write(piece, values, number, taken, index)

    def _write(self, piece: Tensor, values: Tensor, number: int, taken: int, index: int) -> None:
        self.kernel(piece, values.to(piece.device), *seed(number, self.shard, taken, index))

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of bitsandbytes' optimizers or transformers' Adafactor without masters, in fp32.

        Groups have `numbers`: of each of their parameters, among all there are.
        """
        move = self._in_pieces if hasattr(optimizer, "update_step") else self._whole
        for place, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    move(optimizer, place, index)

    def _in_pieces(self, optimizer: Any, place: int, index: int) -> None:
        """bitsandbytes', whose blocks lie in a row. Its own `step` waits for the GPU, which only paged states need."""
        group = optimizer.param_groups[place]
        parameter, number = group["params"][index], group["numbers"][index]
        state = optimizer.state[parameter]
        if not state:
            optimizer.init_state(group, parameter, place, index)
        if optimizer.is_paged:
            optimizer.prefetch_state(parameter)
        taken = state["step"]
        weight, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
        for start in range(0, weight.numel(), PIECE):
            here = slice(start, start + PIECE)
            wide = weight[here].float()
            wide.grad = gradient[here].float()
            optimizer.state[wide] = {key: _piece(key, value, start) for key, value in state.items()}
            optimizer.update_step(group, wide, place, index)
            stepped = optimizer.state.pop(wide)["step"]
            wide.grad = None
            if weight.dtype != wide.dtype:  # else it was stepped itself
                self._write(weight[here], wide, number, taken, start // PIECE)
        state["step"] = stepped
        if optimizer.is_paged and parameter.is_cuda:
            torch.cuda.synchronize()

    def _whole(self, optimizer: torch.optim.Optimizer, place: int, index: int) -> None:
        """Adafactor, which takes means over a matrix."""
        groups = optimizer.param_groups
        parameter, number = groups[place]["params"][index], groups[place]["numbers"][index]
        taken = optimizer.state[parameter].get("step", 0)
        wide = parameter.detach().float()
        wide.grad = parameter.grad.float()
        optimizer.state[wide] = optimizer.state[parameter]
        optimizer.param_groups = [{**groups[place], "params": [wide]}]
        try:
            optimizer.step()
        finally:  # a rehearsal that ran out of memory may be tried once more
            optimizer.param_groups = groups
            del optimizer.state[wide]
        wide.grad = None
        if parameter.dtype != wide.dtype:
            self.write(parameter, wide, number, taken)


def _piece(key: str, value: Any, start: int) -> Any:
    """A state's part for the PIECE elements from `start` on."""
    if not isinstance(value, Tensor) or key.startswith("qmap"):
        return value
    each = BLOCK if key.startswith("absmax") else 1
    found = value.view(-1)[start // each : (start + PIECE) // each]
    if getattr(value, "is_paged", False):
        found.is_paged, found.page_deviceid = True, value.page_deviceid
    return found
