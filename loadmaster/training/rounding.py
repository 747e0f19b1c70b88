"""bf16 weights stepped in fp32 and rounded up or down at random, so that what they become is right in the mean.

bf16 has steps of 0.4% to 0.8%, and most updates are less than half of one: rounded to the nearest they would be lost.
What is drawn depends on which parameter it is, on the part of it and on how often it was stepped, and on no generator
that differs from rank to rank: replicas of a weight (ddp, hybrid sharding) are rounded alike, or they would drift apart
for good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loadmaster.training.relayout import BLOCK

PIECE = 2**24
"""Elements that are in fp32 at once, of a parameter whose optimizer works element by element or block by block
(preflight reads this)."""

Noise = Callable[[Tensor], Tensor]


def noise(device: torch.device, *which: int) -> Noise:
    """Draws integers from 0 to 65,535, int32, in a tensor's shape: the same for the same numbers, of which none is
    negative."""
    if device.type == "cpu":  # PyTorch's generator for processors takes several times as long
        drawn = np.random.SFC64(which)

        def on_host(like: Tensor) -> Tensor:
            halves = drawn.random_raw(-(-like.numel() // 4)).view(np.int16)[: like.numel()]
            return torch.from_numpy(halves).to(torch.int32).bitwise_and_(65535).view(like.shape)

        return on_host
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(hash(which))
    return lambda like: torch.randint(65536, like.shape, dtype=torch.int32, device=device, generator=generator)


def rounded(wide: Tensor, drawn: Tensor) -> Tensor:
    """fp32 values that bf16 can hold, one of the two beside each; `drawn` (as `noise` gives it) becomes them."""
    return drawn.add_(wide.view(torch.int32)).bitwise_and_(-65536).view(torch.float32)


@torch.no_grad()
def step(optimizer: torch.optim.Optimizer, shard: int) -> None:
    """One step of bitsandbytes' optimizers or transformers' Adafactor, of which none keeps fp32 weights.

    Groups have `numbers`: of each of their parameters, among all there are. shard: which part of them these are.
    """
    move = _in_pieces if hasattr(optimizer, "update_step") else _whole
    for place, group in enumerate(optimizer.param_groups):
        for index, (number, parameter) in enumerate(zip(group["numbers"], group["params"], strict=True)):
            if parameter.grad is not None:
                taken = int(optimizer.state[parameter].get("step", 0))
                move(optimizer, place, index, noise(parameter.device, number, shard, taken))


def _write(weight: Tensor, wide: Tensor, draw: Noise) -> None:
    if weight.dtype != wide.dtype:  # or it was stepped itself: some are in fp32 beside others in bf16
        weight.copy_(rounded(wide, draw(wide)))


def _in_pieces(optimizer: Any, place: int, index: int, draw: Noise) -> None:
    """bitsandbytes', whose blocks lie in a row. Its own `step` waits for the GPU, which only paged states need."""
    group = optimizer.param_groups[place]
    parameter = group["params"][index]
    state = optimizer.state[parameter]
    if not state:
        optimizer.init_state(group, parameter, place, index)
    if optimizer.is_paged:
        optimizer.prefetch_state(parameter)
    weight, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
    for start in range(0, weight.numel(), PIECE):
        here = slice(start, start + PIECE)
        wide = weight[here].float()
        wide.grad = gradient[here].float()
        optimizer.state[wide] = {key: _piece(key, value, start) for key, value in state.items()}
        optimizer.update_step(group, wide, place, index)
        taken = optimizer.state.pop(wide)["step"]
        wide.grad = None
        _write(weight[here], wide, draw)
    state["step"] = taken
    if optimizer.is_paged and parameter.is_cuda:
        torch.cuda.synchronize()


def _piece(key: str, value: Any, start: int) -> Any:
    """A state's part for the PIECE elements from `start` on."""
    if not isinstance(value, Tensor) or key.startswith("qmap"):
        return value
    each = BLOCK if key.startswith("absmax") else 1
    found = value.view(-1)[start // each : (start + PIECE) // each]
    if getattr(value, "is_paged", False):
        found.is_paged, found.page_deviceid = True, value.page_deviceid
    return found


def _whole(optimizer: torch.optim.Optimizer, place: int, index: int, draw: Noise) -> None:
    """Adafactor, which takes means over a matrix."""
    groups = optimizer.param_groups
    parameter = groups[place]["params"][index]
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
    for part, stepped in zip(parameter.view(-1).split(PIECE), wide.view(-1).split(PIECE), strict=True):
        _write(part, stepped, draw)
