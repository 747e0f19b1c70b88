"""What DeepSpeed ZeRO holds on one GPU, besides what a model without sharding takes there. N: trained elements.

    over W GPUs      zero1                        zero2                    zero3
    weights          whole                        whole                    1/W of each tensor; small ones whole, too
    states           12 N / W: fp32 weights and two moments
    gradients        4 N, fp32, to the step       4 N / W                  4 N / W, always there
    bucket           fp32, from the first         in the weights' dtype,   fp32, always there
                     gradient to the step         in each backward pass
    reducing         4 N / W, after the           the bucket once more,    the bucket once more
                     backward pass                and cast to fp32
    gathered                                                               the head and two layers, and a tensor; the
                                                                           embedding beside the first layers
    step             4 N / W and the bucket       4 N / W                  fp32 copies of up to SUB_GROUP gradients

Each is there in its part of a micro-batch, and the peak is that of the part in which it and the replay (step.PHASES)
are most: the loss is over when buckets are filled, activations go while they are, and a small model's only bucket is
reduced when they are gone.

Offloaded, DeepSpeed pins on the host, and a pinned block takes a power of two (pinned.py):
    zero1, zero2     fp32 weights, gradients and a buffer of the weights' dtype, a block each, and one of the largest
                     tensor; moments are not pinned. (With weight decay norms and biases have blocks of their own.)
    zero3            gradients, in one block and again in one for each sub-group; offload=all: each tensor's share, and
                     of what is trained once more all shares in one block, to which they move: the pool keeps theirs

A trained tensor that is larger than the bucket is reduced by itself, out of place. Offloaded, states are on the host;
on the GPU, zero1 and zero2 keep their fp32 gradients and a buffer of the largest tensor, zero3 its bucket alone; and
each tensor's share is there once more in fp64, for its norm.
Sources: deepspeed.runtime.zero.stage_1_and_2, stage3, partition_parameters (0.19.8); held against bytes that a real
DeepSpeed has (tests/preflight/test_zero_memory.py) and allocates on stand-ins of GPUs (tests/stand_in).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from loadmaster.preflight import zero_settings
from loadmaster.preflight.pinned import pinned
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import Part, cutting_key, layer_buffers, layer_parts, outside_parts
from loadmaster.preflight.step import PHASES
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
    phases: dict[str, float]
    """Of each part of a micro-batch (step.PHASES; "start": before it): buffers and gathered weights, besides."""
    step: float
    """What a step takes besides states (zero3: and gradients)."""
    host: float
    """In the node's memory, for this rank."""
    pinned_host: float
    """The same with a GPU: what is pinned takes more."""


def zero_bytes(shape: ModelShape, setup: Setup) -> ZeroBytes:
    """Of a setup with a stage of ZeRO."""
    return _partitioned(shape, setup) if setup.stage == 3 else _replicated(shape, setup)


