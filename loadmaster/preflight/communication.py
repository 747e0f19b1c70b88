"""Seconds that GPUs spend telling each other things in a step, and how much of that compute does not hide.

    ring collective of B bytes over n nodes of g GPUs     W = n g
        inside a node      B (W - 1) / W / link           each GPU's own link, one direction
        between nodes      B (n - 1) / n / network        of a whole node: its GPUs' rings cross it side by side
        seconds = the slower of the two + hops x latency
    all-reduce = reduce-scatter + all-gather

    fsdp          each micro-batch: gather the weights forward and the layers' again backward, reduce the trained
                  gradients (fp32); where layers stay whole (reshard_after_forward false), gather once a step.
                  Passes without gradients (DPO's, KTO's) gather, too, but for the head, and where the embedding is in
                  the root FSDP2 then prefetches what ran last, in vain
    hybrid        the same inside each node; then the shards' gradients are summed over nodes (fp32)
    ddp           the last micro-batch of a step: all-reduce of the gradients in the weights' dtype
    zero3         fsdp
    zero1, zero2  all-reduce of the gradients in fp32, once a step (zero1) or each micro-batch (zero2), and a gather of
                  the trained weights after the step; DeepSpeed's default hides none of it behind compute

Overlap: layers' collectives run beside the compute of their own pass, so the longer of the two is what one waits for,
and a share of the shorter (they compete for memory and for SMs). Nothing hides the first gather (of root, embedding and
first layer) and the last reduction (of root and embedding).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import UNKNOWN_NETWORK_GBPS, Hardware
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import REDUCE_BYTES, whole
from loadmaster.preflight.shards import units as fsdp_units
from loadmaster.preflight.weights import base_bytes
from loadmaster.preflight.zero_settings import reduce_bucket

DDP_BUCKET_BYTES = 25e6
"""Gradients that are reduced together: DistributedDataParallel's default (bucket_cap_mb)."""
BACKWARD_SHARE = 2 / 3
"""Of a micro-batch's compute: two of its three products are the backward pass's."""


@dataclass(frozen=True)
class Collectives:
    """Bytes of whole tensors that are gathered and reduced in one optimizer step."""

    gathered: float = 0.0
    reduced: float = 0.0


def collective_seconds(bytes_: float, count: float, gpus: int, nodes: int, hardware: Hardware) -> float:
    """`count` gathers or reductions of `bytes_` in all, over `nodes` nodes of `gpus` GPUs each."""
    world = gpus * nodes
    if world == 1 or not bytes_:
        return 0.0
    inside = 0.0
    if gpus > 1:
        inside = bytes_ * (world - 1) / world / (hardware.link_gb_per_s * 1e9 * value("efficiency", "link"))
    between = 0.0
    if nodes > 1:
        network = (hardware.network_gbps or UNKNOWN_NETWORK_GBPS) * 1e9 / 8 * value("efficiency", "network")
        between = bytes_ * (nodes - 1) / nodes / network
    hops = nodes * (gpus - 1) * value("latency", "link_us") + (nodes - 1) * value("latency", "network_us")
    return max(inside, between) + count * (value("latency", "collective_us") + hops) * 1e-6


def step_traffic(shape: ModelShape, setup: Setup) -> Collectives:
    """What a step moves, all micro-batches."""
    trained, repeats = setup.trainable(shape), setup.gradient_accumulation_steps
    if setup.world_size == 1:
        return Collectives()
    setup = _as_fsdp(setup)
    if setup.shards > 1:
        unit, units = whole(shape, setup), fsdp_units(shape, setup)
        once = sum(each.gathered for each in units.outside)
        again = vain = 0
        if setup.forwards and units.embedding:
            again = setup.forwards * units.embedding.gathered
        elif setup.forwards:
            vain = (units.head or units.layers[shape.is_second(shape.layers - 1)]).gathered
        each_time = _passes(setup) * (unit.gathered - once) + once + again
        gathered = unit.gathered if setup.keeps_weights else repeats * each_time
        return Collectives(gathered + vain * (1 if setup.keeps_weights else repeats), repeats * unit.reduced)
    if setup.stage:
        return Collectives(setup.width * trained, (1 if setup.stage == 1 else repeats) * REDUCE_BYTES * trained)
    gradients = setup.width * trained
    return Collectives(gradients, gradients)


