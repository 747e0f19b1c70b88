"""What DeepSpeed ZeRO holds on one GPU, besides what a model without sharding takes there. N: trained elements.

    over W GPUs      zero1                        zero2                    zero3
    weights          whole                        whole                    1/W of each tensor; small ones whole, too
    states           12 N / W: fp32 weights and two moments
    gradients        4 N, fp32, to the step       4 N / W                  4 N / W, always there
    reducing         after the backward pass:     in it: a bucket in the   in it: an fp32 bucket,
                     4 N / W, an fp32 bucket      weights' dtype, twice,   always there, twice
                                                  and once in fp32
    gathered                                                               the head and two layers; a bucket of them
                                                                           once more while it is copied out
    step             in place                     in place                 fp32 copies of up to SUB_GROUP gradients

Offloaded, DeepSpeed pins on the host, and a pinned block takes a power of two (pinned.py):
    zero1, zero2     fp32 weights, gradients and a buffer of the weights' dtype, a block each, and one of the largest
                     tensor; moments are not pinned. (With weight decay norms and biases have blocks of their own.)
    zero3            gradients, in one block and again in one for each sub-group; offload=all: each tensor's share, and
                     of what is trained once more all shares in one block, to which they move: the pool keeps theirs

A trained tensor that is larger than the bucket is reduced by itself, out of place. Offloaded, states are on the host;
on the GPU, zero1 and zero2 keep their fp32 gradients and a buffer of the largest tensor, zero3 its bucket alone.
Sources: deepspeed.runtime.zero.stage_1_and_2, stage3, partition_parameters (0.19.8); held against bytes that a real
DeepSpeed has (tests/preflight/test_zero_memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from loadmaster.preflight import zero_settings
from loadmaster.preflight.pinned import pinned
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import Part, cutting_key, layer_buffers, layer_parts, root_parts
from loadmaster.preflight.weights import base_bytes

FP32 = 4


@dataclass(frozen=True)
class ZeroBytes:
    """On one GPU."""

    weights: float
    gradients: float
    """That an earlier micro-batch left."""
    states: float
    share: int
    """Trained elements whose states this GPU has."""
    kept: float
    """Buffers that are always there."""
    backward: float
    """Buffers and gathered weights of a backward pass, besides."""
    step: float
    """What a step takes besides states (zero3: and gradients); zero1's includes the reduction before it."""
    host: float
    """In the node's memory, for this rank."""
    pinned_host: float
    """The same with a GPU: what is pinned takes more."""


