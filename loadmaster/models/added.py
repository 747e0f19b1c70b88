"""Wide products to which an adapter's is added begin with it, in the graphs of compiled layers.

    y = x W^T + h B^T         dx = dy_1 W_1 + dy_2 W_2 + g A

The narrow product comes first, and each wide one is added to it, where it lies, by the wide one's own kernel (beta of 1
in BLAS). A kernel for the sum reads every term and writes the result, bound by memory; what a wide product's kernel
reads more is read beside its arithmetic. Of the 1,135 KB that a layer of Llama 3.1 8B over nf4 moves for a token with
adapters on all linears, 250 are gone by it, and wide products read 164 more; in the layer's backward pass a fifth less
is there at once. Each kernel sums in fp32 and rounds what it writes.

Products over an FP8 base are of codes alone and their scales come later (frozen.py), so there is no such sum.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from loadmaster.models.frozen import BLOCK, nf4_weight
from loadmaster.models.graphs import MM, VIEWS, added_up_in, call, leave_out


@torch.library.custom_op("loadmaster::add_product", mutates_args=("total",))
def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, of [rows, inner] and [inner, columns]."""
    torch.addmm(total, left, right, out=total)


@torch.library.custom_op("loadmaster::add_nf4_product", mutates_args=("total",))
def add_nf4_product(
    total: Tensor, x: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor, offset: Tensor, code: Tensor
) -> None:
    """total += x W^T, of x [..., inner] and W [columns, inner] in nf4 as frozen.py holds it."""
    x = x.reshape(-1, x.shape[-1])
    shape = [total.shape[1], x.shape[1]]
    torch.addmm(total, x, nf4_weight(codes, absmax, scale, offset, code, shape, x.dtype).t(), out=total)


for operation in (add_product, add_nf4_product):
    operation.register_fake(lambda *_: None)


def add_to_narrow(graph: fx.Graph, narrow: list[fx.Node]) -> None:
    """Let each of these products be what the wide ones of its sum are added to."""
    starts = {(total, _size(node)): node for node in narrow if (total := added_up_in(node)) is not None}
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_product(node) and (total := added_up_in(node)) is not None:
            start = starts.get((total, _size(node)), node)
            if start is not node:
                groups.setdefault(start, []).append(node)
    for start, wide in groups.items():
        _add(graph, start, wide)


def _size(product: fx.Node) -> tuple[int, int]:
    """(rows, columns) of its result."""
    value = product.meta["val"]
    return value.numel() // value.shape[-1], value.shape[-1]


def _is_product(node: fx.Node) -> bool:
    """Of two matrices, or over nf4 as frozen.py calls it, all sizes known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return False
    nf4 = str(node.target) == "bitsandbytes.gemm_4bit.default" and node.args[4:7] == (BLOCK, "nf4", None)
    return nf4 or node.target is MM


def _add(graph: fx.Graph, start: fx.Node, wide: list[fx.Node]) -> None:
    """The sum of all is made where the last of them was."""
    *others, last = sorted([start, *wide])
    for term in others:
        leave_out(graph, term)
    users = list(last.users)  # the sum's own, where it was an addition of two
    place, total = last.next, start
    for product in wide:
        for node in _made_for(product, product.args[1]):
            place.prepend(node)
        with graph.inserting_before(place):
            total = _added(graph, total, product)
    with graph.inserting_before(place):
        total = call(graph, VIEWS[0], total, list(last.meta["val"].shape))
    for user in users:
        user.replace_input_with(last, total)
    for product in wide:
        graph.erase_node(product)


def _made_for(user: fx.Node, node: object) -> list[fx.Node]:
    """This node and what it is made of, if nothing else reads it: a weight that is dequantized is not made earlier."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or set(node.users) != {user}:
        return []
    return [*(made for part in node.all_input_nodes for made in _made_for(node, part)), node]


def _added(graph: fx.Graph, total: fx.Node, product: fx.Node) -> fx.Node:
    if product.target is MM:
        operation, factors = add_product, dict(zip(("left", "right"), product.args, strict=True))
    else:
        x, codes, _, scale, *_, absmax, code, offset = product.args
        operation, factors = add_nf4_product, {
            "x": x, "codes": codes, "absmax": absmax, "scale": scale, "offset": offset, "code": code,
        }
    both = graph.call_function(auto_functionalized, (operation._opoverload,), {"total": total, **factors})
    both.meta["val"] = None, torch.empty_like(total.meta["val"])
    return call(graph, operator.getitem, both, 1)