def _replicated(shape: ModelShape, setup: Setup) -> ZeroBytes:
    """zero1 and zero2: weights are whole."""
    w, gpus, trained, first = setup.width, setup.world_size, setup.trainable(shape), setup.stage == 1
    largest = max(_elements(p, w) for p, _ in _parts(shape, setup) if p.trained)
    share = -(-trained // (2 * gpus)) * 2  # padded to two elements a rank (nccl_start_alignment_factor)
    reducing = _reducing1 if first else _reducing2
    offloaded = setup.offload != "none"
    moments, blocks = 2 * FP32 * share, (FP32 * share, FP32 * share, w * share, w * largest)
    host, rounded = (moments + sum(sizes) if offloaded else 0 for sizes in (blocks, map(pinned, blocks)))
    return ZeroBytes(
        weights=base_bytes(shape, setup.method, setup.precision) + (w * trained if setup.adapters else 0),
        gradients=FP32 * (trained if first else share),
        states=3 * FP32 * share,
        share=share,
        kept=w * largest if offloaded else 0,
        phases={name: reducing(shape, setup, name, share) for name in PHASES},
        step=FP32 * (share + (_bucket(shape, setup) if first else 0)),
        host=host,
        pinned_host=rounded,
    )


def _partitioned(shape: ModelShape, setup: Setup) -> ZeroBytes:
    """zero3: every tensor is cut, but small ones are whole, too."""
    w, gpus, offloaded = setup.width, setup.world_size, setup.offload != "none"
    parts = list(_parts(shape, setup))
    largest = max(_elements(p, w) for p, _ in parts if p.trained)
    share = sum(count * -(-_elements(p, w) // gpus) for p, count in parts if p.trained)
    weights = sum(count * _cut(p, w, gpus) for p, count in parts) + _buffers(shape, setup)
    persistent = sum(count * p.bytes for p, count in parts if _persists(p, w))
    # A group's gradients in fp32; before, for their norm, those of a tensor in twice as many bits.
    step = max(FP32 * min(share, sub_group_size(shape, setup) + largest // gpus), 2 * FP32 * largest // gpus)
    host = rounded = 0
    if offloaded:
        host, groups = (3 * FP32 + 2 * FP32) * share, sub_groups(shape, setup)
        rounded = 3 * FP32 * share + pinned(FP32 * share) + sum(pinned(FP32 * group) for group in groups)
    if setup.offload == "all":
        host += weights
        rounded += sum(count * pinned(_cut(p, w, gpus)) for p, count in parts) + pinned(w * share)
    return ZeroBytes(
        weights=persistent + (0 if setup.offload == "all" else weights),
        gradients=0.0 if offloaded else FP32 * share,
        states=3 * FP32 * share,
        share=share,
        kept=FP32 * _bucket(shape, setup),
        phases={
            name: gathered + copied + _reducing3(shape, setup, name)
            for name, (gathered, copied) in _gathered(shape, setup, parts).items()
        },
        step=0.0 if offloaded else step,
        host=host,
        pinned_host=rounded,
    )


def _bucket(shape: ModelShape, setup: Setup) -> int:
    """Elements of the buffer in which gradients are reduced."""
    return zero_settings.reduce_bucket(setup.trainable(shape))


@dataclass(frozen=True)
class _Arriving:
    """Elements of the gradients that come in one part of a backward pass."""

    largest: int
    """Of one that is larger than the bucket, and so is reduced by itself."""
    filled: int
    """Of the bucket, at most, when it is reduced."""
    tensor: int
    """Of the largest one."""


def _arriving(shape: ModelShape, setup: Setup, phase: str) -> _Arriving:
    """Of a tensor that is larger than the bucket the reduction is seen when the next one comes: the head's before the
    layers, the embedding's at the end. A bucket is reduced when the next tensor has no room in it."""
    bucket, trained = _bucket(shape, setup), setup.trainable(shape)
    embedding, head = _tables(shape, setup)
    layer = _largest_in_layers(shape, setup)
    tensor, before = {
        "head": (head, head),
        "layers": (max(head, layer), trained - embedding),
        "first": (max(head, layer), trained - embedding),
        "end": (max(embedding, head, layer), trained),
    }.get(phase, (0, 0))
    alone = {"head": head, "layers": layer, "first": layer, "end": embedding}
    overflows = before > bucket or (phase == "end" and before > 0)
    return _Arriving(
        size if (size := alone.get(phase, 0)) > bucket else 0, min(bucket, before) if overflows else 0, tensor
    )


def _tables(shape: ModelShape, setup: Setup) -> tuple[int, int]:
    """Trained elements of (the embedding, a head of its own)."""
    size = shape.embedding_parameters
    head = 0 if shape.tied else size * setup.trains("lm_head")
    return size * (setup.trains("embed_tokens") or (shape.tied and setup.trains("lm_head"))), head


def _reducing1(shape: ModelShape, setup: Setup, phase: str, share: int) -> float:
    """Gradients of the step's micro-batches add up whole. The bucket stays from the first one to the step; in the
    last one's end they go into it, and its sum into this rank's share."""
    bucket, several = _bucket(shape, setup), setup.gradient_accumulation_steps > 1
    if phase == "loss":
        return FP32 * bucket * several
    if phase != "end":
        return FP32 * bucket
    large = [_arriving(shape, setup, part).largest for part in ("head", "layers", "end")]
    copied = max(_copied(shape, setup, size, share) for size in large)
    return FP32 * (bucket + share + copied) + _norm(setup, min(max(large), share))


def _reducing2(shape: ModelShape, setup: Setup, phase: str, share: int) -> float:
    """A bucket in the weights' dtype, anew in each backward pass; full, it is copied, cast and summed into this rank's
    share, which is not there before the first sum of a step."""
    w, cast = setup.width, FP32 if setup.width < FP32 else 0
    if phase == "loss":
        return 0 if setup.gradient_accumulation_steps > 1 else -FP32 * share
    came = _arriving(shape, setup, phase)
    copied, piece = _copied(shape, setup, came.largest, share), min(came.largest, share)
    alone = w * came.largest + max(cast * (copied or piece) + w * copied, _norm(setup, piece))
    full = max((w + cast) * came.filled, _norm(setup, min(came.tensor, came.filled, share)))
    arrives = w * _tables(shape, setup)[1] if phase == "head" else 0  # the replay let go of it as it came
    return w * _bucket(shape, setup) + max(alone, full, arrives)


def _reducing3(shape: ModelShape, setup: Setup, phase: str) -> float:
    """The bucket, which is kept (ZeroBytes.kept), in the order of ranks once more; a large tensor as it is and in fp32.
    Offloaded, a tensor's share meets that of earlier micro-batches on the GPU, and is there once more for its norm."""
    w, cast, came = setup.width, FP32 if setup.width < FP32 else 0, _arriving(shape, setup, phase)
    tensor = came.largest or min(came.tensor, came.filled)
    there = 3 * FP32 * tensor // setup.world_size if setup.offload != "none" else 0
    reduced = max(FP32 * came.filled, (w + cast) * came.largest) + there
    if phase == "head":  # which is whole as it comes
        return max(reduced, w * _tables(shape, setup)[1])
    waits = phase in ("layers", "first") and came.filled and not came.largest  # one for which the bucket has no room
    return reduced + (w * tensor if waits else 0)


def _copied(shape: ModelShape, setup: Setup, tensor: int, share: int) -> int:
    """Elements of a large tensor that are copied together, as it lies in several ranks' shares and its first piece may
    be small. A table is the first or the last tensor of all: in several where it is larger than a share."""
    table = tensor == shape.embedding_parameters
    return 0 if table and (tensor <= share or (shape.tied and share > _bucket(shape, setup))) else tensor


def _norm(setup: Setup, elements: int) -> int:
    """Offloaded, of each tensor's share the norm is taken of a copy in twice as many bits."""
    return 2 * FP32 * elements if setup.offload != "none" else 0


def _parts(shape: ModelShape, setup: Setup) -> Iterator[tuple[Part, int]]:
    """(tensor, how many there are of it)."""
    for second, layers in shape.layer_kinds:
        yield from ((part, layers) for part in layer_parts(shape, setup, second))
    yield from ((part, 1) for part in outside_parts(shape, setup))


def sub_groups(shape: ModelShape, setup: Setup) -> list[int]:
    """Elements of a rank's shares that zero3 steps together: tensors in the model's order, until there are enough."""
    return _sub_groups(shape, replace(cutting_key(setup), world_size=setup.world_size))


def sub_group_size(shape: ModelShape, setup: Setup) -> int:
    """Elements at which DeepSpeed closes such a group."""
    return zero_settings.sub_group(-(-_largest_in_layers(shape, setup) // setup.world_size))


def _largest_in_layers(shape: ModelShape, setup: Setup) -> int:
    """Elements of the largest trained tensor of a decoder layer; 0 where none is trained."""
    trained = (p for second, _ in shape.layer_kinds for p in layer_parts(shape, setup, second) if p.trained)
    return max((_elements(p, setup.width) for p in trained), default=0)


@cache
def _sub_groups(shape: ModelShape, setup: Setup) -> list[int]:
    embedding, *last = outside_parts(shape, setup)
    layers = (part for second, n in shape.layer_kinds for part in n * list(layer_parts(shape, setup, second)))
    found, enough = [0], sub_group_size(shape, setup)
    for part in (embedding, *layers, *last):
        if part.trained:
            if found[-1] >= enough:
                found.append(0)
            found[-1] += -(-_elements(part, setup.width) // setup.world_size)
    return found


def _elements(part: Part, width: int) -> int:
    return part.bytes // (1 if part.coded else width)


def _cut(part: Part, width: int, gpus: int) -> int:
    return -(-_elements(part, width) // gpus) * (1 if part.coded else width)


def _persists(part: Part, width: int) -> bool:
    return _elements(part, width) <= zero_settings.PERSISTENCE


def _buffers(shape: ModelShape, setup: Setup) -> int:
    return sum(layers * layer_buffers(shape, setup, second) for second, layers in shape.layer_kinds)


def _gathered(shape: ModelShape, setup: Setup, parts: list[tuple[Part, int]]) -> dict[str, tuple[int, int]]:
    """Whole weights in each phase, and what of them is there once more. The head is whole around all, for the loss uses
    it; beside it is what is gathered ahead until max_live is reached, which the last tensor goes beyond. After the
    layers that is the embedding, where it is trained. Tensors that are gathered together are copied out of one buffer.
    """
    w, kinds = setup.width, [list(layer_parts(shape, setup, second)) for second, _ in shape.layer_kinds]
    cut = [p for layer in kinds for p in layer if not _persists(p, w)]
    table = w * shape.embedding_parameters
    head, embedding = table, table * (not shape.tied)
    again = embedding if setup.trains("embed_tokens") else 0
    live = 2 * max(sum(p.bytes for p in layer) for layer in kinds)
    layers = sum(n * p.bytes for p, n in parts if not _persists(p, w)) - head - embedding
    tensor = max((p.bytes for p in cut), default=0)
    ahead = min(live + tensor, layers)
    together = min(w * zero_settings.PREFETCH_BUCKET, live)
    start = max(embedding, min(embedding + layers, together + tensor))
    short = again if layers <= 2 * live + tensor else 0  # the last layers are whole still as the queue passes them
    reached = head + max(ahead, min(live + again, layers + again))
    copied = min(together + tensor, layers) if len(cut) > 1 else 0
    on_time = tensor if layers > live else 0  # the last layers' tensors, one by one
    return {
        "start": (head + start, start if start > embedding and cut else 0),
        "loss": (head + ahead + short, 0),
        "head": (head + ahead + short, 0),
        "layers": ((reached if shape.layers <= 2 else head + ahead + short) + on_time, copied),
        "first": (reached, copied),
        "embedding": (head + again, 0),
        "end": (head + again, 0),
    }
