"""What DeepSpeed's zero3 needs to go with torch's checkpoints, and with evaluations between two steps."""

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
