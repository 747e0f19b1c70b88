import math

import pytest
import torch
from torch import nn

from loadmaster.models import loss as loss_module
from loadmaster.models.loss import summed_cross_entropy


@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (30.0, 1.0), (None, 0.25), (20.0, 2.0)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_loss_and_gradients_equal_torchs_cross_entropy(monkeypatch, softcap, scale, trainable_head, compiled):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 7)  # several chunks and a smaller last one
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=torch.float64).requires_grad_(trainable_head)
    hidden = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (30,))
    if compiled:
        loss_module.compile_loss(head, "eager")

    logits = head(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = nn.functional.cross_entropy(logits, targets, reduction="sum") / 30
    wanted = torch.autograd.grad(expected, [hidden, head.weight] if trainable_head else [hidden])

    got_loss = summed_cross_entropy(hidden, head, targets, softcap, scale) / 30
    got = torch.autograd.grad(got_loss, [hidden, head.weight] if trainable_head else [hidden])
    # The logits are taken in fp32 whatever the model's dtype, which bounds the agreement.
    assert got_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_gradients_are_made_where_none_are_wanted():
    head = nn.Linear(8, 20, bias=False)
    hidden = torch.randn(5, 8)
    with torch.no_grad():
        total = summed_cross_entropy(hidden, head, torch.randint(20, (5,)))
    assert total.grad_fn is None and total.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_logits_are_in_one_buffer_whatever_the_number_of_tokens_and_nothing_is_compiled_twice(backend):
    """Rows of a chunk that no token has hold what was there before, here nan, and take no part."""
    head = nn.Linear(16, 50, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    plain = nn.Linear(16, 50, bias=True, dtype=torch.bfloat16).requires_grad_(False)
    plain.load_state_dict(head.state_dict())
    loss_module.compile_loss(head, backend)
    compiled = set()
    for tokens in (3, loss_module.CHUNK_TOKENS + 5, 1):
        hidden = torch.randn(tokens, 16, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(50, (tokens,))
        found, wanted = (summed_cross_entropy(hidden, each, targets) for each in (head, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad(total, hidden)[0] for total in (found, wanted))
        assert (ours - theirs).float().norm() < 5e-3 * theirs.float().norm()  # bf16 rounds by 2^-9
        compiled.add(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(compiled) == 1
    logits = torch.full((loss_module.CHUNK_TOKENS, 50), torch.nan, dtype=torch.bfloat16)
    logits[0] = 0
    targets = torch.full((loss_module.CHUNK_TOKENS,), -1)
    targets[0] = 7
    total = loss_module._gradient_in_place(logits, targets, 30.0, 0.5)
    assert total.item() == pytest.approx(math.log(50)) and logits[0, 7] < 0 and not logits[1:].any()
