"""Frozen nf4 and fp8 layers against what they stand for: bitsandbytes' nf4, and linear layers over their weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loadmaster.errors import LoadmasterError
from loadmaster.models import frozen
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.frozen import FORMS, FrozenFP8Linear, FrozenLinear, FrozenNF4Linear, frozen_form
from loadmaster.models.load import load_base, random_model
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.shape import Matrix
from loadmaster.preflight.weights import nf4_bytes

SIZES = [(128, 64), (100, 96), (33, 40)]
"""Outputs and inputs: blocks of 64 end with rows, in the middle of rows, and short of the last weight."""


def layer_of(form: str, out_features: int, in_features: int, dtype=torch.float32, bias: bool = False) -> FrozenLinear:
    torch.manual_seed(out_features)
    given = nn.Parameter(torch.randn(out_features, dtype=dtype)) if bias else None
    layer = FORMS[form](in_features, out_features, given)
    layer.fill(torch.randn(out_features, in_features, dtype=dtype))
    return layer


def saved_for_backward(function, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        return function(x), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nf4_weights_are_bitsandbytes_bit_for_bit(size, dtype):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(size, dtype=dtype)
    layer = FrozenNF4Linear(size[1], size[0])
    layer.fill(weight)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    state.shape = torch.Size([weight.numel()])  # its CPU kernel is wrong where a block runs over the end of a row
    assert torch.equal(layer.dequantized(dtype), dequantize_4bit(codes, state).view(size))
    error = (layer.dequantized(dtype).float() - weight.float()).norm() / weight.float().norm()
    assert error < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp8_weights_are_within_half_a_step_of_what_they_stand_for(size, dtype):
    weight = torch.randn(size, dtype=dtype)
    weight[3] = 0
    weight[5] *= 1000
    layer = FrozenFP8Linear(size[1], size[0])
    layer.fill(weight)
    held = layer.dequantized(torch.float32)
    exact = weight.float()
    # three bits of mantissa: a step is at most 1/8 of the value, or 2^-9 of a scale among the smallest
    allowed = torch.maximum(exact.abs() / 16, exact.abs().amax(1, keepdim=True) / frozen.FP8_MAX * 2**-10) * 1.0001
    assert ((held - exact).abs() <= allowed).all() and torch.equal(held[3], torch.zeros(size[1]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_a_linear_layer_over_the_same_weight(size, form, bias):
    layer = layer_of(form, *size, bias=bias)
    x = torch.randn(2, 5, size[1], requires_grad=True)
    y = layer(x)
    reference = nn.functional.linear(x, layer.dequantized(torch.float32), layer.bias)
    torch.testing.assert_close(y, reference, rtol=1e-6, atol=1e-5)
    upstream = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (y, reference))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_the_size_of_a_weight_is_kept_but_the_codes_themselves(form):
    layer = layer_of(form, 128, 256)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), *layer.buffers()]}
    _, kept = saved_for_backward(layer, torch.randn(3, 256, requires_grad=True))
    assert kept and all(tensor.untyped_storage().data_ptr() in own for tensor in kept)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_layer_has_no_graph_break_keeps_only_the_codes_and_computes_the_same(form):
    layer = layer_of(form, 128, 256, bias=True)
    x = torch.randn(3, 256, requires_grad=True)
    expected = layer(x)
    y, kept = saved_for_backward(torch.compile(layer, fullgraph=True), x)
    codes = sum(tensor.numel() * tensor.element_size() for tensor in [*layer.parameters(), *layer.buffers()])
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) <= codes
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0], rtol=1e-6, atol=1e-5
    )


def test_bytes_are_those_that_the_preflight_counts():
    for outputs, inputs in [(4096, 4096), (1024, 4096), (100, 96)]:
        layer = FrozenNF4Linear(inputs, outputs)
        held = [*layer.parameters(), *layer.buffers()]
        by_allocator = sum(-(-tensor.nbytes // 512) * 512 for tensor in held)
        matrix = Matrix("q_proj", inputs, outputs)
        assert nf4_bytes(matrix) - 512 <= by_allocator <= nf4_bytes(matrix)  # bitsandbytes keeps the 16 codes too
        layer = FrozenFP8Linear(inputs, outputs)
        assert sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()]) == outputs * (inputs + 4)


def scales_rows() -> bool:
    """Whether PyTorch's CPU kernel takes a scale for each row, as a GPU's does: from torch 2.12 or 2.13 on."""
    codes = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(codes, codes.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


scaled_by_row = pytest.mark.skipif(not scales_rows(), reason="this torch's CPU kernel takes one scale for all rows")


@scaled_by_row
def test_products_on_fp8_units_are_off_by_the_rounding_of_the_inputs_alone():
    """torch._scaled_mm has a CPU kernel; on a GPU this path is taken from compute capability 8.9 on."""
    layer = layer_of("fp8", 64, 128, torch.bfloat16)
    x = torch.randn(2, 16, 128, dtype=torch.bfloat16)
    y = frozen._scaled_product(x, layer.weight.view(torch.float8_e4m3fn), layer.scale)
    rows, scale = frozen._to_fp8(x.view(-1, 128))
    expected = (rows.float() * scale @ layer.dequantized(torch.float32).t()).view(2, 16, 64)
    torch.testing.assert_close(y.float(), expected, rtol=8e-3, atol=1e-3)


def test_inputs_may_be_left_as_they_are_where_there_are_fp8_units(monkeypatch):
    layer = layer_of("fp8", 64, 128, torch.bfloat16)
    x = torch.randn(16, 128, dtype=torch.bfloat16, requires_grad=True)
    elsewhere = layer(x)
    upstream = torch.randn(16, 64, dtype=torch.bfloat16)
    gradient = torch.autograd.grad(elsewhere, x, upstream)[0]
    monkeypatch.setattr(frozen, "_on_fp8_units", lambda *_: True)
    for product in ("_scaled_product", "_scaled_gradient"):
        monkeypatch.setattr(frozen, product, lambda *_: pytest.fail("on the units"))
    frozen.round_inputs(nn.Sequential(layer), False)
    assert torch.equal(layer(x), elsewhere)
    assert torch.equal(torch.autograd.grad(layer(x), x, upstream)[0], gradient)


@scaled_by_row
def test_gradients_on_fp8_units_are_off_by_the_rounding_of_the_upstream_gradient_alone():
    layer = layer_of("fp8", 64, 128, torch.bfloat16)
    upstream = torch.randn(2, 16, 64, dtype=torch.bfloat16)
    found = frozen._scaled_gradient(upstream, layer.weight, layer.scale, fast=True)
    rows, scale = frozen._to_fp8((upstream * layer.scale).to(torch.bfloat16).view(-1, 64))
    codes = layer.weight.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found.float(), (rows.float() * scale @ codes).view(2, 16, 128), rtol=8e-3, atol=1e-3)
    exact = upstream.float() @ layer.dequantized(torch.float32)
    assert (found - exact).norm() < 0.04 * exact.norm()  # E4M3 rounds by 2^-4 at most, by some 2.6% on average


@pytest.mark.parametrize("compiled", [pytest.param(False, marks=scaled_by_row), True])
def test_on_fp8_units_both_products_take_codes_and_nothing_the_size_of_a_weight_stays(monkeypatch, compiled):
    """By PyTorch's CPU kernel of the same product, in the layouts that a GPU's wants (it checks nothing; meta does)."""
    monkeypatch.setattr(frozen, "_on_fp8_units", lambda x, out_features: True)
    monkeypatch.setattr(frozen, "_sums_in_full", lambda index, by_row: False)
    layer = layer_of("fp8", 128, 256, torch.bfloat16, bias=True)
    x = torch.randn(32, 256, dtype=torch.bfloat16, requires_grad=True)
    y, kept = saved_for_backward(torch.compile(layer, fullgraph=True) if compiled else layer, x)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), *layer.buffers()]}
    kept = [tensor for tensor in kept if tensor.numel() > 1]  # compiled, the scale of codes that have none
    assert kept and all(tensor.untyped_storage().data_ptr() in own for tensor in kept)  # and no turned copy
    upstream = torch.randn(128, 32, dtype=torch.bfloat16).t()  # not row by row, as the units want it
    found = torch.autograd.grad(y, x, upstream)[0].float()
    weight = layer.dequantized(torch.float32)
    exact = (upstream.float() @ weight, nn.functional.linear(x.float(), weight, layer.bias.float()))
    assert (found - exact[0]).norm() < 0.04 * exact[0].norm() and (y - exact[1]).norm() < 0.04 * exact[1].norm()
    meta = copy.deepcopy(layer).to("meta")
    x = torch.randn(256, 32, dtype=torch.bfloat16, device="meta", requires_grad=True).t()
    meta(x).backward(upstream.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_results_of_fp8_layers_have_one_name(dtype):
    """torch 2.11 gives an autograd.Function no gradient whose result is also another tensor of its forward pass."""
    layer, graphs = layer_of("fp8", 64, 32, dtype), []

    def look(graph, _):
        graphs.extend(module for module in graph.modules() if isinstance(module, torch.fx.GraphModule))
        return graph

    x = torch.randn(1, 16, 32, dtype=dtype, requires_grad=True)
    upstream = torch.randn(1, 16, 64, dtype=dtype)
    torch.compile(layer, backend=look, fullgraph=True)(x).backward(upstream)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) > 1 and not any("out" in node.kwargs for node in nodes)
    casts = [node for node in nodes if node.op == "call_method" and node.target == "to"]
    assert all(node.args[0].meta["example_value"].dtype != node.args[1] for node in casts)
    exact = upstream.float() @ layer.dequantized(torch.float32)
    assert (x.grad - exact).norm() < 0.01 * exact.norm()


def test_fp8_scales_are_not_rounded_to_the_compute_dtype():
    """One rounded to bf16 would put every weight of its row off by the same, up to 0.2%, and the merge would not."""
    layer = layer_of("fp8", 128, 64, torch.bfloat16)
    held = layer.dequantized(torch.float32).double()
    off = (layer.scale.bfloat16().float() / layer.scale - 1).abs()
    row = int(off.argmax())
    assert off[row] > 1e-3
    x = torch.randn(4096, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    upstream = torch.zeros_like(y)
    upstream[:, row] = torch.randn(4096)
    for found, exact in (
        (y[:, row].double(), x.detach().double() @ held[row]),
        (torch.autograd.grad(y, x, upstream)[0].double(), upstream[:, row, None].double() * held[row]),
    ):
        assert abs((found * exact).sum() / exact.square().sum() - 1) < 3e-4


def test_codes_that_a_sharding_policy_cast_are_refused():
    layer = layer_of("nf4", 128, 64)
    layer.weight = nn.Parameter(layer.weight.to(torch.bfloat16), requires_grad=False)
    with pytest.raises(RuntimeError, match="param_dtype=None"):
        layer(torch.randn(1, 64))


@pytest.mark.parametrize("form", FORMS)
def test_casting_a_model_casts_no_codes_and_no_scales(form):
    layer = layer_of(form, 128, 64, bias=True)
    weight = layer.dequantized(torch.float32)
    layer.to(torch.bfloat16)
    assert torch.equal(layer.dequantized(torch.float32), weight) and layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_which_bases_are_frozen_in_which_form():
    cases = {("qlora", "bf16"): "nf4", ("lora", "fp8"): "fp8", ("lora", "bf16"): None, ("full", "fp8"): None}
    assert {case: frozen_form(*case) for case in cases} == cases


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize("form", FORMS)
def test_loading_quantizes_every_linear_but_the_head_as_each_is_read(tiny: Path, form):
    model = load_base(tiny, torch.float32, "cpu", form)
    stored = load_file(tiny / "model.safetensors")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    assert len(layers) == 14 and not any(p.is_meta for p in [*model.parameters(), *model.buffers()])
    for name, layer in layers.items():
        weight = stored[f"{name}.weight"].float()
        assert all(torch.equal(getattr(layer, part), tensor) for part, tensor in layer.quantized(weight).items())
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")  # it would be written into exports


def test_a_torn_checkpoint_is_refused_for_a_frozen_base_too(tiny: Path, tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder = shutil.copytree(tiny, tmp_path / "torn")
    stored = load_file(folder / "model.safetensors")
    stored.pop("model.layers.1.mlp.up_proj.weight")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LoadmasterError, match=r"missing keys(.|\n)*up_proj"):
        load_base(folder, torch.float32, "cpu", "nf4")


@pytest.mark.parametrize("form", FORMS)
def test_adapters_over_a_frozen_base_train_and_checkpointing_changes_nothing(form):
    from loadmaster.config.schema import LoraConfig

    gradients = {}
    for mode in ("none", "full"):
        model = make_trainable(random_model(SHAPE, torch.float32, "cpu", form), "lora", LoraConfig(rank=4))
        torch.manual_seed(1)
        for name, parameter in trainable(model):
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        checkpoint_activations(model, mode)
        before = copy.deepcopy({n: p for n, p in model.named_parameters() if not p.requires_grad})
        loss(model).backward()
        gradients[mode] = {name: parameter.grad for name, parameter in trainable(model)}
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert len(gradients["none"]) == 28 and all(g.abs().sum() > 0 for g in gradients["none"].values())
    for name, gradient in gradients["none"].items():
        torch.testing.assert_close(gradients["full"][name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_in_between_leaves_gradients_as_they_were(form):
    """bitsandbytes' own CPU layer repacks its weight at the first forward without gradients, and passes none after."""
    model = random_model(SHAPE, torch.float32, "cpu", form)
    x = torch.randn(2, 100, requires_grad=True)
    layer = model.model.layers[0].mlp.down_proj
    before = torch.autograd.grad(layer(x).sum(), x)[0]
    with torch.no_grad():
        loss(model.eval())
    assert torch.equal(torch.autograd.grad(layer.train()(x).sum(), x)[0], before) and before.abs().sum() > 0


SHAPE = {
    "model_type": "llama", "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def loss(model: nn.Module, length: int = 32) -> Tensor:
    from loadmaster.data import MicroBatch
    from loadmaster.models.forward import token_losses

    ids = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(0))
    total, trained = token_losses(model.train(), MicroBatch(ids, ids, torch.arange(length)[None]))
    return total / trained


def test_what_fp8_layers_multiply_with_is_not_rounded_to_the_inputs_dtype():
    """The scale comes after the product, in float32."""
    layer = FrozenFP8Linear(64, 32)
    layer.fill(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16())
    exact = layer.weight.view(torch.float8_e4m3fn).float() * layer.scale[:, None]
    assert torch.equal(layer.multiplied_with(torch.bfloat16), exact)
    assert not torch.equal(layer.dequantized(torch.bfloat16).float(), exact)
