"""Bytes on one GPU by component and phase, on the host, and on disk.

Every figure is a sum over named tensors of the engine, in the phase where most of them live at once.
GiB = 2^30 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from loadmaster.preflight.activations import layer_bytes
from loadmaster.preflight.coefficients import coefficients
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.plan import MemoryGib, PhasesGib
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import Matrix, ModelShape

LOSS_CHUNK_TOKENS = 1024
"""loadmaster.models.loss.CHUNK_TOKENS; a test holds the two equal."""


@dataclass(frozen=True)
class Bytes:
    """Peak of one GPU in the training step, by component."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    quantization: float = 0
    communication: float = 0
    context: float = 0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))

    def gib(self) -> MemoryGib:
        values = {f.name: round(getattr(self, f.name) / GIB, 4) for f in fields(self)}
        return MemoryGib(**values, total=round(self.total / GIB, 4))


@dataclass(frozen=True)
class Memory:
    train: Bytes
    phases: PhasesGib
    host_gib: float
    disk_gib: float

    @property
    def total_gib(self) -> float:
        return max(getattr(self.phases, f.name) for f in fields(self.phases))


def nf4_bytes(matrix: Matrix) -> int:
    """A matrix in nf4 with double quantization: 4 bits a weight, an 8-bit absmax per 64, fp32 per 256 of those."""
    blocks = -(-matrix.weight // 64)
    return -(-matrix.weight // 2) + blocks + 4 * -(-blocks // 256) + 64 + 1024 + 512 + (2 * matrix.outputs if matrix.bias else 0)


def weight_bytes(shape: ModelShape, setup: Setup) -> float:
    """The base model's weights, unsharded."""
    w = setup.width
    if setup.method == "qlora":
        quantized = shape.dense_layers * sum(map(nf4_bytes, shape.matrices()))
        quantized += shape.expert_layers * sum(map(nf4_bytes, shape.matrices(experts=True)))
        return quantized + w * (shape.parameters - shape.linear_weights)
    if setup.precision == "fp8" and setup.adapters:
        return shape.linear_weights * 1.0 + 2 * (shape.parameters - shape.linear_weights)
    return w * shape.parameters


def optimizer_bytes_per_parameter(setup: Setup) -> float:
    """States besides weight and gradient; the fp32 master copy where there is one."""
    states = {"adamw": 8.0, "adamw_bf16": 4.0, "adamw_8bit": 2 + 2 * 4 / 256, "paged_adamw_8bit": 0.0, "adafactor": 0.02}
    master = 4.0 if setup.master_weights and setup.precision != "fp32" else 0.0
    return states[setup.optimizer] + master


def train_bytes(shape: ModelShape, hardware: Hardware, setup: Setup) -> Bytes:
    w, n = setup.width, setup.tokens
    trainable = setup.trainable(shape)
    layer = layer_bytes(shape, setup)
    layer_weights = weight_bytes(shape, setup) / shape.layers

    adapters = w * trainable if setup.adapters else 0
    weights = (weight_bytes(shape, setup) + adapters) / setup.shards
    gradients = w * trainable / setup.gradient_shards
    optimizer = optimizer_bytes_per_parameter(setup) * trainable / setup.optimizer_shards
    if setup.offload != "none":
        optimizer = 0.0
    if setup.offload == "all":
        weights = gradients = 0.0

    chunk = min(n, LOSS_CHUNK_TOKENS)
    logits = chunk * shape.vocabulary_size * (6 + w) + n * shape.hidden_size * w
    if not setup.adapters:
        logits += 4 * shape.embedding_parameters
    boundary = n * shape.hidden_size * w
    if setup.checkpointing == "full":
        kept, inside = shape.layers * boundary, layer.kept + layer.backward
    else:
        kept, inside = shape.layers * layer.kept, layer.backward
    activations = kept + 2 * boundary + max(0, inside - logits)

    quantization = 0.0
    if setup.method == "qlora":
        largest = max(m.weight for m in shape.matrices())
        quantization = 2 * largest + 8 * largest / 64
    communication = 0.0
    if setup.shards > 1:
        communication = 4 * layer_weights + w * (shape.embedding_parameters + shape.head_parameters)
        if not setup.adapters:
            communication += 4 * shape.layer_parameters()
    if setup.world_size > 1:
        communication += coefficients()["communication"]["nccl_gib"]["value"] * GIB
    step = trainable * 4 / setup.optimizer_shards if setup.master_weights and setup.offload == "none" else 0.0
    activations = max(activations, step - logits)
    return Bytes(weights, gradients, optimizer, activations, logits, quantization, communication, context_bytes(hardware))


def context_bytes(hardware: Hardware) -> float:
    """What is taken outside the tensors: CUDA context and libraries' workspaces, or the process itself on a CPU."""
    table = coefficients()["context"]
    if hardware.is_cpu:
        return table["cpu_process_gib"]["value"] * GIB
    return (table["cuda_gib"]["value"] + table["cublas_workspace_gib"]["value"]) * GIB


def memory(shape: ModelShape, hardware: Hardware, setup: Setup) -> Memory:
    train = train_bytes(shape, hardware, setup)
    w, trainable = setup.width, setup.trainable(shape)
    load = train.weights + train.context + (2 * max(m.weight for m in shape.matrices()) if setup.method == "qlora" else 0)
    evaluate = train.weights + train.gradients * 0 + train.optimizer + train.logits + train.context + (
        setup.tokens * w * (4 * shape.intermediate_size + 4 * shape.hidden_size)
    )
    save = train.weights + train.optimizer + train.context
    export = train.context + (2 * shape.layer_parameters() if not hardware.is_cpu else w * shape.parameters)
    phases = PhasesGib(**{
        name: round(value / GIB, 4)
        for name, value in {
            "load": load, "train": train.total, "evaluate": evaluate, "save": save, "export": export,
        }.items()
    })
    state = (2 * trainable + 12 * trainable) / GIB
    host = 2 * shape.parameters / GIB / max(1, setup.shards) + 4
    if setup.offload != "none":
        host += (12 + 2) * trainable / GIB / max(1, setup.world_size // setup.gpus_per_node)
    if hardware.is_cpu:
        host = train.total / GIB
    disk = 2 * shape.parameters / GIB * 2 + 3 * state
    return Memory(train, phases, round(host, 2), round(disk, 2))
