"""Packed documents beside transformers' own eager attention, which gets each by itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from loadmaster.config.schema import LoraConfig
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.forward import causal_lm, token_losses


def packed_equals_alone(model: torch.nn.Module, method: str, batch, documents: list[list[int]], rel: float) -> None:
    """Loss, to `rel`, and gradients of the documents that `batch` holds; by adapters or of the whole model."""
    model = make_trainable(model, method, LoraConfig(rank=4))
    for name, parameter in trainable(model):  # B starts at zero, which would hide A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    loss, count = token_losses(model, batch)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in trainable(model)}

    model.zero_grad()
    causal_lm(model).set_attn_implementation("eager")
    expected = 0.0
    for ids in (torch.tensor([d]) for d in documents if len(d) > 1):
        alone = cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="sum")
        alone.backward()
        expected += alone.item()
    assert count == sum(len(d) - 1 for d in documents)
    assert loss.item() == pytest.approx(expected, rel=rel)
    for name, parameter in trainable(model):
        largest = parameter.grad.abs().max().item()
        assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-5 * largest, msg=name)
