"""One candidate way to train: everything that memory and speed depend on besides model and hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadmaster.preflight import saved
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.weights import frozen_form
from loadmaster.preflight.zero_settings import ZERO


def sharding_words(plan: Any) -> str:
    """How a Setup's or a Plan's model is spread, as it is shown: `fsdp inside each node`."""
    inside = " inside each node" if plan.replicas > 1 else ""
    whole = "" if plan.reshard_after_forward else ", layers whole until their backward pass"
    return f"{plan.sharding}{inside}{whole}"


@dataclass(frozen=True)
class Setup:
    method: str
    precision: str
    """Compute dtype: bf16, fp8 (frozen weights in fp8 for adapters) or fp32."""
    optimizer: str
    master_weights: bool
    sharding: str = "none"
    replicas: int = 1
    """fsdp on several nodes: groups of GPUs that hold all shards between them (hybrid sharding); 1 or the nodes."""
    reshard_after_forward: bool = True
    """fsdp: a layer's gathered weights are dropped after its forward pass and gathered again for the backward one."""
    offload: str = "none"
    checkpointing: str = "none"
    kept_layers: int = 0
    """Under full checkpointing: of the last decoder layers, so many keep their activations all the same."""
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    sequence_length: int = 2048
    compiled: bool = False
    forwards: int = 0
    """Passes without gradients of each micro-batch, besides its own: what a preference objective compares with."""
    world_size: int = 1
    gpus_per_node: int = 1
    lora_rank: int = 16
    lora_targets: Any = "all-linear"
    """As in the job; a list is given as a tuple."""
    lora_dropout: float = 0.0
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    objective: str = "sft"
    in_backward: bool = False
    """The optimizer steps each layer inside the backward pass."""

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one GPU."""
        return self.micro_batch_size * self.sequence_length

    @property
    def global_size(self) -> int:
        """Rows of a step, over all GPUs."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.gpus_per_node)

    @property
    def width(self) -> int:
        """Bytes of an activation: 2 in bf16, 4 in fp32."""
        return 4 if self.precision == "fp32" else 2

    @property
    def rounds(self) -> bool:
        """Whether weights are stepped in fp32 a part at a time and rounded stochastically (training/rounding.py)."""
        return self.width == 2 and not self.master_weights and self.optimizer != "adamw_bf16" and not self.stage

    @property
    def rounds_masters(self) -> bool:
        """Whether what fp32 masters are is rounded so; adapters take the nearest, modules beside them do not."""
        whole = not self.adapters or bool(self.modules_to_save)
        return self.width == 2 and self.master_weights and whole and not self.stage

    def layers_kept(self, shape: ModelShape) -> int:
        """Decoder layers that keep all that their backward pass reads."""
        return shape.layers if self.checkpointing == "none" else self.kept_layers

    def checkpointed_layers(self, shape: ModelShape) -> int | None:
        """Of the first decoder layers those that are checkpointed, where the others are not; None: all or none."""
        return shape.layers - self.kept_layers if self.kept_layers else None

    @property
    def states_on_host(self) -> bool:
        """Whether optimizer states are in host memory: offloaded, or in managed memory, but for the pages in use."""
        return self.offload != "none" or self.optimizer == "paged_adamw_8bit"

    @property
    def adapters(self) -> bool:
        return self.method != "full"

    @property
    def passes_first(self) -> bool:
        """Whether a micro-batch has a pass without gradients before its own (models/preference.py)."""
        return self.objective == "kto" or (self.objective == "dpo" and self.adapters)

    @property
    def frozen_form(self) -> str | None:
        """The format of a quantized base; None where there is none."""
        return frozen_form(self.method, self.precision)

    @property
    def shards(self) -> int:
        """Over how many GPUs fully_shard spreads weights, gradients and optimizer states."""
        return self.world_size // self.replicas if self.sharding == "fsdp" else 1

    @property
    def spreads_weights(self) -> bool:
        """Whether no GPU holds all weights: each forward pass gathers them."""
        return self.shards > 1 or self.stage == 3 or self.offload == "all"

    @property
    def keeps_weights(self) -> bool:
        """Whether fully_shard leaves layers whole between their forward and their backward pass."""
        return self.shards > 1 and not self.reshard_after_forward

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without it."""
        return ZERO.get(self.sharding, 0)

    @property
    def state_shards(self) -> int:
        """Over how many GPUs optimizer states are spread, by fully_shard or DeepSpeed."""
        return self.world_size if self.stage else self.shards

    def trainable(self, shape: ModelShape) -> int:
        if not self.adapters:
            return shape.parameters
        beside = saved.parameters(shape, self.modules_to_save)
        return shape.lora_parameters(self.lora_rank, self.lora_targets, self.dora) + beside

    def magnitudes(self, shape: ModelShape) -> int:
        """Of them, DoRA's, which are in fp32."""
        args = self.lora_rank, self.lora_targets
        return shape.lora_parameters(*args, True) - shape.lora_parameters(*args) if self.adapters and self.dora else 0

    def trains(self, module: str) -> bool:
        """Whether the weight of a module that no adapter is put on is trained: an embedding, the head, a norm."""
        return not self.adapters or module in self.modules_to_save
