"""AdamW with moments in bf16, over bf16 weights: what is rounded once a step, and how.

bf16 has steps of 0.4% to 0.8%. A weight's update is most often less, and so is what the second moment loses in a step
(0.1% at beta2=0.999): rounded to the nearest, either would stay what it was. A second moment that cannot fall keeps the
largest gradients that there ever were, and the rate that it divides is too small from then on. Both are therefore
rounded up or down at random, so that the mean is right. The first moment moves by a tenth: it takes the nearest.

What is drawn is the same on every rank that holds the same (rounding.py says why).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loadmaster.training.rounding import rounded, seed


class AdamWBf16(torch.optim.Optimizer):
    """Its rate is a tensor, and the step is compiled: neither a new rate nor a new step is another graph."""

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, moments: torch.dtype, shard: int
    ):
        """groups: with `numbers`, of each of their parameters among all there are. shard: which part of them these are.

        moments: float32 where weights are (a CPU), and then nothing is rounded.
        """
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.moments, self.shard = moments, shard
        for group in self.param_groups:
            group["lr"] = torch.tensor(0.0)

    @torch.no_grad()
    def step(self) -> None:
        update = torch.compile(_update, fullgraph=True, dynamic=False)
        with torch._dynamo.utils.disable_cache_limit():  # as many graphs as shapes
            for group in self.param_groups:
                settings = (*group["betas"], group["weight_decay"], group["eps"])
                for number, weight in zip(group["numbers"], group["params"], strict=True):
                    if weight.grad is None:
                        continue
                    state = self.state[weight]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"] = torch.zeros_like(weight, dtype=self.moments)
                        state["exp_avg_sq"] = torch.zeros_like(weight, dtype=self.moments)
                    drawn_by = seed(number, self.shard, int(state["step"]))
                    state["step"] += 1
                    moments = state["exp_avg"], state["exp_avg_sq"]
                    update(weight.detach(), weight.grad, *moments, state["step"], group["lr"], *drawn_by, *settings)


def _update(
    weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Tensor, lr: Tensor,
    one: Tensor, other: Tensor, beta1: float, beta2: float, decay: float, eps: float,
) -> None:
    """Decoupled weight decay (Loshchilov & Hutter 2019), in fp32 from what is held to what is rounded.

    The second moment's seed is its weight's the other way round, also where that is rounded from a master, elsewhere.
    """
    wide, gradient = weight.float() * (1 - lr * decay), gradient.float()
    mean32 = mean.float().lerp(gradient, 1 - beta1)
    square32 = square.float().lerp(gradient.square(), 1 - beta2)
    denominator = (square32 / (1 - beta2**step)).sqrt() + eps
    wide = wide - lr * (mean32 / (1 - beta1**step)) / denominator
    mean.copy_(mean32)
    square.copy_(rounded(square32, (other, one)) if square.dtype == torch.bfloat16 else square32)
    weight.copy_(rounded(wide, (one, other)) if weight.dtype == torch.bfloat16 else wide)
