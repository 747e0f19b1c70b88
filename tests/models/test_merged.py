"""Narrow products of compiled layers are merged where they share what they read, and change no loss and no gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._inductor.config
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from loadmaster.config.schema import LoraConfig
from loadmaster.models import compiled
from loadmaster.models import merged as merged_file
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.load import random_model
from loadmaster.models.merged import MM, MergeNarrowProducts
from tests.training.test_compiled import MISTRAL, QWEN, SHAPE, steps

merge = MergeNarrowProducts()
counted: list[tuple[int, int]] = []
"""(products before, and after) of each graph that was compiled."""


def products(graph: fx.Graph) -> int:
    """Those that are added to another by their own kernel (added.py) among them."""
    return sum(len(graph.find_nodes(op="call_function", target=target)) for target in (MM, auto_functionalized))


def run_merged(module: fx.GraphModule, _: list) -> object:
    before = products(module.graph)
    merge(module.graph)
    module.graph.lint()
    module.recompile()
    counted.append((before, products(module.graph)))
    return make_boxed_func(module.forward)


def backend(module: fx.GraphModule, inputs: list) -> object:
    """inductor's graphs with its partition, run as they are: no code is generated."""
    compiler = aot_autograd(
        fw_compiler=run_merged, bw_compiler=run_merged, decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    return compiler(module, inputs)


@pytest.fixture(autouse=True)
def merging(monkeypatch):
    counted.clear()
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield
    torch._dynamo.reset()


def adapted(shape: dict, form: str | None, method: str, compiling: bool, **lora):
    made = make_trainable(random_model(shape, torch.float32, "cpu", form), method, LoraConfig(rank=4, **lora))
    torch.manual_seed(1)
    for name, parameter in trainable(made):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if compiling:
        compiled.compile_layers(made)
    return made.train()


LAYER = {  # products of a layer, forward and backward, before and after: base, A and B; dx, dA, dB, dh and dh A
    "all-linear": ((21, 18), (35, 29)),
    ("q_proj", "v_proj"): ((11, 10), (15, 13)),
    ("o_proj", "down_proj"): ((11, 11), (15, 15)),
}


@pytest.mark.parametrize("targets", LAYER, ids=lambda targets: "-".join(targets) if isinstance(targets, tuple) else "")
def test_adapters_of_one_input_share_three_products(targets) -> None:
    made = adapted(SHAPE, None, "lora", True, targets=targets if isinstance(targets, str) else list(targets))
    steps(made)
    assert tuple(counted[:2]) == LAYER[targets]


CASES = [(SHAPE, None, "lora", {"alpha": 4})]
MORE = [
    (QWEN, "fp8", "lora", {}), (SHAPE, None, "lora", {}),
    (SHAPE, "nf4", "qlora", {}), (MISTRAL, None, "lora", {"targets": ["q_proj", "up_proj"]}),
    (SHAPE, None, "full", {}), ({**SHAPE, "hidden_size": 96}, None, "full", {}), (SHAPE, None, "lora", {"dora": True}),
    ({**SHAPE, "model_type": "gemma2", "head_dim": 16}, None, "lora", {"targets": ["k_proj", "v_proj"]}),
]


@pytest.mark.parametrize(
    ("shape", "form", "method", "lora"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_losses_and_gradients_stay_those_of_plain_layers(shape, form, method, lora) -> None:
    plain, _ = steps(adapted(shape, form, method, False, **lora))
    found, recompiled = steps(adapted(shape, form, method, True, **lora))
    assert recompiled == 0
    assert method == "full" or len(lora.get("targets", "")) == 2 or any(after < before for before, after in counted)
    for (loss, gradients), (expected, others) in zip(found, plain, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=2e-4)


def merged(function, *inputs: Tensor, visible: tuple[int, ...] = ()) -> tuple[int, int]:
    """Products before and after; and the function's results stay what they were."""
    traced = make_fx(function, tracing_mode="fake")(*inputs)
    traced.graph.output_node().meta["user_visible_output_idxs"] = visible  # as inductor's have it
    before = products(traced.graph)
    merge(traced.graph)
    traced.graph.lint()
    traced.recompile()
    inputs = [each.double() for each in inputs]  # how far sums of fp32 are apart is the processor's
    torch.testing.assert_close(traced(*inputs), function(*inputs))
    return before, products(traced.graph)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def turned(x: Tensor) -> Tensor:
    return x.permute(1, 0)


X, Y = random(40, 64), random(40, 64)
A, B, C = random(64, 8), random(8, 64).t(), random(64, 4)
WIDE = random(64, 64)


def test_what_shares_no_input_or_is_wide_is_left_alone() -> None:
    assert merged(lambda x, y, a, b: (x @ a, y @ b), X, Y, A, B) == (2, 2)
    assert merged(lambda x, w, v: (x @ w, x @ v), X, WIDE, WIDE.clone()) == (2, 2)
    assert merged(lambda x, a, w: (x @ a, x @ w), X, A, WIDE) == (2, 2)


def test_products_of_one_input_are_merged_however_their_factors_lie() -> None:
    assert merged(lambda x, a, b: (x @ a, x @ b), X, A, C) == (2, 1)
    assert merged(lambda x, a, b: (x @ turned(a), x @ turned(b)), X, A.t().contiguous(), C.t().contiguous()) == (2, 1)
    assert merged(lambda x, a, b: (x @ turned(a), x @ b), X, A.t().contiguous(), C) == (2, 1)


def test_a_product_that_waits_for_another_of_the_same_input_is_not_merged_with_it() -> None:
    def function(x: Tensor, a: Tensor) -> tuple:
        first = x @ a
        return first, x @ (a * first.sum())

    assert merged(function, X, A) == (2, 2)


def test_a_product_that_is_another_ones_factor_as_it_is_or_transposed_twice_is_not_merged_with_it() -> None:
    assert merged(lambda x, a: x @ (x @ a), WIDE, A) == (2, 2)
    assert merged(lambda x, a: x @ turned(turned(x @ turned(a))), WIDE, A.t().contiguous()) == (2, 2)
    assert merged(lambda x, a: x @ turned((a @ x).t()).t(), WIDE, A.t().contiguous()) == (2, 2)


def test_what_shares_a_product_that_was_itself_merged_is_merged() -> None:
    def function(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple:
        inner = x @ a
        return inner @ c, inner @ d, x @ b

    assert merged(function, random(40, 256), random(256, 64), random(256, 8), A, C) == (4, 2)


def test_results_that_callers_see_keep_how_they_lie_in_memory() -> None:
    assert merged(lambda x, a, b: (x @ a, (x @ b).view(5, 8, 4)), X, A, C, visible=(1,)) == (2, 2)
    assert merged(lambda x, a, b: (x @ a, x @ b), X, A, C, visible=(0,)) == (2, 2)
    rows = (random(8, 40), random(4, 40))
    assert merged(lambda x, g, h: (g @ x, h @ x), X, *rows, visible=(0, 1)) == (2, 1)  # which lie as they did


def test_results_that_are_read_by_address_are_left_alone() -> None:
    def function(x: Tensor, g: Tensor, h: Tensor) -> tuple:
        return g @ x, (h @ x).view(-1).as_strided((16,), (2,), 1)

    assert merged(function, X, random(8, 40), random(4, 40)) == (2, 2)


def test_what_is_only_transposed_before_the_other_is_there_moves_behind_it() -> None:
    def function(x: Tensor, g: Tensor, h: Tensor) -> tuple:
        first = turned(turned(g) @ x)
        return turned(first), turned(turned(h.exp()) @ x)

    assert merged(function, X, random(40, 8), random(40, 4)) == (2, 1)

    def used(x: Tensor, g: Tensor, h: Tensor) -> tuple:
        first = turned(turned(g) @ x)
        return first, turned(turned(h * first.sum()) @ x)

    assert merged(used, X, random(40, 8), random(40, 4)) == (2, 2)


def test_terms_of_one_sum_are_merged_and_what_is_used_elsewhere_stays() -> None:
    g, h, a, b = random(40, 8), random(40, 4), random(8, 64), random(4, 64)
    assert merged(lambda x, g, a, h, b: (g @ a + x) + h @ b, X, g, a, h, b) == (2, 1)
    assert merged(lambda x, g, a, h, b: (x + g @ a) * 2 + h @ b, X, g, a, h, b) == (2, 2)
    assert merged(lambda g, a, h, b: g @ a + h @ b, g, a, h, b) == (2, 1)

    def kept(x: Tensor, g: Tensor, a: Tensor, h: Tensor, b: Tensor) -> tuple:
        term = g @ a
        return x + term + h @ b, term

    assert merged(kept, X, g, a, h, b) == (2, 2)
    assert merged(lambda x, g, a, h, b: torch.add(x, g @ a, alpha=2) + h @ b, X, g, a, h, b) == (2, 2)
    shaped = X.view(4, 10, 64)
    rows = (4, 10, 64)
    assert merged(lambda x, g, a, h, b: x + (g @ a).view(rows) + (h @ b).view(rows), shaped, g, a, h, b) == (2, 1)
    assert merged(lambda x, g, a, h, b: (x + g @ a) + (h @ b)[:1], X, g, a, h, b) == (2, 2)
    double = X.double()
    assert merged(lambda x, g, a, h, b: (x + g @ a) + h @ b, double, g, a, h, b) == (2, 2)


def test_terms_of_other_shapes_that_are_views_in_one_sum_are_not_merged() -> None:
    g, a, h, b = random(40, 8), random(8, 64), random(20, 8), random(8, 128)
    assert merged(lambda x, g, a, h, b: (x + g @ a).view(20, 128) + h @ b, X, g, a, h, b) == (2, 2)
    pair = (random(20, 4), random(4, 128))
    assert merged(lambda x, g, a, h, b, i, c: (x + g @ a).view(20, 128) + h @ b + i @ c, X, g, a, h, b, *pair) == (3, 2)


def test_a_size_that_varies_is_no_term() -> None:
    graph = fx.Graph()
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()) as mode:
        size = mode.shape_env.create_unbacked_symint()
        g, a = torch.empty(40, 8), torch.empty(8, 64)
    inputs = {name: graph.placeholder(name) for name in "gan"}
    for node, value in zip(inputs.values(), (g, a, size), strict=True):
        node.meta["val"] = value
    product = graph.call_function(MM, (inputs["g"], inputs["a"]))
    product.meta["val"] = g @ a
    graph.output(graph.call_function(torch.ops.aten.add.Tensor, (product, inputs["n"])))
    merge(graph)
    assert products(graph) == 1


def test_sums_of_three_terms_leave_one_product() -> None:
    g, a = random(40, 8), random(8, 64)
    terms = [t.clone() for t in (g, a, g + 1, a + 1, g + 2, a + 2)]
    assert merged(lambda x, a, b, c, d, e, f: x + a @ b + c @ d + e @ f, X, *terms) == (3, 1)
    assert merged(lambda a, b, c, d, e, f: a @ b + (c @ d + e @ f), *terms) == (3, 1)


def test_the_compilers_cache_knows_another_version_of_the_pass() -> None:
    compiled.compile_layers(adapted(SHAPE, None, "lora", False))
    installed = torch._inductor.config.post_grad_custom_pre_pass
    assert isinstance(installed, MergeNarrowProducts) and len(installed.uuid()) >= 16


def test_the_compilers_cache_knows_the_pass_where_loadmaster_lies_elsewhere(tmp_path, monkeypatch) -> None:
    here = merge.uuid()
    elsewhere = tmp_path / "merged.py"
    elsewhere.write_bytes(Path(merged_file.__file__).read_bytes())
    monkeypatch.setattr(merged_file, "__file__", str(elsewhere))
    assert merge.uuid() == here
    elsewhere.write_bytes(b"another")
    assert merge.uuid() != here
    monkeypatch.undo()
    monkeypatch.setattr(merged_file.added, "__file__", str(elsewhere))
    assert merge.uuid() != here
