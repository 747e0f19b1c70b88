"""Layers with capped scores, compiled and checkpointed, by both ways of attention, give what plain layers give."""

from __future__ import annotations

import pytest
import torch

from loadmaster.models.compiled import graphs_compiled
from tests.models.test_capped import use_the_fused_way
from tests.training.test_compiled import SHAPE, model, small_layers, steps  # noqa: F401 (a fixture for all)

GEMMA_2 = {
    **SHAPE, "model_type": "gemma2", "sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
}
KINDS = 2
"""Of layers: with a window and without."""


def case(way: str, form: str | None, method: str, checkpointing: str, compiling: bool, slow: bool = False):
    name = f"{way}-{method}-{checkpointing}-{'compiled' if compiling else 'eager'}"
    return pytest.param(way, form, method, checkpointing, compiling, id=name, marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize(("way", "form", "method", "checkpointing", "compiling"), [
    case("documents", None, "lora", "selective", True, slow=True),
    case("fused", None, "lora", "selective", True, slow=True),
    case("fused", None, "full", "full", False),
    case("documents", None, "full", "full", True, slow=True),
    case("documents", "nf4", "qlora", "offload", False, slow=True),
    case("fused", None, "full", "none", True, slow=True),
    case("fused", None, "lora", "selective", False, slow=True),
    case("fused", "nf4", "qlora", "full", True, slow=True),
    case("fused", "fp8", "lora", "offload", False, slow=True),
])
def test_losses_and_gradients_are_those_of_plain_layers(way, form, method, checkpointing, compiling, monkeypatch):
    torch._dynamo.reset()
    plain, _ = steps(model(form, method, "none", False, GEMMA_2))
    if way == "fused":
        use_the_fused_way(monkeypatch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, recompiled = steps(model(form, method, checkpointing, compiling, GEMMA_2))
    assert recompiled == 0 and graphs_compiled() == KINDS * (compiling or way == "fused") + compiling
    assert not torch._dynamo.utils.counters["graph_break"]
    for (loss, gradients), (expected, others) in zip(found, plain, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-4)
