"""How fully_shard divides a model: its units, and the bytes of each, whole and on one GPU.

A unit is a decoder layer, the embedding, the head, or the root: the last norm, and an embedding and a head that share
their weight or of which copies are trained beside an adapter. Every parameter is cut along its first dimension
into as many rows for each GPU as the first one gets, so gathered buffers have padding: none for a matrix of 4096 rows,
four times the bytes for an adapter of rank 16 over 64 GPUs. Sources: torch.distributed.fsdp, loadmaster.models.frozen;
held against traces of both (tests/preflight/test_sharded.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import add
from typing import Any, NamedTuple

from loadmaster.preflight import saved
from loadmaster.preflight.pinned import pinned
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import Matrix, ModelShape

REDUCE_BYTES = 4
"""Gradients are reduced over GPUs in fp32."""


@dataclass(frozen=True)
class Part:
    """A parameter of `rows` equal rows along its first dimension."""

    rows: int
    row_bytes: int
    trained: bool
    coded: bool = False
    """Bytes, not numbers of the compute dtype."""

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    def local(self, gpus: int) -> int:
        """Bytes of the GPU with most rows; gathering takes that of each."""
        return -(-self.rows // gpus) * self.row_bytes


@dataclass(frozen=True)
class Unit:
    """Bytes on one of `gpus` GPUs."""

    shard: int
    """Weights."""
    trained_shard: int
    """Those of them that are trained: gradients in the same dtype are as large."""
    gathered: int
    reduced: int
    """Gradients of the whole unit in the dtype of the reduction."""
    replicated: int
    """Buffers, which are not cut."""
    pinned: int
    """What the weights take in pinned host memory, where each shard is a block of its own."""
    trained_pinned: int
    """Those of them that are trained: gradients in the same dtype take as much."""
    last_gradient: int
    """Of the last trained parameter in the module's order, whole."""
    trained_parts: tuple[int, ...]
    """What is trained, parameter by parameter."""


class Division(NamedTuple):
    layers: tuple[Unit, Unit]
    """Of the first kind and of the second (ModelShape.is_second)."""
    root: Unit
    embedding: Unit | None
    head: Unit | None
    """Where they are none of their own they are in the root."""

    @property
    def outside(self) -> tuple[Unit, ...]:
        """What is no layer."""
        return tuple(unit for unit in (self.root, self.embedding, self.head) if unit)


def units(shape: ModelShape, setup: Setup) -> Division:
    return _units(shape, cutting_key(setup))


def whole(shape: ModelShape, setup: Setup) -> Unit:
    """All units together."""
    return _whole(shape, cutting_key(setup))


def cutting_key(setup: Setup) -> Setup:
    """The setup with all that does not change its units set to one value, so that they are counted once."""
    return Setup(
        method=setup.method,
        precision=setup.precision,
        optimizer="",
        master_weights=False,
        sharding="fsdp",
        world_size=setup.shards,
        lora_rank=setup.lora_rank,
        lora_targets=setup.lora_targets,
        dora=setup.dora,
        modules_to_save=setup.modules_to_save,
    )


@cache
def _units(shape: ModelShape, setup: Setup) -> Division:
    first, second = (
        _unit(list(layer_parts(shape, setup, second)), setup, layer_buffers(shape, setup, second))
        for second in (False, True)
    )
    rotary = sum(4 * view.head_dim for view, _ in shape.views)  # frequencies, twice
    embedding, norm, *rest = outside_parts(shape, setup)
    alone = [not shape.tied and not (setup.adapters and setup.trains(name)) for name in saved.TABLES]
    root = [embedding] * (not alone[0]) + [norm] + rest[alone[1] :]
    return Division(
        (first, second),
        _unit(root, setup, rotary),
        _unit([embedding], setup, 0) if alone[0] else None,
        _unit(rest[:1], setup, 0) if alone[1] else None,
    )


