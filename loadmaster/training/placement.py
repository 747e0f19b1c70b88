"""Parameters and their parts: what of a tensor is on this rank, and where in the whole it belongs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from loadmaster.models.shards import local_rows


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, sharing its memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Placed:
    """Where parts of parameters are that are sharded over `mesh` by rows, or (None) not at all.

    Tensors on the host stand for them in a checkpoint; another way to place parts is a subclass.
    """

    def __init__(self, mesh: DeviceMesh | None = None):
        self._mesh = mesh
        if mesh is not None and mesh.device_type != "cpu":
            # Groups of parts of the world would be split off NCCL's as well, which takes memory on every GPU.
            names = mesh.mesh_dim_names
            gloo = dict.fromkeys(names, "gloo") if mesh.ndim > 1 else None
            self._mesh = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=names, backend_override=gloo)

    @property
    def sharded(self) -> bool:
        """Whether a rank's model holds less than the whole."""
        return self._mesh is not None

    @property
    def shard_name(self) -> str:
        """Which part of how many this rank holds: 2-of-4."""
        if self._mesh is None:
            return "0-of-1"
        return f"{self._mesh.get_local_rank('shard')}-of-{self._mesh['shard'].size()}"

    def part(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part of a trained parameter, sharing its memory."""
        return local(parameter)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole."""
        return parameter.shape

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """All of it, on every rank's host; all ranks call it."""
        part = self.copy(parameter, local(parameter))
        return part.full_tensor() if isinstance(part, DTensor) else part

    def holds(self, parameter: nn.Parameter, read: Callable[[int, int], Tensor]) -> bool:
        """Whether this rank's part is bit for bit what `read` gives of the whole: its rows from one to another."""
        part, start, end = local_rows(parameter)
        return not part.numel() or torch.equal(read(start, end), part.cpu())

    def copy(self, parameter: nn.Parameter, part: Tensor) -> Any:
        """A copy on the host of `part`, which lies in its whole as this rank's part of `parameter` does."""
        return self.place(parameter, part.detach().to("cpu", copy=True).contiguous())

    def complete(self, parts: dict[str, Any]) -> dict[str, Any]:
        """What `place` gave, as torch.distributed.checkpoint writes it; all ranks call it."""
        return parts

    def empty(self, parameter: nn.Parameter, dtype: torch.dtype) -> Any:
        """What torch.distributed.checkpoint fills with this rank's part."""
        return self.place(parameter, torch.empty(local(parameter).shape, dtype=dtype))

    def filled(self, parameter: nn.Parameter, loaded: Any) -> Tensor:
        """This rank's part out of what `empty` gave, once it is filled."""
        return local(loaded)

    def place(self, parameter: nn.Parameter, part: Tensor) -> Any:
        """`part` itself, as what lies in its whole as this rank's part of `parameter` does."""
        if not isinstance(parameter, DTensor):
            return part
        mesh = self._mesh if part.device.type == self._mesh.device_type else parameter.device_mesh
        return DTensor.from_local(
            part, mesh, parameter.placements, run_check=False,
            shape=parameter.shape, stride=parameter.stride(),
        )
