"""A training step under real fully_shard, on one rank of a process group that only exists in name, without values.

PyTorch's FSDP2 (hooks, buffers, prefetch, padding) and the engine's modules run on the meta device with the "fake"
backend, so a rank of 64 is traced in seconds on a CPU. What meta tensors cannot have is replaced:
the collectives do nothing, the device handle is the CPU's (no streams), and parameters may stay on the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from loadmaster.config.schema import LoraConfig, OptimizerConfig, PreferenceConfig
from loadmaster.data import MicroBatch
from loadmaster.models import shards
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.frozen import freeze_linears, frozen_form
from loadmaster.models.preference import loss_module
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.training.in_backward import BackwardOptimizer
from loadmaster.training.sharding import FullyShard
from loadmaster.training.trace import Case, Live, _meta_model
from loadmaster.training.world import World


class Sharded(Live):
    """Counts storages as they are resized, too: that is how fully_shard frees and takes its buffers."""

    def resized(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.sizes:
            self.live += size - self.sizes[key]
            self.sizes[key] = size
            self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        from torch.distributed.tensor import DTensor

        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(function, types, args, kwargs)


class _Silent:
    """A collective that allocates its buffers, moves nothing and notes what it would have moved."""

    def __init__(self, moved: list[int]) -> None:
        self.moved = moved

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        self.moved.append(max(tensor.numel() * tensor.element_size() for tensor in (output_tensor, input_tensor)))


@contextlib.contextmanager
def world_of(size: int, replicas: int = 1) -> Iterator[Any]:
    """A mesh of `size` ranks of which this is the first; with replicas, of so many groups."""
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    group = "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup"
    torch.meta = torch.cpu  # fully_shard looks its device handle up as torch.<device type>
    try:
        with (
            mock.patch.object(_fully_shard, "_get_device_from_mesh", lambda mesh: torch.device("meta")),
            mock.patch(f"{group}._validate_no_meta_params"),
            mock.patch.object(_fsdp_collectives.dist, "all_reduce", lambda tensor, **_: None),
            mock.patch.object(torch.cpu.Stream, "record_event", lambda stream: object(), create=True),
            mock.patch.object(torch.accelerator, "current_stream", mock.Mock()),
            mock.patch.object(shards, "materialise"),
            mock.patch.object(shards, "fill"),
        ):
            if replicas == 1:
                yield init_device_mesh("cpu", (size,))
            else:
                yield init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replica", "shard"))
    finally:
        del torch.meta
        dist.destroy_process_group()


@contextlib.contextmanager
def counting(live: Sharded) -> Iterator[None]:
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = original(storage, size)
        live.resized(storage)
        return result

    torch.UntypedStorage.resize_ = resize_
    try:
        with live:
            yield
    finally:
        torch.UntypedStorage.resize_ = original


def sharded_model(
    config: dict[str, Any], method: str, precision: str, case: Case, mesh: Any, targets: Any,
    reshard_after_forward: bool = True, modules_to_save: tuple[str, ...] = (),
) -> tuple[FullyShard, nn.Module]:
    """The engine's strategy, and its model under its loss."""
    model = _meta_model(config)
    if form := frozen_form(method, precision):
        freeze_linears(model, form)
    if method != "full":
        names = targets if isinstance(targets, str) else list(targets)
        model = make_trainable(model, method, LoraConfig(targets=names, modules_to_save=list(modules_to_save)))
    checkpoint_activations(model, case.checkpointing, case.kept_layers)
    engine = object.__new__(FullyShard)  # its own settings for fully_shard; nothing is loaded
    engine.mesh, engine.plan = mesh, SimpleNamespace(
        offload="none", sharding="fsdp", reshard_after_forward=reshard_after_forward
    )
    engine.world = World(device=torch.device("meta"))
    engine.parameter_device, engine.folder, engine.dtype = torch.device("meta"), None, torch.bfloat16
    engine.gathered, engine.reduced = [], []  # bytes of each collective
    root = engine.wrap(loss_module(model, case.objective, PreferenceConfig()))
    for module in root.modules():
        if hasattr(module, "set_custom_all_gather"):
            module.set_custom_all_gather(_Silent(engine.gathered))
            module.set_custom_reduce_scatter(_Silent(engine.reduced))
    return engine, root


def sharded_peaks(
    config: dict[str, Any], method: str, precision: str, case: Case, world_size: int,
    targets: Any = "all-linear", replicas: int = 1, reshard_after_forward: bool = True, in_backward: bool = False,
    modules_to_save: tuple[str, ...] = (), optimizer: str = "adamw",
) -> tuple[int, int]:
    """(bytes of one rank's weights and buffers, peak bytes of a step's micro-batches besides those).

    Accumulated, the step has three micro-batches, so that one has others before and after it. Evaluated, there are two
    batches without gradients, of which the second finds whole what the first has left so. in_backward: a second
    step under `optimizer`, AdamW with master weights or another without, besides its states as well.
    """
    with world_of(world_size, replicas) as mesh:
        engine, root = sharded_model(
            config, method, precision, case, mesh, targets, reshard_after_forward, modules_to_save
        )
        live = Sharded()
        batch = micro_batch(case, method == "full")
        for tensor in [*root.parameters(), *root.buffers()]:
            live.count(tensor.to_local() if hasattr(tensor, "to_local") else tensor)
        weights = live.live
        if in_backward:
            config = OptimizerConfig(max_grad_norm=0.0)
            stepping = BackwardOptimizer(trainable(root), config, optimizer, optimizer == "adamw")
            for bucket in stepping.buckets:
                for tensor in bucket.targets:
                    live.count(tensor)
            for _ in range(2):
                before, live.peak = live.live, 0
                with counting(live):
                    stepping.begin(1e-3)
                    engine.backward(root(batch))
                    stepping.clip(0.0)
            return weights, live.peak - before
        with counting(live):
            if case.evaluated:
                root.eval()
                with torch.no_grad():
                    root(batch)
                    root(batch)
                return weights, live.peak - weights
            for _ in range(2 if case.accumulated else 0):
                with engine.accumulating(root):
                    engine.backward(root(batch))
            engine.backward(root(batch))
        return weights, live.peak - weights


def micro_batch(case: Case, whole: bool) -> MicroBatch:
    ids = torch.zeros(1, case.tokens, dtype=torch.long)
    documents = 1 if case.objective == "sft" else 2
    places = torch.arange(case.tokens) % (case.tokens // documents)
    desirable = torch.tensor([True, False]) if case.objective == "kto" else None
    known = {"dpo": (2,), "kto": (2, 2)}
    reference = torch.zeros(known[case.objective]) if whole and case.objective in known else None
    return MicroBatch(ids, ids, places[None], desirable, reference)


def step_bytes(
    config: dict[str, Any], method: str, case: Case, world_size: int, micro_batches: int, reshard_after_forward: bool
) -> tuple[int, int]:
    """(gathered, reduced) bytes of whole tensors in one optimizer step, after one that is warm-up."""
    with world_of(world_size) as mesh:
        engine, root = sharded_model(
            config, method, "bf16", case, mesh, "all-linear", reshard_after_forward
        )
        for _ in range(2):
            engine.gathered.clear()
            engine.reduced.clear()
            for index in range(micro_batches):
                with engine.accumulating(root) if index < micro_batches - 1 else contextlib.nullcontext():
                    engine.backward(root(micro_batch(case, method == "full")))
        return sum(engine.gathered), sum(engine.reduced)