def step_communication(shape: ModelShape, hardware: Hardware, setup: Setup, micro_batch_s: float) -> float:
    """Seconds that the collectives of a step add to its compute; micro_batch_s: compute of one micro-batch."""
    if setup.world_size == 1:
        return 0.0
    setup = _as_fsdp(setup)
    sent = step_traffic(shape, setup)
    gpus, nodes = setup.gpus_per_node, setup.nodes
    if setup.shards > 1:
        return _fsdp_seconds(shape, hardware, setup, sent, micro_batch_s)
    if setup.stage:
        buckets = max(1.0, sent.reduced / (REDUCE_BYTES * reduce_bucket(setup.trainable(shape))))
        seconds = 2 * collective_seconds(sent.reduced, buckets, gpus, nodes, hardware)
        return seconds + collective_seconds(sent.gathered, 1, gpus, nodes, hardware)
    buckets = max(1.0, sent.reduced / setup.gradient_accumulation_steps / DDP_BUCKET_BYTES)
    return _waited(2 * collective_seconds(sent.reduced, buckets, gpus, nodes, hardware), BACKWARD_SHARE * micro_batch_s)


def _fsdp_seconds(
    shape: ModelShape, hardware: Hardware, setup: Setup, sent: Collectives, micro_batch_s: float
) -> float:
    gpus, nodes, inner = setup.gpus_per_node, setup.nodes, 1 if setup.replicas > 1 else setup.nodes
    outside = len(fsdp_units(shape, setup).outside)
    repeats, units = setup.gradient_accumulation_steps, shape.layers + outside
    gathers = units / repeats if setup.keeps_weights else _passes(setup) * shape.layers + outside
    seconds = collective_seconds(sent.gathered / repeats, gathers, gpus, inner, hardware)
    seconds += collective_seconds(sent.reduced / repeats, units, gpus, inner, hardware)
    if setup.replicas > 1:
        shard = 2 * sent.reduced / repeats / setup.shards
        seconds += collective_seconds(shard * gpus, 2 * units, 1, nodes, hardware)
    seconds += _host_seconds(shape, hardware, setup)
    open_s = _unhidden(shape, hardware, setup, gpus, inner)
    return repeats * (_waited(max(0.0, seconds - open_s), micro_batch_s) + open_s)


def _waited(sent_s: float, compute_s: float) -> float:
    """Seconds that collectives add to the compute that they run beside."""
    return max(0.0, sent_s - compute_s) + value("efficiency", "exposed_collectives") * min(sent_s, compute_s)


def _passes(setup: Setup) -> int:
    """Through the layers, in each micro-batch."""
    return 2 + setup.forwards


def _as_fsdp(setup: Setup) -> Setup:
    """zero3 moves what fsdp over all GPUs does."""
    return replace(setup, sharding="fsdp", replicas=1) if setup.stage == 3 else setup


def _unhidden(shape: ModelShape, hardware: Hardware, setup: Setup, gpus: int, nodes: int) -> float:
    """First gather and last reduction of a micro-batch."""
    units = fsdp_units(shape, setup)
    ends = [each for each in units.outside if each is not units.head]
    first = [units.layers[shape.layer_kinds[-1][0]], *ends]
    seconds = collective_seconds(sum(each.gathered for each in first), len(first), gpus, nodes, hardware)
    seconds /= setup.gradient_accumulation_steps if setup.keeps_weights else 1
    return seconds + collective_seconds(sum(each.reduced for each in ends), len(ends), gpus, nodes, hardware)


def _host_seconds(shape: ModelShape, hardware: Hardware, setup: Setup) -> float:
    """Shards in host memory come up for each gathering, and gradients go down, in one micro-batch."""
    if setup.offload != "all" or hardware.is_cpu:
        return 0.0
    shard = base_bytes(shape, setup.method, setup.precision) / setup.shards
    gradients = setup.width * setup.trainable(shape) / setup.shards
    return (_passes(setup) * shard + gradients) / (hardware.host_gb_per_s * 1e9 * value("efficiency", "host_link"))
