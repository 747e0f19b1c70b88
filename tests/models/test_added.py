"""Wide products are added to the adapter's by their own kernels, and to nothing that is read elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx.experimental.proxy_tensor import make_fx

from loadmaster.models.compiled import set_compiler
from loadmaster.models.frozen import FrozenNF4Linear
from loadmaster.models.graphs import ADD, MM
from loadmaster.models.merged import MergeNarrowProducts
from tests.models.test_merged import random

X, Y, W, V = random(40, 64), random(40, 64), random(64, 96), random(64, 96)
H, G, A, B = random(40, 8), random(40, 8), random(8, 96), random(8, 96)


def passed(function: Callable[..., object], *inputs: Tensor) -> fx.Graph:
    """The graph after the pass; the function's results stay what they were."""
    traced = make_fx(function, tracing_mode="fake")(*inputs)
    traced.graph.output_node().meta["user_visible_output_idxs"] = ()
    MergeNarrowProducts()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), function(*inputs), rtol=1e-4, atol=1e-4)
    return traced.graph


def found(graph: fx.Graph) -> tuple[int, int, int]:
    """Plain products, those that are added to another (in place, or test_gpu_code.py counts the copies), additions."""
    return tuple(len(graph.find_nodes(op="call_function", target=each)) for each in (MM, auto_functionalized, ADD))


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x, y, w, v, h, g, a, b: x @ w + h @ a, (1, 1, 0)),
        (lambda x, y, w, v, h, g, a, b: h @ a + x @ w, (1, 1, 0)),
        (lambda x, y, w, v, h, g, a, b: (x @ w).view(1, 40, 96) + (h @ a).view(1, 40, 96), (1, 1, 0)),
        (lambda x, y, w, v, h, g, a, b: x @ w + h @ a + (y @ v + g @ b), (1, 2, 0)),  # the narrow ones are one
        (lambda x, y, w, v, h, g, a, b: (x @ w + h @ a).tanh() + (y @ v + g @ b), (2, 2, 1)),
        (lambda x, y, w, v, h, g, a, b: x @ w + y @ v, (2, 0, 1)),  # of a layer without adapters
        (lambda x, y, w, v, h, g, a, b: (p := x @ w, p + h @ a), (2, 0, 1)),
        (lambda x, y, w, v, h, g, a, b: (p := h @ a, x @ w + p), (2, 0, 1)),
        (lambda x, y, w, v, h, g, a, b: (x @ w).double() + (h @ a).double(), (2, 0, 1)),
        (lambda x, y, w, v, h, g, a, b: (x @ w) * 2 + h @ a, (2, 0, 1)),
        (lambda x, y, w, v, h, g, a, b: torch.addmm(a[0], x, w) + h @ a, (1, 0, 1)),
    ],
)
def test_a_wide_term_of_a_sum_is_added_to_the_narrow_one(function: Callable[..., object], left: tuple) -> None:
    assert found(passed(function, X, Y, W, V, H, G, A, B)) == left


def test_views_are_known_to_lie_in_what_they_are_views_of_now() -> None:
    """torch 2.11 may take no notice of a new argument, and then copies what is added to if a view seems to read it."""
    graph = passed(lambda x, w, h, a: ((x @ w).view(2, 20, 96) + (h @ a).view(2, 20, 96)).unbind(), X, W, H, A)
    views = [node for node in graph.nodes if getattr(node.target, "is_view", False)]
    assert len(views) >= 2
    for view in views:
        values, source = view.meta["val"], view.args[0].meta["val"]
        for value in values if isinstance(values, (list, tuple)) else [values]:
            assert value.untyped_storage()._cdata == source.untyped_storage()._cdata, view


def test_a_weight_that_is_made_for_a_product_is_made_where_the_product_is() -> None:
    graph = passed(lambda x, y, w, v, h, a: x @ (w * 2) + y @ (v * 2) + h @ a, X, Y, W, V, H, A)
    assert found(graph) == (1, 2, 0)
    kinds = [node.target for node in graph.nodes if node.op == "call_function"]
    times = torch.ops.aten.mul.Tensor
    one = [times, auto_functionalized]
    assert [kind for kind in kinds if kind in (MM, *one)] == [MM, *one, *one]


@pytest.mark.parametrize(("bias", "turned"), [(False, False), (True, False), (False, True)])
def test_a_product_over_nf4_is_added_as_well(bias: bool, turned: bool) -> None:
    own = nn.Parameter(random(96)) if bias else None
    parts = FrozenNF4Linear.quantized(W.t().contiguous())

    def layer(x: Tensor, h: Tensor, a: Tensor, *held: Tensor) -> Tensor:
        base = FrozenNF4Linear(64, 96, held[-1] if bias else None)
        for name, tensor in zip(parts, held, strict=False):
            base._parameters.pop(name, None)
            base._buffers.pop(name, None)
            setattr(base, name, tensor)
        x = x.view(4, 10, 64).transpose(0, 1) if turned else x.view(1, 40, 64)  # no view of two dimensions, or one
        return base(x) + (h @ a).view(*x.shape[:2], 96)

    graph = passed(layer, X, H, A, *parts.values(), *([own] if bias else []))
    assert found(graph) == ((1, 0, 1) if bias else (1, 1, 0))


def test_the_compiler_writes_once_what_several_products_read() -> None:
    """It learns of an operation as it first meets it, which is after it has chosen how to make what that one reads."""
    from torch._inductor.lowering import needs_realized_inputs

    FrozenNF4Linear(64, 96)
    ours, theirs = torch.ops.loadmaster, torch.ops.bitsandbytes
    products = {ours.add_product.default, ours.add_nf4_product.default, theirs.gemm_4bit.default}
    for each in products:
        needs_realized_inputs.discard(each)
    set_compiler()
    assert products <= needs_realized_inputs
