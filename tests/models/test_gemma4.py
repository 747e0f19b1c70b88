"""Gemma 4's dense language model: two kinds of attention in one row of documents, wide heads, numbers beside weights.

In its layers that see everything heads are of another size, values are the keys, and flash kernels are too narrow for
heads of 512: what runs on a GPU there is held against exact attention with the kernel's operations done on the CPU.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Gemma4TextConfig

from loadmaster.config.schema import LoraConfig
from loadmaster.errors import LoadmasterError
from loadmaster.export.live_checks import live_weights
from loadmaster.models import wide_heads
from loadmaster.models.adapters import make_trainable
from loadmaster.models.attention import PACKED, packed_attention
from loadmaster.models.flash import attention_calls
from loadmaster.models.forward import token_losses, trained_logits
from loadmaster.models.load import load_base
from loadmaster.models.shards import empty_model, fill, materialise
from loadmaster.models.wide_heads import ALIGNED, wide_attention
from tests.models.alone import packed_equals_alone
from tests.models.test_forward import packed

GEMMA_4 = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 6, "final_logit_softcapping": 5.0,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "initializer_range": 0.2,
    "use_bidirectional_attention": "vision",
}
LENGTHS = (9, 23, 1, 14)


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, 120, (length,), generator=draw).tolist() for length in LENGTHS]


def gemma(**changed) -> torch.nn.Module:
    torch.manual_seed(0)
    config = Gemma4TextConfig(**{**GEMMA_4, **changed})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    for number, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.5 + number / 4)
    return model


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_losses_and_gradients_are_transformers_own_document_by_document(method, values, documents) -> None:
    model = gemma(attention_k_eq_v=values).double()
    packed_equals_alone(model, method, packed(documents), documents, rel=1e-6)  # summed in float32


def test_no_document_sees_another(documents) -> None:
    model, (first, *others) = gemma(), documents
    before, _ = trained_logits(model, packed([first, *others]))
    after, _ = trained_logits(model, packed([first[::-1], *others]))
    inside = len(first) - 1
    assert not torch.allclose(before[:inside], after[:inside], atol=0.1)
    assert_close(before[inside:], after[inside:], rtol=0, atol=1e-5)


def test_keys_and_values_of_a_layer_do_not_outlive_it_where_none_shares_them(documents) -> None:
    """Each checkpointed layer has the dictionary among its arguments that they are put into."""
    from collections import UserDict

    model, handed = gemma(), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, __, named: handed.append(named["shared_kv_states"]), with_kwargs=True)
    token_losses(model, packed(documents))
    assert len(handed) == 3 and all(isinstance(each, UserDict) and not each for each in handed)


# ---------------------------------------------------------------- wide heads


def seen(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    length = q.shape[2]
    return (q @ k.mT * scale).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)


def forward_on_the_cpu(q, k, v, bias, keeps, dropout, causal, *, scale):
    """What the operation of this name does on a GPU: no groups of queries, and a logsumexp of whole blocks."""
    assert q.shape == k.shape == v.shape and causal and keeps and bias is None and not dropout
    scores = seen(q, k, scale)
    logsumexp = scores.logsumexp(-1).float()
    whole = pad(logsumexp, (0, -q.shape[2] % ALIGNED), value=torch.inf)
    return scores.softmax(-1) @ v, whole, torch.zeros(()), torch.zeros(())


def backward_on_the_cpu(grad, q, k, v, bias, output, logsumexp, seed, offset, dropout, wanted, causal, *, scale):
    assert logsumexp.shape[2] % ALIGNED == 0 and causal and wanted == [True, True, True, False]
    p = (seen(q, k, scale) - logsumexp[:, :, : q.shape[2], None]).exp()
    d_scores = p * (grad @ v.mT - (grad * output).sum(-1, keepdim=True))
    return d_scores @ k * scale, d_scores.mT @ q * scale, p.mT @ grad, None


@pytest.mark.parametrize("groups", [1, 4])
def test_wide_heads_of_packed_documents_are_attended_exactly(groups, monkeypatch) -> None:
    monkeypatch.setattr(wide_heads, "EFFICIENT", forward_on_the_cpu)
    monkeypatch.setattr(wide_heads, "BACKWARD", backward_on_the_cpu)
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    q, d_out = torch.randn(1, 4, tokens, 512, requires_grad=True), torch.randn(1, tokens, 4, 512)
    k, v = (torch.randn(1, 4 // groups, tokens, 512, requires_grad=True) for _ in "kv")
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    found = []
    for attend in ("wide", "by document"):
        if attend == "wide":
            output = wide_attention(q, k, v, bounds, 0.05)[0].transpose(1, 2)
        else:
            longest = torch.empty(max(LENGTHS), 0)
            output, _ = packed_attention(
                torch.nn.Module(), q, k, v, None, 0.05, cu_seq_lens_q=bounds, longest_document=longest
            )
        assert output.is_contiguous()
        found.append((output, *torch.autograd.grad(output, (q, k, v), d_out)))
    for ours, exact in zip(*found, strict=True):
        assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_the_operations_of_the_gpu_take_what_they_are_given() -> None:
    """By their sizes alone, on the meta device: which arguments there are, and what comes back."""
    q = torch.empty(1, 300, 8, 512, device="meta", dtype=torch.bfloat16).transpose(1, 2)[:, :, 100:200]
    k, v = (torch.empty(1, 2, 100, 512, device="meta", dtype=torch.bfloat16) for _ in "kv")
    output, logsumexp = wide_heads.forward_document(q, k, v, 1.0)
    assert output.shape == q.shape and logsumexp.shape == (1, 8, 100) and logsumexp.dtype == torch.float32
    gradients = wide_heads.backward_document(torch.empty_like(q), q, k, v, output, logsumexp, 1.0)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(("head_dim", "operation"), [(256, "_varlen_attn"), (512, "wide_attention")])
def test_which_kernel_a_gpu_takes_is_by_the_size_of_heads(head_dim, operation) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    called = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    q, k = (torch.empty(1, heads, 40, head_dim, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    bounds, longest = torch.empty(3, dtype=torch.int32, device="meta"), torch.empty(30, 0, device="meta")
    with Calls():
        output, _ = packed_attention(
            torch.nn.Module(), q, k, k, None, 1.0, cu_seq_lens_q=bounds, longest_document=longest
        )
    assert output.shape == (1, 40, 4, head_dim) and any(operation in name for name in called)


def test_a_layers_own_sizes_are_those_that_its_attention_is_called_with() -> None:
    calls = attention_calls(gemma())
    assert [(c.heads, c.key_value_heads, c.head_dim, c.scale, c.window) for c in calls] == [
        (4, 2, 8, 1.0, 6), (4, 1, 16, 1.0, None)
    ]


# ---------------------------------------------------------------- numbers beside the weights


@pytest.fixture
def folder(tmp_path) -> Path:
    gemma().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_read_shard_by_shard_has_the_numbers_beside_the_weights(folder, documents) -> None:
    model = empty_model(folder, torch.float32)
    materialise(model, torch.device("cpu"))
    model.tie_weights()
    fill(model, folder, torch.float32)
    assert [layer.layer_scalar.item() for layer in model.model.layers] == [0.5, 0.75, 1.0]
    whole = load_base(folder, torch.float32, "cpu")
    assert_close(trained_logits(model, packed(documents))[0], trained_logits(whole, packed(documents))[0])


def test_a_checkpoint_without_them_is_refused_by_name(folder) -> None:
    file = folder / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if name != "model.layers.1.layer_scalar"}
    save_file(tensors, file, metadata={"format": "pt"})
    model = empty_model(folder, torch.float32)
    materialise(model, torch.device("cpu"))
    model.tie_weights()
    with pytest.raises(LoadmasterError, match=r"layers\.1\.layer_scalar is missing"):
        fill(model, folder, torch.float32)


def test_exports_are_held_against_them() -> None:
    live = {name: weight for name, weight, *_ in live_weights(make_trainable(gemma(), "full", LoraConfig()))}
    assert live["model.layers.1.layer_scalar"].item() == 0.75
    assert math.prod(live["model.layers.1.self_attn.k_proj.weight"].shape) == 32 * 16
