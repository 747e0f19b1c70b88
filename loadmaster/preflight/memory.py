"""Bytes on one GPU by component and phase, on the host, and on disk. GiB = 2^30 bytes.

    peak of training = max( weights + optimizer + gradients so far + replayed micro-batch,     (forward and backward)
                            weights + optimizer + all gradients + what the step itself takes )  (optimizer step)
                       + CUDA context and workspaces + what other GPUs need

The micro-batch is replayed allocation by allocation (step.py), under fully_shard with its buffers (units.py, shards.py;
equal to traces of it); what DeepSpeed holds is counted (zero.py). DDP holds gradients twice: its buckets beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from loadmaster.preflight import dora
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import GIB, Hardware
from loadmaster.preflight.pinned import in_pieces
from loadmaster.preflight.plan import MemoryGib, PeakGib
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.shards import whole
from loadmaster.preflight.step import Replayed, evaluation_batch, replay_key, training_step
from loadmaster.preflight.trained import factored_bytes, on_host_bytes, rounded_bytes, widened_bytes
from loadmaster.preflight.weights import base_bytes
from loadmaster.preflight.zero import ZeroBytes, zero_bytes


@dataclass(frozen=True)
class Bytes:
    """Peak of one GPU in some phase, by component."""

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
    phases: dict[str, float]
    """GiB of one GPU in each of `phases_in_training`."""
    peak: PeakGib
    host_gib: float

    @property
    def needed_gib(self) -> float:
        """Of one GPU, over the phases that run in training."""
        return max(self.phases.values())


EIGHT_BIT_STATES = 2 * (1 + 4 / 256)
"""Two moments of a byte, each with an fp32 scale for every 256 (bitsandbytes)."""
STATE_BYTES = {
    "adamw": 8.0,
    "adamw_bf16": 4.0,
    "adamw_8bit": EIGHT_BIT_STATES,
    "paged_adamw_8bit": EIGHT_BIT_STATES,
    "adafactor": 0.004,
}
"""Of each trainable parameter, without masters. Adafactor's are a row and a column in fp32: of a matrix 2,048 wide."""


def state_bytes(setup: Setup) -> float:
    """Optimizer states for each trainable parameter, the fp32 master copy included."""
    return STATE_BYTES[setup.optimizer] + (4.0 if setup.master_weights and setup.precision != "fp32" else 0.0)


def step_bytes(shape: ModelShape, setup: Setup, made: float = 0.0) -> float:
    """What the optimizer step takes besides states and gradients; those states, too, of which an element gets `made`
    bytes as it is stepped, in the first step."""
    states = made * resident(shape, setup)[2]
    if setup.stage:
        return zero_bytes(shape, setup).step + states
    if setup.in_backward:
        return states  # the replay has the rest
    if setup.optimizer == "adafactor":
        return factored_bytes(shape, setup) + states
    if setup.rounds:
        return rounded_bytes(shape, setup, made)
    if setup.master_weights and setup.width == 2 and setup.offload == "none":
        return widened_bytes(shape, setup, made)
    return states


def train_bytes(shape: ModelShape, hardware: Hardware, setup: Setup) -> Bytes:
    """The larger of the backward pass's peak and the optimizer step's."""
    return max(backward_and_step_bytes(shape, hardware, setup), key=lambda b: b.total)


def backward_and_step_bytes(
    shape: ModelShape, hardware: Hardware, setup: Setup, first: bool = False
) -> tuple[Bytes, Bytes]:
    """Peaks of the two halves of a steady step: forward and backward, and the optimizer step. In the first one masters
    are there, and moments come as a parameter is stepped."""
    weights, gradients, local = resident(shape, setup)
    weights += setup.width * local if hardware.is_cpu else 0.0  # the rehearsal's copy, which is on the host
    optimizer = zero_bytes(shape, setup).states if setup.stage else state_bytes(setup) * local
    if setup.states_on_host and not hardware.is_cpu:
        optimizer = 0.0
    masters = min(optimizer, 4.0 * local * setup.master_weights * (setup.width == 2)) if first else optimizer
    made = (optimizer - masters) / local if local else 0.0
    replayed, static = worst_micro_batch(shape, setup, made=made)
    if setup.offload == "all" and not setup.stage and not hardware.is_cpu:
        weights = gradients = static = 0.0
    at = replayed.at_peak
    communication, context = communicator_bytes(hardware), context_bytes(hardware)
    reducing = 0.0
    if setup.sharding == "ddp":
        communication += gradients
    elif setup.stage:
        zero = zero_bytes(shape, setup)
        communication += zero.kept
        (at, reducing), gradients = zero_peak(replayed, zero), 0.0 if setup.stage < 3 else zero.gradients
        static += min(0.0, reducing)  # zero2's gradients are not there before the first sum
        reducing = max(0.0, reducing)
        if hardware.is_cpu:
            reducing += max(0.0, zero.host - optimizer)
    backward = Bytes(
        weights=weights,
        gradients=static + at["gradients"],
        optimizer=masters + at["optimizer"],
        activations=at["activations"],
        logits=at["logits"],
        quantization=at["quantization"],
        communication=at["communication"] + communication + reducing,
        context=context,
    )
    stepped_here = setup.offload == "none" or setup.stage or hardware.is_cpu
    step = Bytes(
        weights=weights,
        gradients=gradients + (step_bytes(shape, setup, made) - made * local if stepped_here else 0.0),
        optimizer=optimizer,
        communication=communication,
        context=context,
    )
    return backward, step


