"""method=full precision=fp8: products rounded to FP8, everything else as in bf16; on a CPU the rounding is imitated."""

import dataclasses

import pytest
import torch
from torch import nn

from loadmaster.config.schema import LoraConfig
from loadmaster.models.adapters import make_trainable
from loadmaster.models.float8 import takes_fp8, train_in_fp8
from loadmaster.models.forward import token_losses
from loadmaster.models.load import random_model
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.training.session import make_session
from loadmaster.training.world import World
from tests.training.test_compiled import SHAPE, batch
from tests.training.test_loop import JOB, PLAN, rows, trained_tokens

CPU = torch.device("cpu")


def trained_model(fp8: bool, checkpointing: str = "none") -> nn.Module:
    model = make_trainable(random_model(SHAPE, torch.bfloat16, "cpu"), "full", LoraConfig())
    if fp8:
        train_in_fp8(model, CPU)
    checkpoint_activations(model, checkpointing)
    return model.train()


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    loss, count = token_losses(model, batch(1))
    (loss / count).backward()
    return (loss / count).item(), {name: p.grad.float() for name, p in model.named_parameters()}


def test_loss_and_gradients_are_bf16s_but_for_the_rounding():
    (loss, gradients), (expected, others) = (loss_and_gradients(trained_model(fp8)) for fp8 in (True, False))
    assert loss == pytest.approx(expected, rel=0.01) and loss != expected
    assert gradients.keys() == others.keys()  # names too, so that files are those of a plain model
    for name, other in others.items():
        assert torch.cosine_similarity(gradients[name].flatten(), other.flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_checkpointing_changes_no_gradient(checkpointing):
    (loss, gradients), (expected, others) = (
        loss_and_gradients(trained_model(True, mode)) for mode in (checkpointing, "none")
    )
    assert loss == expected
    for name, other in others.items():
        torch.testing.assert_close(gradients[name], other, rtol=0, atol=0)


def test_the_head_and_odd_sizes_stay_in_bf16():
    model = random_model({**SHAPE, "intermediate_size": 100}, torch.bfloat16, "cpu")
    train_in_fp8(model, CPU)
    kinds = {name.rsplit(".", 1)[-1]: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["q_proj"] == kinds["o_proj"] == "Float8Linear"
    assert kinds["gate_proj"] == kinds["down_proj"] == kinds["lm_head"] == "Linear"
    assert takes_fp8(64, 128) and not takes_fp8(64, 100) and not takes_fp8(100, 64)


def test_the_engine_trains_in_fp8_as_far_as_in_bf16(tiny):
    """40 steps on one batch."""
    last = {}
    picked = [rows(4)[0]]
    for precision in ("bf16", "fp8"):
        plan = dataclasses.replace(PLAN, precision=precision, master_weights=True)
        session = make_session(JOB, plan, World(), 0, tiny)
        assert any("Float8" in type(m).__name__ for m in session.model.modules()) == (precision == "fp8")
        losses = []
        for _ in range(40):
            losses.append(session.backward(session.split(picked), trained_tokens(picked[0])).item())
            session.optimizer.clip(1.0)
            session.optimizer.step(3e-3)
        last[precision] = losses[-1]
        assert losses[-1] < 0.5 * losses[0]
    assert last["fp8"] == pytest.approx(last["bf16"], abs=0.15)
