"""A model that no one device holds, run layer by layer: over several GPUs, host memory and disk.

`Spread.placed_by` makes the device map that transformers loads by, from `loadmaster.preflight.placement`. What lies
outside the layers (embeddings, rotary frequencies, final norm, head) is on the first device, so that inputs, hidden
states and logits are where they are for a model on one device.

A layer off the GPUs is brought matrix by matrix, for as long as the matrix is used. accelerate loads it so, with
tensors on the meta device in its place; `settled` hands it to compressed-tensors, whose modules bring a parameter
whenever it is read. So whoever reads `layer.weight` gets numbers, never an empty tensor. What reads all parameters at
once would keep all of them, though: that is done under `where_they_lie`, and adapters are put on under `stand_ins`.

On disk a layer's tensors stay in the checkpoint's own files; those that are not stored as they are used (experts that
are fused, weights that are decompressed) are written to `folder`. Layers held in few bits (loadmaster.models.frozen)
are quantized as they are read and would have to be written too, which transformers does not do: they go to host memory
at most.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loadmaster.errors import LoadmasterError
from loadmaster.preflight.placement import Placement, Room, place
from loadmaster.words import counted

GIB = 2**30


class NoRoom(LoadmasterError):
    """A model fits nowhere on this machine."""


class Spread:
    """Where models may go that are loaded one after another.

    main: the device of what is outside the layers; "cuda" is the first GPU.
    folder: for what is written of layers on disk; emptied at each load.
    """

    def __init__(self, room: Room, main: str, folder: Path):
        self.room, self.main, self.folder = room, main, folder
        self.placement = Placement(())
        """Of the model that was loaded last."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of its parameters, by name."""

    def placed_by(
        self, checkpoint: Path, dtype: torch.dtype, frozen: str | None = None, beside: float = 0.0
    ) -> dict[str, Any]:
        """The arguments of from_pretrained that place this checkpoint's model.

        beside: bytes of adapters, which are wherever their layer runs.
        Raises NoRoom.
        """
        from loadmaster.models.shards import empty_model

        model = empty_model(checkpoint, dtype, frozen)
        layers, rest = sizes(model)
        room = replace(
            self.room, working=self.room.working + beside, passing=self.room.passing + beside,
            disk=self.room.disk and frozen is None,
        )
        placement = place(layers, rest, room)
        if placement is None:
            raise NoRoom(_no_room(checkpoint, sum(layers), rest, room, frozen))
        self.placement = placement
        if placement.is_whole:
            return {"device_map": {"": self.main}}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return {"device_map": device_map(model, placement, self.main), "offload_folder": str(self.folder)}


def sizes(model: nn.Module) -> tuple[list[float], float]:
    """(bytes of each decoder layer, bytes of all else), tied weights once; a model without a list of them has none."""
    layers = [float(sum(map(_bytes, _tensors(layer)))) for layer in _layers(model)]
    return layers, float(sum(map(_bytes, _tensors(model)))) - sum(layers)


def device_map(model: nn.Module, placement: Placement, main: str) -> dict[str, int | str]:
    """Name of each layer, and of each module outside them, -> its device as accelerate calls it."""
    on_gpus = main != "cpu"
    device = {"host": "cpu", "disk": "disk"}
    layers = {id(layer): place for layer, place in zip(_layers(model), placement.places(), strict=True)}
    found: dict[str, int | str] = {}

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in layers:
            where = layers[id(module)]
            found[name] = device[where] if isinstance(where, str) else where if on_gpus else main
        elif any(id(each) in layers for each in module.modules()):
            direct = [*module._parameters, *module._buffers]
            found.update({f"{name}.{each}" if name else each: 0 if on_gpus else main for each in direct})
            for child, each in module.named_children():
                walk(each, f"{name}.{child}" if name else child)
        else:
            found[name] = 0 if on_gpus else main

    walk(model, "")
    return found


def settled(model: nn.Module) -> nn.Module:
    """A model that transformers has just loaded by a device map: reading a parameter brings it from now on."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        from compressed_tensors.offload import from_accelerate

        from_accelerate(model)
    return model


def is_spread(model: nn.Module) -> bool:
    return any(not isinstance(module._parameters, dict) for module in model.modules())


@contextmanager
def where_they_lie(model: nn.Module) -> Iterator[None]:
    """Within the block parameters are what is kept of them, and none is brought: for names and shapes.

    Of layers on disk that is a tensor without numbers, so nothing may be computed here.
    """
    if not is_spread(model):
        yield
        return
    from compressed_tensors.offload import disable_onloading

    with disable_onloading():
        yield


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Within the block each parameter of a spread model is a tensor of one element that only looks whole, on the device
    that its layer runs on: for peft, which reads all of them, keeps what it read, and puts adapters beside them."""
    caches = {module: module._parameters for module in model.modules() if not isinstance(module._parameters, dict)}
    stands: dict[int, nn.Parameter] = {}
    for module, cache in caches.items():
        for parameter in cache.offloaded_values.values():
            if parameter is not None and id(parameter) not in stands:
                one = torch.empty(1, dtype=parameter.dtype, device=cache.onload_device)
                stands[id(parameter)] = nn.Parameter(one.expand(parameter.shape), requires_grad=False)
        module._parameters = {
            name: None if parameter is None else stands[id(parameter)]
            for name, parameter in cache.offloaded_values.items()
        }
    try:
        yield
    finally:
        for module, cache in caches.items():
            module._parameters = cache


def other_shapes(model: nn.Module, expected: dict[str, tuple[int, ...]]) -> list[str]:
    """Parameters of another shape than they should have; loading does not look at those that stay on disk."""
    from compressed_tensors.offload.cache import DiskCache
    from safetensors import safe_open

    wrong = []
    with where_they_lie(model):
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            if parameter.is_meta:
                entry = DiskCache.index[parameter]
                with safe_open(entry["safetensors_file"], framework="pt") as file:
                    shape = tuple(file.get_slice(entry["weight_name"]).get_shape())
            if shape != expected.get(name, shape):
                wrong.append(f"{name} {list(shape)} instead of {list(expected[name])}")
    return wrong


def free_device_memory() -> None:
    """Give cached memory of this process back to its device and host, for others to take."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.cuda.is_initialized():
        torch._C._host_emptyCache()  # pinned: of checkpoints' copies, offloaded weights and inputs


def _layers(model: nn.Module) -> list[nn.Module]:
    from loadmaster.models.forward import decoder_layers

    try:
        return decoder_layers(model)
    except LoadmasterError:
        return []


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _no_room(checkpoint: Path, layers: float, rest: float, room: Room, frozen: str | None) -> str:
    first = (
        f"{(rest + room.working) / GIB:.1f} GiB for embeddings, head and what a row takes, and a layer"
        if rest + room.working > room.gpus[0]
        else f"{(rest + room.working + layers) / GIB:.1f} GiB"
    )
    has = f"{room.gpus[0] / GIB:.1f} GiB free on the first of {counted(len(room.gpus), 'device')}"
    host = "" if room.host is None else f", {room.host / GIB:.1f} GiB in host memory"
    bits = f"; weights held as {frozen} do not go to disk" if frozen else ""
    return (
        f"{checkpoint} needs {first}, and there is {has}{host}{bits}: "
        "verify on a machine with larger or more GPUs, or more host memory"
    )
