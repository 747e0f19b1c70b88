"""A model built without weights, and filled shard by shard: no process holds what it does not keep.

    1  `empty_model`   every parameter on the meta device, buffers (rotary frequencies, computed) real
    2  (the caller adds adapters and shards: a parameter is then a DTensor, whose local part is this rank's)
    3  `materialise`   memory for the local parts
    4  `fill`          each is read from the checkpoint's safetensors, the rows of this rank and no others; so are
                       buffers that are stored there, whole

A quantized layer has to see its whole weight, for its blocks share a scale. Each is read and quantized by one
rank, in turn, and handed round; the others never read it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from loadmaster.errors import LoadmasterError
from loadmaster.model_files import is_sharded, shards, weight_map
from loadmaster.models.attention import PACKED
from loadmaster.models.bf16_products import quicken
from loadmaster.models.buffers import stored_buffers
from loadmaster.models.experts import stored_as, stored_experts
from loadmaster.models.frozen import FrozenLinear, freeze_linears
from loadmaster.models.load import config_of, knowing_packed_attention, refuse_unsupported


def empty_model(folder: Path, dtype: torch.dtype, frozen: str | None = None) -> nn.Module:
    """The model of a checkpoint with its parameters on the meta device; `frozen` as for load_base."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = config_of(folder)
    quicken()
    with init_empty_weights(include_buffers=False), knowing_packed_attention(folder):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=PACKED, trust_remote_code=False
        )
    model.tie_weights()
    refuse_unsupported(model)
    if frozen:
        freeze_linears(model, frozen)
    return model


def with_adapter(model: nn.Module, add: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """`add(model)`, a function that puts an adapter on a model that is there, for one on the meta device.

    peft leaves an adapter's first values on the meta device if its base is there. Meanwhile the base's linear layers
    therefore have tensors of one element that only look whole, and the adapter's draw the very numbers they always do.
    (Copies that are trained beside it, of embedding, head and norms, are filled like what they are copies of.)
    """
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    base = dict.fromkeys(parameter for module in linears for parameter in module.parameters(recurse=False))
    for parameter in base:
        stand_in = torch.empty(1, dtype=parameter.dtype).expand(parameter.shape)
        base[parameter] = nn.Parameter(stand_in, requires_grad=False)
    _replace(model, base)
    model = add(model)
    _replace(model, {stand_in: _on_meta(stand_in) for stand_in in base.values()})
    return model


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)


def _replace(model: nn.Module, new: dict[nn.Parameter, nn.Parameter]) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in new:
                module._parameters[name] = new[parameter]


def materialise(root: nn.Module, device: torch.device) -> None:
    """Give everything that is on the meta device memory on `device`, and move the rest there."""
    root._apply(lambda t: torch.empty_like(t, device=device) if t.device.type == "meta" else t.to(device))


OPEN_FILES = 2
"""Files of a checkpoint that are mapped at a time: what was read of one is this process's memory until it is closed."""


class Checkpoint:
    """A folder of safetensors, read by name and slice; names are the model's, experts in one tensor."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        if is_sharded(folder):
            self._where = weight_map(folder)
        else:
            self._where = {}
            for path in shards(folder):
                self._where |= dict.fromkeys(self._open(path.name).keys(), path.name)

    def __contains__(self, name: str) -> bool:
        return bool(stored_as(name, self._where) or stored_experts(name, self._where))

    def rows(self, name: str, start: int | None = None, end: int | None = None) -> Tensor:
        """Rows `start` to `end` of a tensor, on the host; all of it without them."""
        if (stored := stored_as(name, self._where)) is not None:
            part = self._slice(stored)
            return part[:] if start is None else part[start:end]
        experts = stored_experts(name, self._where)[slice(start, end)]
        return torch.stack([torch.cat([self._slice(each)[:] for each in names]) for names in experts])

    def shape(self, name: str) -> list[int]:
        if (stored := stored_as(name, self._where)) is not None:
            return self._slice(stored).get_shape()
        experts = stored_experts(name, self._where)
        (_, columns), *_ = shapes = [self._slice(each).get_shape() for each in experts[0]]
        return [len(experts), sum(rows for rows, _ in shapes), columns]

    def _slice(self, stored: str) -> Any:
        return self._open(self._where[stored]).get_slice(stored)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            if len(self._files) == OPEN_FILES:
                del self._files[next(iter(self._files))]
            self._files[name] = safe_open(self.folder / name, framework="pt")
        return self._files[name]


def plain_name(name: str) -> str:
    """A parameter's name in its checkpoint: what wrappers and adapters put around it is left out."""
    plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return plain.replace(".original_module.", ".").replace(COPY, ".")


COPY = ".modules_to_save.default."
"""In the name of a parameter that is trained beside an adapter, a copy of the base's."""


def saved_name(name: str) -> str:
    """The name that peft saves a trained parameter of an adapted model by."""
    return name.replace(COPY, ".").replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(
        ".default.", "."
    )