def zero_peak(replayed: Replayed, zero: ZeroBytes) -> tuple[dict[str, int], float]:
    """(the replay, what DeepSpeed has besides) in the part of a micro-batch in which both together are most."""
    nothing = dict.fromkeys(replayed.at_peak, 0)
    parts = {"start": nothing, **replayed.phases}
    found = [(parts[name], more) for name, more in zero.phases.items() if name in parts]
    return max(found, key=lambda part: sum(part[0].values()) + part[1])


def worst_micro_batch(
    shape: ModelShape, setup: Setup, in_place: bool = True, made: float = 0.0
) -> tuple[Replayed, float]:
    """(the micro-batch of a step that needs most, bytes of gradients that were there before it).

    made: bytes of states that an element gets as it is stepped, in the first step.

    With several, it is one that finds the gradients of others; but where layers stay whole, the first may need more,
    for it gathers them.
    """
    if setup.stage > 1:  # a gradient is reduced and let go as it comes
        return training_step(shape, replay_key(setup, keep=True), in_place), zero_bytes(shape, setup).gradients
    found = []
    if setup.gradient_accumulation_steps == 1 or setup.keeps_weights:
        made = made if setup.in_backward else 0.0
        found.append((training_step(shape, replay_key(setup, keep=False), in_place, made), 0.0))
    if setup.gradient_accumulation_steps > 1:
        found.append((training_step(shape, replay_key(setup, keep=True), in_place), resident(shape, setup)[1]))
    return max(found, key=lambda pair: pair[0].peak + pair[1])


def resident(shape: ModelShape, setup: Setup) -> tuple[float, float, float]:
    """(weights, gradients, trained elements) of one GPU: bytes, bytes, elements whose optimizer states it has."""
    width, trainable = setup.width, setup.trainable(shape)
    if setup.stage:
        zero = zero_bytes(shape, setup)
        return zero.weights, zero.gradients, zero.share
    kept = 0 if setup.in_backward else 1  # gradients go within the backward pass that makes them
    if setup.shards > 1:
        unit = whole(shape, setup)
        return unit.shard + unit.replicated, kept * unit.trained_shard, unit.trained_shard / width
    trained = width * trainable + dora.beyond_width(shape, setup)
    base = base_bytes(shape, setup.method, setup.precision) + (trained if setup.adapters else 0)
    return base, kept * trained, trainable


def communicator_bytes(hardware: Hardware) -> float:
    """Of NCCL; gloo's are a few MiB of the process."""
    several = hardware.world_size > 1 and not hardware.is_cpu
    return value("communication", "nccl_gib") * GIB if several else 0.0


def context_bytes(hardware: Hardware) -> float:
    """What is taken besides tensors: CUDA context and libraries' workspaces, or the process itself on a CPU."""
    if hardware.is_cpu:
        return value("context", "cpu_process_gib") * GIB
    return (value("context", "cuda_gib") + value("context", "cublas_workspace_gib")) * GIB


def memory(shape: ModelShape, hardware: Hardware, setup: Setup) -> Memory:
    phases = phases_in_training(shape, hardware, setup)
    train = phases["train"]
    host = train.total * setup.gpus_per_node if hardware.is_cpu else host_bytes(shape, setup)
    return Memory(
        train,
        {name: round(part.total / GIB, 4) for name, part in phases.items()},
        peaks(hardware, train.total),
        round(host / GIB, 2),
    )


