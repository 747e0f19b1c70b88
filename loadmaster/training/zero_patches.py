"""What DeepSpeed's zero3 needs to go with torch's checkpoints, transformers' experts, and evaluations between steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode


def add_biases_once() -> None:
    """Let zero3's linear layers multiply as PyTorch's do. DeepSpeed's add a bias in place to the product, which a
    selective checkpoint has kept: in what it makes again the bias was twice."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    LinearFunctionForZeroStage3.forward = staticmethod(_linear)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch._C._nn.linear(x, weight, bias)  # torch.nn.functional.linear is DeepSpeed's by then


def keep_no_input_of_what_is_frozen() -> None:
    """Let zero3's linear layers keep their input for the weight's gradient alone, as PyTorch's do: DeepSpeed's kept
    that of frozen ones, too."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    its_own = LinearFunctionForZeroStage3.setup_context
    if its_own.__module__ == __name__:
        return

    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *bias = inputs
        its_own(context, (x if weight.requires_grad else None, weight, *bias), output)

    LinearFunctionForZeroStage3.setup_context = staticmethod(setup_context)


def keep_experts_cut() -> None:
    """Let zero3's experts be multiplied with as its linear layers are: the graph keeps the parameter, which is cut
    again. transformers multiplies with the transposed parameter, a view that the graph kept whole to the backward pass:
    without checkpoints, all experts of all layers on every GPU."""
    from transformers.integrations import moe

    its_own = moe._grouped_linear
    if its_own.__module__ == __name__:
        return

    @wraps(its_own)
    def grouped_linear(x: Tensor, weight: Tensor, offs: Tensor, bias: Any = None, is_transposed: Any = False) -> Tensor:
        if bias is not None or is_transposed or not hasattr(weight, "ds_id"):
            return its_own(x, weight, offs, bias, is_transposed)
        return _GroupedLinear.apply(x.to(weight.dtype), weight, offs)

    grouped_linear.__module__ = __name__
    moe._grouped_linear = grouped_linear


class _GroupedLinear(torch.autograd.Function):
    """Rows x of each expert times its own weights [E, outputs, inputs]; offs: where each expert's rows end."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=offs)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, offs = inputs
        # x is kept for the weights' gradient alone
        context.save_for_backward(x if weight.requires_grad else None, weight, offs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, offs = context.saved_tensors
        gradient, to_input, to_weight = gradient.contiguous(), *context.needs_input_grad[:2]
        multiply = torch.nn.functional.grouped_mm
        return (
            multiply(gradient, weight, offs=offs) if to_input else None,
            multiply(gradient.t(), x, offs=offs) if to_weight else None,
            None,
        )


def gather_apart() -> None:
    """Let zero3 gather and drop weights unseen by a selective checkpoint, around whose layers it does so: what was
    gathered ahead in the forward pass is not in the backward pass, and the checkpoint refuses what it has not seen."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        its_own = getattr(DeepSpeedZeRoOffload, name)
        if its_own.__module__ != __name__:
            setattr(DeepSpeedZeRoOffload, name, _apart(its_own))


def forget_modules() -> None:
    """Let DeepSpeed forget which modules it takes to be running. What a checkpoint makes again ends as soon as all is
    there, so the last modules of a layer never end for DeepSpeed: its list grew with each backward pass."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK.clear()


def cut_again(loss: nn.Module, *_: Any) -> None:
    """Of a forward pass without a backward one, for which DeepSpeed has the last layers stay whole: they would be so
    beside the first ones of the next evaluation batch."""
    if torch.is_grad_enabled():
        return
    whole = [p for p in loss.parameters() if p.ds_status.name == "AVAILABLE" and not p.ds_persist]
    if whole:
        whole[0].partition(whole)


def _apart(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def unseen(*arguments: Any) -> Any:
        selective = isinstance(_get_current_dispatch_mode(), (_CachingTorchDispatchMode, _CachedTorchDispatchMode))
        with _pop_mode_temporarily() if selective else nullcontext():
            return function(*arguments)

    unseen.__module__ = __name__
    return unseen
