"""The Plan: what preflight decides, training obeys, the report prints, export and endpoint read.

One frozen dataclass is the pivot of the program. Nobody else decides a micro-batch, a sharding or a
dtype. Its JSON form is plan.json, a contract: fields may be added, none renamed or removed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadmaster.errors import LoadmasterError
from loadmaster.files import read_json, write_json

SCHEMA = 1
FIRST = {"time": "shortest run first", "cost": "cheapest run first", "memory": "least memory first"}
"""The order of other machines by plan.objective, in words."""


def rounded(figure: float | None, digits: int) -> float | None:
    """As a figure is written in plan.json; None where it is not known."""
    return None if figure is None else round(figure, digits)


@dataclass(frozen=True)
class ModelSummary:
    name: str
    parameters: int
    trainable_parameters: int
    layers: int
    hidden_size: int
    vocabulary_size: int
    family: str
    flops_per_token: float = 0.0
    """What the mathematics of a training step needs for one token, recomputation left out."""
    estimate: str | None = None
    """Why the figures are an estimate; None when the model's family is modelled exactly."""


@dataclass(frozen=True)
class HardwareSummary:
    gpu: str
    count: int
    nodes: int
    memory_gib: float
    """Usable memory of one GPU (of the host, for a CPU)."""
    host_memory_gib: float | None
    """Host memory of one node; None when not known."""


@dataclass(frozen=True)
class MemoryGib:
    """Peak of one GPU in some phase, by component; a plan's `memory_gib` is that of training. GiB = 2**30 bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    quantization: float
    communication: float
    context: float
    total: float


@dataclass(frozen=True)
class PhasesGib:
    """Peak of one GPU in each phase (loadmaster.preflight.phases says what each is)."""

    load: float
    train: float
    """The larger of the first step and a steady one."""
    evaluate: float
    save: float
    export: float
    """The largest of merge, quantize and verify."""
    first_step: float = 0.0
    steady_step: float = 0.0
    resume: float = 0.0
    merge: float = 0.0
    quantize: float = 0.0
    verify: float = 0.0


@dataclass(frozen=True)
class PeakGib:
    """The training peak of one GPU as three counters show it."""

    allocated: float
    """torch.cuda.max_memory_allocated."""
    reserved: float
    """torch.cuda.max_memory_reserved: with fragmentation."""
    device: float
    """The card's own count: reserved and the CUDA context."""


@dataclass(frozen=True)
class Plan:
    fits: bool
    model: ModelSummary
    hardware: HardwareSummary
    method: str
    precision: str
    sharding: str
    offload: str
    activation_checkpointing: str
    optimizer: str
    master_weights: bool
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    memory_gib: MemoryGib
    phases_gib: PhasesGib
    budget_gib: float
    host_memory_gib: float
    disk_gib: float
    tokens_per_second: float | None
    hours: float | None
    cost_usd: float | None
    reasons: list[str] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    replicas: int = 1
    """sharding fsdp over several nodes: groups of GPUs that each hold every shard (hybrid: the nodes); 1: one group."""
    reshard_after_forward: bool = True
    """sharding fsdp: layers are dropped after the forward pass and gathered again; False: whole until their backward,
    over all micro-batches of a step."""
    compile: bool = False
    """Decoder layers run compiled."""
    checkpointed_layers: int | None = None
    """activation_checkpointing full: so many of the first decoder layers, where the others are not; None: all."""
    learning_rate: float | None = None
    """At its peak: optimizer.lr, or what auto stands for (loadmaster.config.rates)."""
    optimizer_in_backward: bool = False
    """Each layer is stepped, and its gradients dropped, inside the backward pass (loadmaster.training.in_backward)."""
    peak_gib: PeakGib | None = None
    phase_components_gib: dict[str, MemoryGib] = field(default_factory=dict)
    """Each phase's peak by component."""
    trace: dict[str, Any] | None = None
    """With plan.trace: the peak of a traced step beside the replay's (loadmaster.training.trace); else None."""
    runners_up: list[dict[str, Any]] = field(default_factory=list)
    """Other plans that fit, best first, with what each would win or cost."""
    elsewhere: list[dict[str, Any]] = field(default_factory=list)
    """The same job, with this plan's method and optimizer, on every machine of the catalogue that holds it."""
    elsewhere_order: str | None = None
    """The plan.objective by which they are in order; None of a plan of before this was written."""
    price: dict[str, Any] | None = None
    """Dollars an hour with date and source; None where the machine is not rented."""
    basis: dict[str, str] = field(default_factory=dict)
    """Which figures are measured and which are modelled, and what they leave out."""
    verification: dict[str, Any] | None = None
    """Where the export's verification puts the largest model (loadmaster.preflight.verification): `fits`, `layers` on
    each GPU, in host memory and on disk, what is needed besides weights, what is moved, and whether that
    is `in_hours`: a job that ends before has none, nor has a CPU."""
    steps: int | None = None
    """Of the optimizer, which hours and dollars are of: max_steps, or an estimate by the size of the data; None where
    neither is known."""
    planned_with: str | None = None
    """Of a batch that does not divide over the GPUs: with which one all these figures are (`batch.global_size=18`)."""
    schema: int = SCHEMA

    @property
    def refusal(self) -> str | None:
        """Why there is no plan where memory is not why."""
        return self.refused and self.refused["reason"]

    @property
    def refused(self) -> dict[str, Any] | None:
        """The same with the `field` of the job that is why, and its `value`, if it is one."""
        is_why = self.rejected and not self.fits and not any(row["plan"] for row in self.rejected)
        return self.rejected[0] if is_why else None

    @property
    def has_figures(self) -> bool:
        """Whether settings and memory are those of a plan: of what is refused whatever its memory they are not."""
        return self.planned_with is not None or self.refusal is None

    @property
    def kept_layers(self) -> int:
        """Of the last decoder layers, how many keep their activations beside others that are checkpointed."""
        return 0 if self.checkpointed_layers is None else self.model.layers - self.checkpointed_layers

    @property
    def world_size(self) -> int:
        return self.hardware.count * self.hardware.nodes

    @property
    def trained(self) -> str:
        """The folder of the run directory in which what was trained lies."""
        return "model" if self.method == "full" else "adapter"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, path: Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Plan:
        return cls(
            **{
                **value,
                "model": ModelSummary(**value["model"]),
                "hardware": HardwareSummary(**value["hardware"]),
                "memory_gib": MemoryGib(**value["memory_gib"]),
                "phases_gib": PhasesGib(**value["phases_gib"]),
                "phase_components_gib": {
                    name: MemoryGib(**parts) for name, parts in (value.get("phase_components_gib") or {}).items()
                },
                "peak_gib": PeakGib(**value["peak_gib"]) if value.get("peak_gib") else None,
            }
        )

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises LoadmasterError for a file that holds no plan: a command that makes plans makes it anew."""
        try:
            return cls.from_dict(read_json(path))
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            fix = "the command that began this run makes it anew"
            raise LoadmasterError(f"{path} holds no plan that can be read ({error}): {fix}") from error
