"""What is trained, tensor by tensor in the engine's order, and what stepping it takes beside states and gradients.

Parameters are stepped by buckets, the smallest first, and a bucket's gradients go with it: when a large embedding is
stepped, which is a bucket by itself, those of the layers are gone. What is cached takes the sizes of buckets and pieces
as arguments: it holds for these alone, and tests have smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

from loadmaster.preflight import saved
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import Matrix, ModelShape
from loadmaster.preflight.stepping import PIECE, adafactor_bytes, rounding_bytes

T = TypeVar("T")
BUCKET_ELEMENTS = 2**28
"""Parameters that the engine steps together; bounds the fp32 gradients that exist at once to 1 GiB."""
HOST_STEP = {"adamw": 20, "adamw_8bit": 28, "adafactor": 16}
"""Bytes an element that is stepped in fp32, on the host and without masters, takes besides state and gradient: at the
peak of a step of TrainingOptimizer on a CPU (bitsandbytes 0.50, transformers 5.17; 2026-11-29). Of Adafactor those are
the elements of a matrix, of others PIECE at the most."""


class Trained(NamedTuple):
    elements: int
    matrix: bool = True
    """Or a vector: a bias, a norm."""


def widened_bytes(shape: ModelShape, setup: Setup, made: float = 0.0) -> float:
    """At the most beside all gradients, in bf16, as AdamW steps fp32 masters: a gradient becomes fp32 (4 bytes) before
    its bf16 one (2) goes. made: bytes of states that an element gets as it is stepped, in the first step; counted here.
    """
    return _widened(tensors(shape, setup), BUCKET_ELEMENTS, made) / setup.shards


@cache
def _widened(trained: tuple[Trained, ...], filled: int, made: float) -> float:
    most = done = 0.0
    for bucket in _buckets(trained, filled):
        size, before = 0, (made - 2) * done
        for each in bucket:
            most = max(most, 2 * size + 4 * each.elements + before)
            size += each.elements
        most = max(most, 2 * size + made * size + before)
        done += size
    return most


def factored_bytes(shape: ModelShape, setup: Setup) -> float:
    """The same of Adafactor, which has a matrix at a time in fp32."""
    return _factored(tensors(shape, setup), BUCKET_ELEMENTS, setup.width, setup.rounds) / setup.shards


@cache
def _factored(trained: tuple[Trained, ...], filled: int, width: int, rounds: bool) -> float:
    most = done = 0.0
    for bucket in _buckets(trained, filled):
        size = sum(each.elements for each in bucket)
        wider = 0 if rounds or width == 4 else 2 * size  # gradients of fp32 masters
        stepped = adafactor_bytes((each.elements for each in bucket if each.matrix), rounds)
        most = max(most, wider + stepped - width * done)
        done += size
    return most


def rounded_bytes(shape: ModelShape, setup: Setup, made: float = 0.0) -> float:
    """The same of optimizers that step bf16 weights in fp32, a part of one at a time."""
    return _rounded(tensors(shape, setup), BUCKET_ELEMENTS, PIECE, setup.shards, made)


@cache
def _rounded(trained: tuple[Trained, ...], filled: int, piece: int, shards: int, made: float) -> float:
    most = done = 0.0
    for bucket in _buckets(trained, filled):
        stepped = done
        for each in bucket:
            stepped += each.elements / shards
            most = max(most, rounding_bytes([each.elements / shards], piece) + made * stepped - 2 * done)
        done = stepped
    return most


def on_host_bytes(shape: ModelShape, setup: Setup) -> float:
    """The same of an optimizer whose states are on the host: of AdamW over masters or fp32 weights, which is fused, the
    fp32 gradients of a bucket, of others what they step at once."""
    fused = setup.optimizer == "adamw" and (setup.master_weights or setup.width == 4)
    return _on_host(tensors(shape, setup), BUCKET_ELEMENTS, setup.optimizer, fused, setup.shards)


@cache
def _on_host(trained: tuple[Trained, ...], filled: int, optimizer: str, fused: bool, shards: int) -> float:
    if fused:
        return 4 * max(sum(each.elements for each in bucket) for bucket in _buckets(trained, filled)) / shards
    largest = max(each.elements for each in trained) / shards
    return HOST_STEP.get(optimizer, 0) * (largest if optimizer == "adafactor" else min(PIECE, largest))


def _buckets(trained: tuple[Trained, ...], filled: int) -> list[list[Trained]]:
    """As the engine makes them (TrainingOptimizer.split), in the order in which they are stepped."""
    found = in_groups(trained, lambda each: each.elements, filled)
    return sorted(found, key=lambda bucket: sum(each.elements for each in bucket))


def in_groups(things: Iterable[T], size: Callable[[T], float], most: int) -> list[list[T]]:
    """Neighbours together, up to `most` in size; what is larger is alone, and of nothing there is one empty group."""
    groups: list[list[T]] = [[]]
    held = 0.0
    for thing in things:
        if groups[-1] and held + size(thing) > most:
            groups.append([])
            held = 0.0
        groups[-1].append(thing)
        held += size(thing)
    return groups


def tensors(shape: ModelShape, setup: Setup) -> tuple[Trained, ...]:
    """Every trained tensor that is in the dtype of the rest."""
    if setup.adapters:
        return _beside(shape, setup.lora_rank, setup.lora_targets, setup.modules_to_save)
    return _whole(shape)


@cache
def _whole(shape: ModelShape) -> tuple[Trained, ...]:
    def layer(second: bool) -> Iterator[Trained]:
        for m in shape.matrices(second):
            yield from (Trained(m.weight), Trained(m.bias * m.outputs, False))
        if second and shape.experts:
            expert = shape.experts * shape.expert_size * shape.hidden_size
            yield from map(Trained, (2 * expert, expert, shape.experts * shape.hidden_size))
        yield Trained(shape.view(second).norm_parameters, False)

    return _around(shape, [list(layer(second)) for second in (False, True)], (*saved.TABLES, "norm"))


@cache
def _beside(shape: ModelShape, rank: int, targets: Any, named: tuple[str, ...]) -> tuple[Trained, ...]:
    def adapter(m: Matrix) -> list[Trained]:
        return [Trained(rank * m.inputs), Trained(rank * m.outputs)]

    norms = [Trained(saved.layer_parameters(shape.view(second), named), False) for second in (False, True)]
    layers = [[*(part for m in shape.adapted(targets, second) for part in adapter(m)), norms[second]]
              for second in (False, True)]
    return _around(shape, layers, named)


def _around(shape: ModelShape, kinds: Sequence[list[Trained]], named: Sequence[str]) -> tuple[Trained, ...]:
    """The layers of both kinds between embedding and head."""
    count, table = saved.tables(shape, named), Trained(shape.embedding_parameters)
    first = count > 0 and (shape.tied or "embed_tokens" in named)
    found = [table] * first
    for index in range(shape.layers):
        found += kinds[shape.is_second(index)]
    found += [Trained(shape.hidden_size, False)] * ("norm" in named) + [table] * (count - first)
    return tuple(each for each in found if each.elements)
