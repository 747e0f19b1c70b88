"""Frozen linear layers that hold their weight in 4 or 8 bits: what LoRA adapters train over.

Bytes for a weight of out x in, as tensors of the layer (P: a parameter, which FSDP2 shards by its first dimension;
B: a buffer, whole on every rank):

    nf4   P weight         uint8    out in / 2        two 4-bit codes a byte, in the weight's order
          P absmax         uint8    out in / 64       the largest magnitude of each block of 64 weights, as a code
          B absmax_scale   float32  out in / 16384    one for 256 of those
          B absmax_offset  float32  one               their mean, taken off before they were coded
          B absmax_code    float32  256               the values of the 8-bit codes (1 KiB, the same in every layer)
    fp8   P weight         uint8    out in            float8_e4m3fn bits
          B scale          float32  out               of each output row

which is 4.127 bits a weight for nf4 (QLoRA: Dettmers et al. 2023, arXiv 2305.14314) and 8 + 32 / in for fp8. The codes
are plain uint8 so that nothing takes them for numbers: FSDP2's mixed precision casts floating-point parameters, peft
gives an adapter the dtype of a floating-point base. A block of 64 that runs over the end of a row is no matter: FSDP2
gathers the whole layer before it is used. All frozen parameters take no gradient.

Neither direction keeps anything the size of a weight: the backward pass dequantizes, or lays out, once more.

    nf4   y = x dequantize(W)^T                        dx = dy dequantize(W)
    fp8   y = (x Q^T) s      W = diag(s) Q             dx = (dy s) Q      Q is exact in bf16 and s in fp32

On CUDA from compute capability 8.9 on, both of fp8's products run on the fp8 units (torch._scaled_mm): x and dy s are
rounded to E4M3 with a scale for each row, taken as it comes. The units read both factors along what is summed over, so
Q is copied, turned, for the second product. Sums of the first are added up the units' fast way, as servers and
torchao's float8 training do, those of gradients in full where that is believed to be cheap (`_sums_in_full`). Compiled,
the product is one of codes alone, the kind that cuBLAS is fastest at, and the scales are multiplied in by the kernel
that adds the adapter's part; eager, where that would be a pass of its own, the product's kernel does it. No GPU has run
that path yet, so its speed is not known; its loss was seen on a CPU (docs/training.md). Everywhere else Q is cast
to x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loadmaster.preflight.weights import frozen_form as frozen_form

BLOCK = 64
"""Weights that share an absmax; with double quantization 256 of those share a scale."""
FP8_MAX = 448.0
"""Largest value of float8_e4m3fn."""


class FrozenLinear(nn.Linear):
    """A linear layer over a quantized weight; an nn.Linear to peft, which puts its plain LoRA layer around it.

    Made on the meta device; `quantized` gives the tensors that fill it. `bias` is kept as it is.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.data, requires_grad=False))

    @staticmethod
    def quantized(weight: Tensor) -> dict[str, Tensor]:
        """Every tensor of the layer but the bias, by name, from its weight [out, in] in the compute dtype."""
        raise AssertionError("of a subclass")

    def fill(self, weight: Tensor) -> None:
        """Take this weight [out, in], on its device; sharded layers are filled by their loader instead."""
        for name, tensor in self.quantized(weight).items():
            setattr(self, name, _frozen(tensor) if name in self._parameters else tensor)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], rounded to `dtype`."""
        raise AssertionError("of a subclass")

    def multiplied_with(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that inputs of `dtype` are multiplied with, to its last bit."""
        raise AssertionError("of a subclass")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Codes and scales are moved and never cast, as a whole model may be (model.to(dtype), DeepSpeed's engine)."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype or tensor is self.bias else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class FrozenNF4Linear(FrozenLinear):
    """4-bit NormalFloat with double quantization: bit for bit the codes of bitsandbytes' nf4, blocks of 64."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        import bitsandbytes  # noqa: F401  (its operations become torch.ops.bitsandbytes)

        super().__init__(in_features, out_features, bias)
        count = in_features * out_features
        blocks = -(-count // BLOCK)
        self.weight = _frozen(torch.empty(-(-count // 2), dtype=torch.uint8, device="meta"))
        self.absmax = _frozen(torch.empty(blocks, dtype=torch.uint8, device="meta"))
        self.register_buffer("absmax_scale", torch.empty(-(-blocks // 256), device="meta"))
        self.register_buffer("absmax_offset", torch.empty((), device="meta"))
        self.register_buffer("absmax_code", torch.empty(256, device="meta"))

    @staticmethod
    def quantized(weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK, compress_statistics=True)
        return {
            "weight": codes.view(-1),
            "absmax": state.absmax,
            "absmax_scale": state.state2.absmax,
            "absmax_offset": state.offset,
            "absmax_code": state.state2.code.clone(),  # bitsandbytes holds one for all; a layer's may be moved
        }

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return nf4_weight(
            self.weight, self.absmax, self.absmax_scale, self.absmax_offset, self.absmax_code,
            [self.out_features, self.in_features], dtype,
        )

    def multiplied_with(self, dtype: torch.dtype) -> Tensor:
        return self.dequantized(dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight  # once: it may be brought from elsewhere (spread.py)
        _check_codes(weight)
        return _NF4Matmul.apply(
            input, weight, self.absmax, self.absmax_scale, self.absmax_offset, self.absmax_code, self.bias,
            [self.out_features, self.in_features],
        )


class FrozenFP8Linear(FrozenLinear):
    """float8_e4m3fn with an fp32 scale for each output row, quantized once."""

    rounds = True
    """Whether inputs are rounded where there are fp8 units; `round_inputs` switches it."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        super().__init__(in_features, out_features, bias)
        self.weight = _frozen(torch.empty(out_features, in_features, dtype=torch.uint8, device="meta"))
        self.register_buffer("scale", torch.empty(out_features, device="meta"))

    @staticmethod
    def quantized(weight: Tensor) -> dict[str, Tensor]:
        codes, scale = _to_fp8(weight)
        return {"weight": codes.view(torch.uint8), "scale": scale.squeeze(-1)}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.weight.view(torch.float8_e4m3fn).float() * self.scale[:, None]).to(dtype)

    def multiplied_with(self, dtype: torch.dtype) -> Tensor:
        return self.dequantized(torch.float32)  # the scale comes after the product, in float32

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        _check_codes(weight)
        return _FP8Matmul.apply(input, weight, self.scale, self.bias, self.rounds)