def phases_in_training(shape: ModelShape, hardware: Hardware, setup: Setup) -> dict[str, Bytes]:
    """Peak of one GPU by component while a model is loaded, trained, evaluated by its loss, and saved."""
    train = train_bytes(shape, hardware, setup)
    gradients, buffers = kept_bytes(shape, hardware, setup)
    rests = Bytes(  # between two steps
        weights=train.weights,
        gradients=gradients,
        optimizer=train.optimizer,
        communication=communicator_bytes(hardware) + buffers,
        context=train.context,
    )
    batch = evaluation_batch(shape, setup).at_peak
    gathered = gathered_forward(shape, setup, sum(batch.values()))
    evaluated = replace(
        rests,
        activations=batch["activations"],
        logits=batch["logits"],
        quantization=batch["quantization"],
        communication=rests.communication + batch["communication"] + gathered,
    )
    load = Bytes(weights=train.weights, quantization=load_bytes(shape, setup), context=train.context)
    return {"load": load, "train": train, "evaluate": evaluated, "save": rests}


def kept_bytes(shape: ModelShape, hardware: Hardware, setup: Setup) -> tuple[float, float]:
    """(gradients, buffers) that DeepSpeed keeps between two steps: zero3 both; what is offloaded a buffer, and on a CPU
    all that is on the host."""
    if not setup.stage:
        return 0.0, 0.0
    zero = zero_bytes(shape, setup)
    on_host = max(0.0, zero.host - zero.states) if hardware.is_cpu else 0.0
    return zero.gradients if setup.stage == 3 else 0.0, zero.kept + on_host


def gathered_forward(shape: ModelShape, setup: Setup, batch: float) -> float:
    """Whole weights under zero3 while a batch of so many bytes runs without gradients, or before it, where they are
    more than both; fully_shard's are in the replay."""
    if setup.stage != 3:
        return 0.0
    phases = zero_bytes(shape, setup).phases
    return max(phases["loss"], phases["start"] - batch)


def load_bytes(shape: ModelShape, setup: Setup) -> float:
    """Beside the weights while they are read: a quantized matrix in bf16 and in fp32; under DoRA, peft's first values
    of a matrix: B A, that scaled, and the sum."""
    largest = max(m.weight for m in shape.all_matrices)
    if setup.adapters and setup.dora:
        return 3 * setup.width * largest
    return 0 if setup.frozen_form is None else 6 * largest


def peaks(hardware: Hardware, total: float) -> PeakGib:
    """The same peak as torch counts it (allocated, reserved) and as the card shows it (device)."""
    outside = 0.0 if hardware.is_cpu else value("context", "cuda_gib") + communicator_bytes(hardware) / GIB
    allocated = total / GIB - outside
    reserved = allocated * (1 + (0.0 if hardware.is_cpu else value("fragmentation", "share")))
    return PeakGib(round(allocated, 4), round(reserved, 4), round(reserved + outside, 4))


def host_bytes(shape: ModelShape, setup: Setup) -> float:
    """Of one node with GPUs. Weights stream to the GPU file by file.

    What is trained is copied once in the rehearsal; offloaded states and weights are there besides. A checkpoint is
    copied to the host only where there is room for it (loadmaster.training.staging). What is pinned takes powers of
    two (pinned.py): under offload=all weights and gradients; states and what is offloaded with them alone is not.
    """
    trained = resident(shape, setup)[2]
    states = state_bytes(setup) * trained
    each = value("context", "host_process_gib") * GIB + setup.width * trained
    if setup.stage:
        each += zero_bytes(shape, setup).pinned_host
    elif setup.offload == "all":
        unit = whole(shape, setup)
        each += states + unit.trained_pinned + unit.pinned + unit.replicated + on_host_bytes(shape, setup)
    elif setup.offload == "optimizer":
        each += states + setup.width * trained + on_host_bytes(shape, setup)
    elif setup.optimizer == "paged_adamw_8bit":
        each += states
    if setup.checkpointing == "offload":
        each += shape.layers * in_pieces(inputs_bytes(shape, setup) // shape.layers)
    return each * setup.gpus_per_node


def inputs_bytes(shape: ModelShape, setup: Setup) -> int:
    """Of all decoder layers' inputs in one micro-batch: what activation_checkpointing=offload keeps on the host."""
    return setup.width * setup.tokens * shape.hidden_size * shape.layers