def outside_parts(shape: ModelShape, setup: Setup) -> list[Part]:
    """Embedding, last norm, head; beside an adapter also the copies of them that are trained."""
    w, h, full, named = setup.width, shape.hidden_size, not setup.adapters, setup.modules_to_save
    table, norm = Part(shape.vocabulary_size, w * h, full), Part(h, w, full)
    found = [table, norm] + [table] * (not shape.tied)
    if not full:
        tables = saved.tables(shape, named)
        first = tables > 0 and (shape.tied or "embed_tokens" in named)
        table, norm = replace(table, trained=True), replace(norm, trained=True)
        found += [table] * first + [norm] * ("norm" in named) + [table] * (tables - first)
    return found


@cache
def _whole(shape: ModelShape, setup: Setup) -> Unit:
    found = _units(shape, setup)

    def total(name: str) -> Any:
        layers = (count * getattr(found.layers[second], name) for second, count in shape.layer_kinds)
        return reduce(add, (*layers, *(getattr(unit, name) for unit in found.outside)))

    return Unit(*map(total, Unit.__dataclass_fields__))


def _unit(parts: list[Part], setup: Setup, buffers: int) -> Unit:
    gpus = setup.shards
    trained = sum(p.local(gpus) for p in parts if p.trained)
    shard = sum(p.local(gpus) for p in parts)
    blocks = [(pinned(p.local(gpus)), p.trained) for p in parts]
    return Unit(
        shard=shard,
        trained_shard=trained,
        gathered=gpus * shard,
        reduced=gpus * trained * REDUCE_BYTES // setup.width,
        replicated=buffers,
        pinned=sum(size for size, _ in blocks),
        trained_pinned=sum(size for size, is_trained in blocks if is_trained),
        last_gradient=next((p.bytes for p in reversed(parts) if p.trained), 0),
        trained_parts=tuple(p.local(gpus) for p in parts if p.trained),
    )


def layer_parts(shape: ModelShape, setup: Setup, second: bool) -> Iterator[Part]:
    shape = shape.view(second)
    w, h, full = setup.width, shape.hidden_size, not setup.adapters
    for m in shape.matrices(second):
        yield from _frozen(m, setup.frozen_form) if setup.frozen_form else [Part(m.outputs, w * m.inputs, full)]
        if m.bias:
            yield Part(m.outputs, w, full)
    if not full:
        for m in shape.adapted(setup.lora_targets, second):
            yield Part(setup.lora_rank, w * m.inputs, True)
            yield Part(m.outputs, w * setup.lora_rank, True)
            if setup.dora:
                yield Part(m.outputs, w, True)
        yield from (Part(size, w, True) for name, size in saved.head_norm_sizes(shape) if setup.trains(name))
    yield from (Part(size, w, full) for size in shape.query_key_norm_sizes)
    if second and shape.experts:
        yield Part(shape.experts, w * 2 * shape.expert_size * h, full)
        yield Part(shape.experts, w * shape.expert_size * h, full)
        yield Part(shape.experts, w * h, full)
    yield from [Part(h, w, full)] * shape.norms
    if not full:
        yield from [Part(h, w, True)] * sum(map(setup.trains, saved.layer_norms(shape)))


def _frozen(m: Matrix, form: str) -> list[Part]:
    if form == "fp8":
        return [Part(m.outputs, m.inputs, False, True)]
    return [Part(-(-m.weight // 2), 1, False, True), Part(-(-m.weight // 64), 1, False, True)]


def layer_buffers(shape: ModelShape, setup: Setup, second: bool) -> int:
    """nf4: second scales, offset, code; fp8: a scale a row. Besides, a layer's own number."""
    form, own = setup.frozen_form, setup.width * shape.layer_scalar
    if form is None:
        return own
    if form == "fp8":
        return own + sum(4 * m.outputs for m in shape.matrices(second))
    return own + sum(4 * math.ceil(m.weight / (64 * 256)) + 4 + 1024 for m in shape.matrices(second))
