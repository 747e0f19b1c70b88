import pytest
import torch
from torch import nn

from loadmaster.models import loss as loss_module
from loadmaster.models.loss import summed_cross_entropy


@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (30.0, 1.0), (None, 0.25), (20.0, 2.0)])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_loss_and_gradients_equal_torchs_cross_entropy(monkeypatch, softcap, scale, trainable_head):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 7)  # several chunks and a smaller last one
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=torch.float64).requires_grad_(trainable_head)
    hidden = torch.randn(30, 16, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (30,))

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
