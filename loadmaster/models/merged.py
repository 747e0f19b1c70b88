"""Narrow products that share what they read become one, in the graphs of compiled layers.

q, k and v are made from one input, and so are gate and up; over each of them an adapter has a product with its A, r
wide, which costs what it takes to read the input [T, h] once. In a layer with adapters on all linears:

    forward     h_i = x A_i^T                 one product with all A below one another: x is read 2 times, not 5
    gradients   dA_i = dh_i^T x               one product of all dh beside one another: the same
                dx += sum of dh_i A_i         one product of both: 2 results [T, h] to write and read, not 5

which is 8% of the memory traffic of such a layer (docs/training.md). The compiler itself joins only what is
elementwise. This is a pass over its graphs and changes no module: eager layers, checkpoints and what an adapter is
saved as stay what they are. Sums are the same numbers, rounded once instead of after each term.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from loadmaster.models import added, graphs
from loadmaster.models.added import add_to_narrow
from loadmaster.models.graphs import MM, VIEWS, added_up_in, call, leave_out, renew_views
from loadmaster.preflight.blocks import MERGED

CAT = torch.ops.aten.cat.default
PERMUTE, SLICE = torch.ops.aten.permute.default, torch.ops.aten.slice.Tensor
AS_STRIDED = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)


class MergeNarrowProducts(CustomGraphPass):
    """For torch._inductor.config.post_grad_custom_pre_pass."""

    def __call__(self, graph: fx.Graph) -> None:
        _share(graph, shared=0)
        _share(graph, shared=1)
        _sum(graph)
        add_to_narrow(graph, _narrow_terms(graph))
        renew_views(graph)

    def uuid(self) -> bytes:
        """Of the code and not of its paths, which another machine may not share."""
        files = (__file__, graphs.__file__, added.__file__)
        return sha256(b"".join(Path(file).read_bytes() for file in files)).digest()


def _size(node: fx.Node) -> tuple[int, int]:
    rows, columns = node.meta["val"].shape
    return rows, columns


def _products(graph: fx.Graph, narrow: Callable[[int, int, int], bool]) -> list[fx.Node]:
    """mm of a [M, K] and b [K, N], all sizes known, of which narrow(M, K, N)."""
    found = []
    for node in graph.find_nodes(op="call_function", target=MM):
        (rows, inner), (_, columns) = map(_size, node.args)
        if all(isinstance(size, int) for size in (rows, inner, columns)) and narrow(rows, inner, columns):
            found.append(node)
    return sorted(found)


def _is_narrow(size: int, beside: int) -> bool:
    return size <= MERGED and 4 * size <= beside


def _is_bound_in_memory(node: fx.Node, strides: bool) -> bool:
    """Whether this cannot be part of another tensor: it is read by address or, if `strides` differ, is a result."""
    for user in node.users:
        if user.op == "output":
            seen = user.meta.get("user_visible_output_idxs", ()) if strides else ()
            bound = any(user.args[0][index] is node for index in seen)
        else:
            view = user.target in VIEWS or getattr(user.target, "is_view", False)
            bound = user.target in AS_STRIDED or (view and _is_bound_in_memory(user, strides))
        if bound:
            return True
    return False


def _share(graph: fx.Graph, shared: int) -> None:
    """Merge products of one left factor (shared 0) that have few columns, or of one right factor that have few rows."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in _products(graph, lambda m, k, n: _is_narrow(n, k) if shared == 0 else _is_narrow(m, n)):
        if not _is_bound_in_memory(node, strides=shared == 0):
            groups[node.args[shared]].append(node)
    own = 1 - shared
    for products in groups.values():
        factor = products[0].args[shared]  # now: it may be a product itself, merged since
        parts = [product.args[own] for product in products]
        turned = all(part.target is PERMUTE and list(part.args[1]) == [1, 0] for part in parts)
        sources = [part.args[0] for part in parts] if turned else parts  # as they lie in memory
        read = [factor, *sources]
        place = _first_behind(graph, max(read))
        early = _used_before(place, products, read)
        if len(products) < 2 or early is None:
            continue
        for node in early:
            place.prepend(node)
        place = min([place, *early])
        with graph.inserting_before(place):
            wide = _joined(graph, sources, shared if turned else own, place)
            if turned:
                wide = call(graph, PERMUTE, wide, [1, 0])
            merged = call(graph, MM, *((factor, wide) if shared == 0 else (wide, factor)))
            start, results = 0, []
            for product in products:
                end = start + _size(product)[own]
                results.append(call(graph, SLICE, merged, own, start, end))
                start = end
        for product, result in zip(products, results, strict=True):
            _replace(graph, product, result)


def _used_before(place: fx.Node, products: list[fx.Node], read: list[fx.Node]) -> list[fx.Node] | None:
    """What needs these results ahead of `place`, in order, where that is nothing but their transposes; else None.

    None too where one of the products is made from another's result, which is among what they `read`.
    """
    if any(product in read for product in products):
        return None
    early: set[fx.Node] = set()
    ahead = [user for product in products for user in product.users if user < place]
    while ahead:
        node = ahead.pop()
        if node.target is not PERMUTE or node in read:
            return None
        early.add(node)
        ahead += [user for user in node.users if user < place]
    return sorted(early)


def _narrow_terms(graph: fx.Graph) -> list[fx.Node]:
    return _products(graph, lambda m, k, n: _is_narrow(k, n))


def _sum(graph: fx.Graph) -> None:
    """Merge products with few terms in each sum whose results are added up anyway."""
    groups: dict[tuple[fx.Node, tuple[int, int]], list[fx.Node]] = defaultdict(list)
    for node in _narrow_terms(graph):
        if (total := added_up_in(node)) is not None:
            groups[total, _size(node)].append(node)
    for products in groups.values():
        if len(products) < 2:
            continue
        *others, last = products
        with graph.inserting_before(last):
            factors = [[product.args[side] for product in products] for side in (0, 1)]
            merged = call(graph, MM, _joined(graph, factors[0], 1, last), _joined(graph, factors[1], 0, last))
        _replace(graph, last, merged)
        for product in others:
            leave_out(graph, product)
            graph.erase_node(product)


def _first_behind(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Where new nodes that read this one may go, which is behind all of the graph's inputs."""
    if node.op == "placeholder":
        node = graph.find_nodes(op="placeholder")[-1]
    return node.next


def _joined(graph: fx.Graph, nodes: list[fx.Node], dim: int, place: fx.Node) -> fx.Node:
    """These tensors one beside another along `dim`, made ahead of `place` if they were not before."""
    for user in nodes[0].users:
        if user.target is CAT and user.args == (nodes, dim) and user < place:
            return user
    return call(graph, CAT, nodes, dim)


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    factors: Iterable[fx.Node] = old.args
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    for factor in factors:
        if factor.target is PERMUTE and not factor.users:
            graph.erase_node(factor)
