"""Activation checkpointing: what the backward pass finds kept, and what it makes again.

    none       everything that the backward pass reads is kept
    selective  of each decoder layer: its input, attention, and products over at least WIDE inputs; norms, activations,
               rotary embeddings, dequantized weights and adapters' second products are made again
    full       of each decoder layer its input; the last `kept_layers` keep everything: the backward pass begins with
               them, and is through with what they keep when the others make theirs again
    offload    full, with those inputs in pinned host memory, copied beside the layers that run meanwhile; where a
               micro-batch has more than MLP_TOKENS, its MLPs run (and are made again once more) by pieces of so many

(FlexAttention, compiled by itself beside eager layers, is made again under selective too: capped.py.)

Selective is torch.utils.checkpoint's policy by operation. What is kept is what costs most to make again for each byte
it takes: an element of a product over K inputs costs 2 K FLOPs and 2 bytes, so that on cards of the day, with about
300 dense bf16 FLOPs for each byte of bandwidth, remaking it is cheaper than its traffic below some hundred inputs.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from loadmaster.config.job_rules import MLP_TOKENS
from loadmaster.models.forward import causal_lm, decoder_layers
from loadmaster.preflight.frozen import WIDE
from loadmaster.preflight.pinned import PIECE_BYTES


def checkpoint_activations(model: nn.Module, mode: str, kept_layers: int = 0) -> None:
    """Set how a model's decoder layers are checkpointed; the mode before is undone. Before they are compiled.

    kept_layers: of the last layers, so many are not, under full.
    """
    lm = causal_lm(model)
    if lm.is_gradient_checkpointing:
        lm.gradient_checkpointing_disable()
    if mode in ("full", "offload"):
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lm.disable_input_require_grads()  # of a frozen embedding, which reentrant checkpoints alone need
        lm.get_decoder().train()
        for layer in decoder_layers(model)[::-1][:kept_layers]:
            layer.gradient_checkpointing = False
    layers = getattr(lm.get_decoder(), "layers", [])
    for layer in layers:
        for module in filter(None, (layer, getattr(layer, "mlp", None))):
            if getattr(module.__dict__.get("forward"), "__func__", None) in (_selective, _pieces):
                del module.forward
    if mode == "selective":
        for layer in decoder_layers(model):
            layer.forward = MethodType(_selective, layer)
    if mode == "offload":
        host = HostMemory()
        for layer in decoder_layers(model):
            layer._gradient_checkpointing_func = host.checkpoint
            if not hasattr(getattr(layer, "mlp", None), "experts") and hasattr(layer, "mlp"):
                layer.mlp.forward = MethodType(_pieces, layer.mlp)


def checkpoint_the_rest(model: nn.Module) -> None:
    """Under full, the layers that were left out too; compiled ones stay compiled."""
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = True


def _selective(layer: nn.Module, *inputs: Any, **settings: Any) -> Any:
    """The layer's own forward, checkpointed by operation."""
    forward = partial(type(layer).forward, layer)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_contexts, **settings)


def _pieces(mlp: nn.Module, hidden: Tensor) -> Tensor:
    """An MLP's own forward over pieces of its tokens [1, N, h], each made again by itself in the backward pass."""
    forward = partial(type(mlp).forward, mlp)
    if hidden.shape[1] <= MLP_TOKENS:
        return forward(hidden)
    parts = hidden.split(MLP_TOKENS, dim=1)
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in parts], dim=1)


class HostMemory:
    """Keeps checkpointed layers' inputs in pinned host memory; copies run on a stream of their own.

    An input's memory on the device is free for others once its copy is there. In the backward pass the input of the
    layer before is fetched while a layer runs. (A model that is yet to be sharded is on the meta device: what is
    copied tells the device.)
    """

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None
        """Of the first input that came from a GPU on."""
        self.held: list[weakref.ref[_Held]] = []
        """In the order of the forward pass; the graph alone keeps them, and takes them with it."""

    def checkpoint(self, function: Any, *inputs: Any) -> Any:
        """torch.utils.checkpoint of `function`; what it saves here is nothing but its inputs."""
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            return checkpoint(function, *inputs, use_reentrant=False)

    def pack(self, tensor: Tensor) -> Any:
        if not tensor.numel():
            return tensor
        if tensor.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(tensor.device)
        copies = [] if tensor.is_meta else host_pieces(tensor, pinned=tensor.is_cuda)
        if self.stream is None:
            _copy(copies, tensor.detach(), to_host=True)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self.stream):
                _copy(copies, tensor.detach(), to_host=True)
            tensor.record_stream(self.stream)
        kept = _Held(copies, tensor)
        self.held.append(weakref.ref(kept))
        return kept

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        here, kept.here = kept.here, None
        if self.stream is not None:
            current = torch.cuda.current_stream(kept.device)
            current.wait_event(kept.arrived)
            here.record_stream(current)
        while self.held and self.held.pop()() is not kept:  # later ones were asked for before
            pass
        before = self.held[-1]() if self.held else None
        if before is not None:
            self._fetch(before)
        return here

    def _fetch(self, kept: _Held) -> None:
        if kept.here is not None:
            return
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            kept.here = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
            _copy(kept.host, kept.here, to_host=False)
            if self.stream is not None:
                kept.arrived = self.stream.record_event()


def host_pieces(tensor: Tensor, pinned: bool) -> list[Tensor]:
    """Host memory for a tensor's elements, in pieces whose bytes are powers of two, and a rest.

    PyTorch takes pinned memory by powers of two: in one piece, 2.6 GiB would take 4.
    """
    width, left = tensor.element_size(), tensor.nbytes
    sizes = []
    while left > PIECE_BYTES:
        sizes.append(2 ** (left.bit_length() - 1))
        left -= sizes[-1]
    sizes += [left] * (left > 0)
    return [torch.empty(size // width, dtype=tensor.dtype, pin_memory=pinned) for size in sizes]


def _copy(pieces: list[Tensor], tensor: Tensor, to_host: bool) -> None:
    if not pieces:
        return
    for piece, part in zip(pieces, tensor.reshape(-1).split([len(piece) for piece in pieces]), strict=True):
        source, target = (part, piece) if to_host else (piece, part)
        target.copy_(source, non_blocking=True)


class _Held:
    """One input: its pieces on the host (none in a trace on the meta device), and on the device once it was fetched."""

    def __init__(self, host: list[Tensor], tensor: Tensor):
        self.host, self.shape, self.dtype, self.device = host, tensor.shape, tensor.dtype, tensor.device
        self.here: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *arguments: Any, **__: Any) -> CheckpointPolicy:
    name = operation.name() if isinstance(operation, torch._ops.OperatorBase) else ""
    inputs = arguments[PRODUCTS[name]].shape[-1] if name in PRODUCTS else 0
    kept = name in ATTENTION or inputs >= WIDE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::_scaled_mm": 0,
    "aten::_grouped_mm": 0,
    "bitsandbytes::gemm_4bit": 0,
}
"""By operation, which argument is the left factor."""

ATTENTION = {
    "torch_attn::_varlen_attn",
    "loadmaster::attention_by_document",
    "loadmaster::capped_attention",
    "loadmaster::wide_attention",
    "flex_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