def zero_bytes(shape: ModelShape, setup: Setup) -> ZeroBytes:
    """Raises ZeroDivisionError for a setup without ZeRO."""
    w, gpus, trained = setup.width, setup.world_size, setup.trainable(shape)
    parts = list(_parts(shape, setup))
    largest = max(_elements(p, w) for p, _ in parts if p.trained)
    bucket = zero_settings.reduce_bucket(trained)
    alone = largest if largest > bucket else 0
    offloaded = setup.offload != "none"
    if setup.stage == 3:
        share = sum(count * -(-_elements(p, w) // gpus) for p, count in parts if p.trained)
        weights = sum(count * _cut(p, w, gpus) for p, count in parts) + _buffers(shape, setup)
        persistent = sum(count * p.rows * p.row_bytes for p, count in parts if _persists(p, w))
        kept, gradients = FP32 * bucket, FP32 * share
        # The bucket once more as one row of numbers, by rank; a large tensor as it is and cast.
        backward = max(FP32 * bucket, (w + FP32) * alone) + _gathered(shape, setup, parts)
        step = FP32 * min(share, sub_group_size(shape, setup) + largest // gpus)
        host, rounded, on_gpu = 0, 0, weights + persistent
        if offloaded:
            gradients = step = 0.0
            host, groups = (3 * FP32 + 2 * FP32) * share, sub_groups(shape, setup)
            rounded = 3 * FP32 * share + pinned(FP32 * share) + sum(pinned(FP32 * group) for group in groups)
        if setup.offload == "all":
            host, on_gpu = host + weights, persistent
            rounded += sum(count * pinned(_cut(p, w, gpus)) for p, count in parts) + pinned(w * share)
        return ZeroBytes(on_gpu, gradients, 3 * FP32 * share, share, kept, backward, step, host, rounded)
    share = -(-trained // (2 * gpus)) * 2
    weights = base_bytes(shape, setup.method, setup.precision) + (w * trained if setup.adapters else 0)
    gradients = FP32 * (trained if setup.stage == 1 else share)
    kept = w * largest if offloaded else 0
    if setup.stage == 1:  # after the backward pass whole gradients meet a bucket and the share of what was reduced
        backward, step = FP32 * bucket, FP32 * (trained + bucket + share + alone // gpus)
    else:  # the bucket, and as one row of numbers, in the weights' dtype, and cast
        backward = w * bucket + (w + (FP32 if w < FP32 else 0)) * max(bucket, alone) + w * alone
        step = FP32 * share
    moments, blocks = 2 * FP32 * share, (FP32 * share, FP32 * share, w * share, w * largest)
    host, rounded = (moments + sum(sizes) if offloaded else 0 for sizes in (blocks, map(pinned, blocks)))
    return ZeroBytes(weights, gradients, 3 * FP32 * share, share, kept, backward, step, host, rounded)


def _parts(shape: ModelShape, setup: Setup) -> Iterator[tuple[Part, int]]:
    """(tensor, how many there are of it)."""
    for experts, layers in ((False, shape.dense_layers), (True, shape.expert_layers)):
        if layers:
            yield from ((part, layers) for part in layer_parts(shape, setup, experts))
    yield from ((part, 1) for part in root_parts(shape, setup))


def sub_groups(shape: ModelShape, setup: Setup) -> list[int]:
    """Elements of a rank's shares that zero3 steps together: tensors in the model's order, until there are enough."""
    return _sub_groups(shape, replace(cutting_key(setup), world_size=setup.world_size))


def sub_group_size(shape: ModelShape, setup: Setup) -> int:
    """Elements at which DeepSpeed closes such a group."""
    counted = ((False, shape.dense_layers), (True, shape.expert_layers))
    trained = (p for experts, n in counted if n for p in layer_parts(shape, setup, experts) if p.trained)
    largest = max((_elements(p, setup.width) for p in trained), default=0)
    return zero_settings.sub_group(-(-largest // setup.world_size))


@cache
def _sub_groups(shape: ModelShape, setup: Setup) -> list[int]:
    embedding, *last = root_parts(shape, setup)
    counted = ((False, shape.dense_layers), (True, shape.expert_layers))
    layers = (part for experts, n in counted if n for part in n * list(layer_parts(shape, setup, experts)))
    found, enough = [0], sub_group_size(shape, setup)
    for part in (embedding, *layers, *last):
        if part.trained:
            if found[-1] >= enough:
                found.append(0)
            found[-1] += -(-_elements(part, setup.width) // setup.world_size)
    return found


def _elements(part: Part, width: int) -> int:
    return part.rows * part.row_bytes // (1 if part.coded else width)


def _cut(part: Part, width: int, gpus: int) -> int:
    return -(-_elements(part, width) // gpus) * (1 if part.coded else width)


def _persists(part: Part, width: int) -> bool:
    return _elements(part, width) <= zero_settings.PERSISTENCE


def _buffers(shape: ModelShape, setup: Setup) -> int:
    counted = ((False, shape.dense_layers), (True, shape.expert_layers))
    return sum(layers * layer_buffers(shape, setup, experts) for experts, layers in counted if layers)


def _gathered(shape: ModelShape, setup: Setup, parts: list[tuple[Part, int]]) -> float:
    """Whole weights at a time: up to max_live, and what is gathered ahead once more while it is copied out."""
    w = setup.width
    cut = [(p, count) for p, count in parts if not _persists(p, w)]
    layers = [
        sum(p.rows * p.row_bytes for p in layer_parts(shape, setup, experts) if not _persists(p, w))
        for experts, count in ((False, shape.dense_layers), (True, shape.expert_layers))
        if count
    ]
    ahead = w * (zero_settings.PREFETCH_BUCKET + max((_elements(p, w) for p, count in cut if count > 1), default=0))
    whole = sum(count * p.rows * p.row_bytes for p, count in cut)
    return min(w * shape.embedding_parameters + 2 * max(layers), whole) + min(ahead, 2 * max(layers))