FORMS = {"nf4": FrozenNF4Linear, "fp8": FrozenFP8Linear}
"""Formats that a frozen base may be held in."""


def freeze_linears(model: nn.Module, form: str) -> None:
    """Make every linear layer but the head a frozen one, one at a time, on its device.

    On the meta device the new layers are there too, to be filled later.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if not isinstance(module, nn.Linear) or module is head:
                continue
            layer = FORMS[form](module.in_features, module.out_features, module.bias)
            if not module.weight.is_meta:
                layer.fill(module.weight.data)
            setattr(parent, name, layer.train(module.training))


def round_inputs(model: nn.Module, on: bool) -> None:
    """Let fp8 layers round their inputs where there are units for it, as in training, or nowhere."""
    for layer in _fp8_layers(model):
        layer.rounds = on


def rounds_inputs(model: nn.Module) -> bool:
    """Whether the model has fp8 layers, and is where their inputs are rounded."""
    device = model.get_input_embeddings().weight.device
    return any(
        _on_fp8_units(torch.empty(1, layer.in_features, device=device), layer.out_features)
        for layer in _fp8_layers(model)
    )


def _fp8_layers(model: nn.Module) -> list[FrozenFP8Linear]:
    return [layer for layer in model.modules() if isinstance(layer, FrozenFP8Linear)]


def _check_codes(weight: Tensor) -> None:
    if weight.dtype != torch.uint8:  # FSDP2 of torch 2.11 casts integers too
        raise RuntimeError(
            f"the codes of a frozen layer were cast to {weight.dtype}: "
            "shard it under MixedPrecisionPolicy(param_dtype=None)"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# ---------------------------------------------------------------- nf4


def nf4_weight(
    codes: Tensor, absmax: Tensor, scale: Tensor, offset: Tensor, code: Tensor, shape: list[int], dtype: torch.dtype
) -> Tensor:
    ops = torch.ops.bitsandbytes
    largest = ops.dequantize_blockwise(absmax, scale, code, 256, torch.float32)
    largest += offset
    # As one row: bitsandbytes 0.50's CPU kernel takes rows for whole blocks, so weights of 96 inputs came out wrong.
    return ops.dequantize_4bit(codes.view(-1, 1), largest, BLOCK, "nf4", [1, shape[0] * shape[1]], dtype).view(shape)


class _NF4Matmul(torch.autograd.Function):
    """x [..., in] -> [..., out]. The forward is one operation of bitsandbytes, which has kernels for few rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor, offset: Tensor, code: Tensor,
        bias: Tensor | None, shape: list[int],
    ) -> Tensor:
        ctx.save_for_backward(codes, absmax, scale, offset, code)
        ctx.shape = shape
        if shape[1] % BLOCK:  # blocks run over the ends of rows, which the one operation is not made for
            return nn.functional.linear(x, nf4_weight(codes, absmax, scale, offset, code, shape, x.dtype), bias)
        return torch.ops.bitsandbytes.gemm_4bit(
            x, codes.view(-1, 1), shape, scale, BLOCK, "nf4", bias, absmax, code, offset
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad @ nf4_weight(*ctx.saved_tensors, ctx.shape, grad.dtype), *[None] * 7


# ---------------------------------------------------------------- fp8


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn codes of x [rows, n], fp32 scale [rows, 1]): codes times scale is x, rounded."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)  # a row of zeros
    return (x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


@torch.library.custom_op("loadmaster::fp8_values", mutates_args=())
def _fp8_values(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (uint8) as numbers, for the backward pass alone: torch.compile, which may keep what it sees the forward
    pass make, cannot take this for the same and keep a whole weight."""
    return codes.view(torch.float8_e4m3fn).to(dtype)


@_fp8_values.register_fake
def _(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)


def _on_fp8_units(x: Tensor, out_features: int) -> bool:
    """Whether torch._scaled_mm takes it: Ada or later, and sizes that are multiples of 16."""
    if x.shape[-1] % 16 or out_features % 16:
        return False
    # A trace on the meta device (training/trace.py) stands for such a GPU.
    return x.is_meta or (x.is_cuda and _has_fp8_units(x.device.index))


@torch.compiler.assume_constant_result  # or the question would break the graph
def _has_fp8_units(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (8, 9)


@torch.compiler.assume_constant_result
def _sums_in_full(index: int, by_row: bool) -> bool:
    """Whether fp8 products may keep every sum in fp32: on Hopper, and with scales by row where cuBLAS has those, from
    CUDA 12.9 on (pytorch #157905). PyTorch's own kernel, which has them elsewhere, is slow then (pytorch/ao #1325)."""
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(index)[0] == 9 and (not by_row or cuda >= (12, 9))


def _scaled_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(x Q^T) s on the fp8 units, x [..., in] quantized by row, Q [out, in] float8, s [out] -> [..., out]."""
    rows, row_scale = _to_fp8(x.reshape(-1, x.shape[-1]).contiguous())
    product = _on_units(rows, row_scale, codes, scale[None, :], True, x.dtype)
    return product.view(*x.shape[:-1], codes.shape[0])


def _scaled_gradient(grad: Tensor, weight: Tensor, scale: Tensor, fast: bool) -> Tensor:
    """(dy s) Q on the fp8 units, dy s [..., out] quantized by row, Q [out, in] as uint8, s [out] -> [..., in]."""
    rows, row_scale = _to_fp8(_times(grad, scale).reshape(-1, weight.shape[0]).contiguous())
    turned = weight.t().contiguous().view(torch.float8_e4m3fn)
    return _on_units(rows, row_scale, turned, None, fast, grad.dtype).view(*grad.shape[:-1], turned.shape[0])


def _on_units(
    rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor | None, fast: bool, dtype: torch.dtype
) -> Tensor:
    """(rows codes^T) row_scale scale, of codes [n, k] and [m, k], scales [n, 1] and [1, m] -> [n, m].

    fast: sums are not kept in fp32 all along. What leaves the units is in bf16.
    """
    if torch.compiler.is_compiling():
        one = row_scale.new_ones(())
        product = torch._scaled_mm(rows, codes.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fast) * row_scale
        return (product if scale is None else product * scale).to(dtype)
    scale = row_scale.new_ones(1, codes.shape[0]) if scale is None else scale
    product = torch._scaled_mm(rows, codes.t(), row_scale, scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return product.to(dtype)


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., n] times scale [n], taken in fp32 and rounded once; by out= with no fp32 copy of x, compiled by fusion.

    torch 2.11 compiles a forward pass whose result has two names (out=, or a cast to its own dtype) with no gradient.
    """
    if not torch.compiler.is_compiling():
        return torch.mul(x, scale, out=torch.empty_like(x))
    product = x * scale
    return product if product.dtype == x.dtype else product.to(x.dtype)


class _FP8Matmul(torch.autograd.Function):
    """x [..., in] -> [..., out] over Q [out, in] (float8 bits as uint8) and s [out] fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rounds: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.rounds = rounds
        codes = weight.view(torch.float8_e4m3fn)
        if rounds and _on_fp8_units(x, weight.shape[0]):
            product = _scaled_product(x, codes, scale)
        else:
            product = _times(x @ codes.to(x.dtype).t(), scale)
        # Never in place: a selective checkpoint may hold the product (recompute.py).
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        weight, scale = ctx.saved_tensors
        if ctx.rounds and _on_fp8_units(grad, weight.shape[1]):
            by_row = not torch.compiler.is_compiling()
            fast = not grad.is_meta and not _sums_in_full(grad.device.index, by_row)
            return _scaled_gradient(grad, weight, scale, fast), None, None, None, None
        return _times(grad, scale) @ torch.ops.loadmaster.fp8_values(weight, grad.dtype), *[None] * 4