@torch.no_grad()
def fill(model: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Fill a sharded model's base from a checkpoint; adapters keep what they hold.

    dtype: what a weight is read in before it is quantized.

    Raises LoadmasterError for a checkpoint whose tensors are not the model's by name and shape.
    """
    source = Checkpoint(folder)
    wanted, layers = _base(model)
    wanted |= stored_buffers(model)
    _refuse_misfit(source, wanted, layers)
    for name, parameter in wanted.items():
        _fill_one(parameter, source, plain_name(name))
    for index, (name, layer) in enumerate(layers):
        _quantize_one(layer, source, plain_name(f"{name}.weight"), dtype, index)


@torch.no_grad()
def stream(
    model: nn.Module,
    units: list[nn.Module],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    cut: Callable[[nn.Module], Any],
    trained: Path | None = None,
) -> None:
    """The same, unit by unit, and then what is in none of them: memory for it, its tensors, then `cut(unit)`.

    Only rank 0 reads what is not quantized: `cut` is to give its values to all. trained: folder that peft wrote, with
    the values of copies that were trained beside an adapter; None: the base's.
    """
    source = Checkpoint(folder)
    copies = None if trained is None else Checkpoint(trained)
    wanted, layers = _base(model)
    _refuse_misfit(source, wanted | stored_buffers(model), layers)
    for name, buffer in stored_buffers(model).items():  # those of every rank: nothing cuts them
        _fill_one(buffer, source, plain_name(name))
    names = {module: name for name, module in model.named_modules()}
    reads = not dist.is_initialized() or dist.get_rank() == 0
    missing = list(wanted)
    index = 0
    for unit in [*units, model]:
        prefix = f"{names[unit]}." if names[unit] else ""
        mine = [name for name in missing if name.startswith(prefix)]
        missing = [name for name in missing if not name.startswith(prefix)]
        _onto(unit, device)
        for name in mine if reads else ():
            if COPY in name and copies is not None:
                _fill_one(model.get_parameter(name), copies, saved_name(name))
            else:
                _fill_one(model.get_parameter(name), source, plain_name(name))
        for name, layer in layers if unit is not model else ():
            if name.startswith(prefix):
                _quantize_one(layer, source, plain_name(f"{name}.weight"), dtype, index)
                index += 1
        cut(unit)


def _onto(module: nn.Module, device: torch.device) -> None:
    """Memory on `device` for all that is on the meta device; parameters that are shared stay so."""
    new = {
        p: nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
        for p in module.parameters()
        if p.is_meta
    }
    _replace(module, new)
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_meta:
                each._buffers[name] = torch.empty_like(buffer, device=device)


def _base(model: nn.Module) -> tuple[dict[str, nn.Parameter], list[tuple[str, FrozenLinear]]]:
    """(parameters that a checkpoint has as they are, layers that are quantized from it), by name."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, FrozenLinear)]
    quantized = {f"{name}.{part}" for name, m in layers for part in [*m._parameters, *m._buffers] if part != "bias"}
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in quantized and ".lora_" not in name
    }
    return wanted, layers


@torch.no_grad()
def fill_adapter(model: nn.Module, folder: Path) -> None:
    """Fill a sharded model's adapter from a folder that peft wrote. Raises LoadmasterError where it is another's."""
    source = Checkpoint(folder)
    adapter = {name: p for name, p in model.named_parameters() if ".lora_" in name or COPY in name}
    missing = [name for name in adapter if saved_name(name) not in source]
    if missing or not adapter:
        raise LoadmasterError(f"{folder} is not this model's adapter: {', '.join(missing[:3])} is missing")
    for name, parameter in adapter.items():
        _fill_one(parameter, source, saved_name(name))


def _refuse_misfit(source: Checkpoint, wanted: dict[str, Tensor], layers: list[tuple[str, FrozenLinear]]) -> None:
    shapes = {plain_name(name): list(parameter.shape) for name, parameter in wanted.items()}
    shapes |= {plain_name(f"{name}.weight"): [m.out_features, m.in_features] for name, m in layers}
    missing = [name for name in shapes if name not in source]
    other = [name for name, shape in shapes.items() if name in source and source.shape(name) != shape]
    if missing or other:
        raise LoadmasterError(
            f"the checkpoint in {source.folder} cannot be read shard by shard: "
            f"{', '.join([*missing, *other][:3])} is missing or of another shape there. It is torn, of another model, "
            "or of a family whose tensors are renamed on loading; sharding=ddp reads it whole"
        )


def local_rows(parameter: Tensor) -> tuple[Tensor, int, int]:
    """(this rank's part, its first row, the row after its last) of a parameter, sharded by rows or whole."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, parameter.shape[0] if parameter.dim() else 1
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.detach().to_local(), offset[0], offset[0] + shape[0]


def _fill_one(parameter: Tensor, source: Checkpoint, name: str) -> None:
    local, start, end = local_rows(parameter)
    if local.numel():
        local.copy_(source.rows(name, start, end) if parameter.dim() else source.rows(name))


def _quantize_one(layer: FrozenLinear, source: Checkpoint, name: str, dtype: torch.dtype, index: int) -> None:
    """One rank reads and quantizes the layer's weight; every rank takes its rows of the codes, and the scales whole."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    owner = index % dist.get_world_size() if several else 0
    mine = not several or dist.get_rank() == owner
    held = {**layer._parameters, **layer._buffers}
    device = next(iter(layer._buffers.values())).device
    made: dict[str, Tensor] = {}
    if mine:
        made = layer.quantized(source.rows(name).to(device, dtype))
    for part, tensor in held.items():
        if part == "bias":
            continue
        whole = made[part].contiguous() if mine else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if several:
            dist.broadcast(whole, src=owner)
        local, start, end = local_rows(tensor)
        local.copy_(whole[start:end] if whole.dim() else whole)
