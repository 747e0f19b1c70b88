"""What passes over the graphs of compiled layers have in common (merged.py, added.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)
MM, ADD = torch.ops.aten.mm.default, torch.ops.aten.add.Tensor


def call(graph: fx.Graph, target: Callable, *args: object) -> fx.Node:
    """A new node behind the one that was made before, with the value that its kind needs to be known by."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
    return node


def added_up_in(node: fx.Node) -> fx.Node | None:
    """The last of the additions that this product alone goes through, each of tensors of one shape and dtype."""
    total = None
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in VIEWS:
            node = user
        elif _adds_two_alike(user):
            node = total = user
        else:
            break
    return total


def _adds_two_alike(node: fx.Node) -> bool:
    if node.target is not ADD or node.kwargs or len(node.args) != 2:
        return False
    if not all(isinstance(arg, fx.Node) for arg in node.args) or node.args[0] is node.args[1]:
        return False
    first, second = (arg.meta["val"] for arg in node.args)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):  # a size that varies
        return False
    return first.shape == second.shape and first.dtype == second.dtype


def leave_out(graph: fx.Graph, term: fx.Node) -> None:
    """Take a term out of the addition that it goes to."""
    gone = [term]
    while gone[-1].target is not ADD:
        (user,) = gone[-1].users
        gone.append(user)
    addition, summand = gone[-1], gone[-2]
    (other,) = (arg for arg in addition.args if arg is not summand)
    addition.replace_all_uses_with(other)
    for node in reversed(gone[1:]):
        graph.erase_node(node)


def renew_views(graph: fx.Graph) -> None:
    """Let the value of each view lie in that of what it is a view of now.

    The compiler does so for nodes whose arguments are new, which torch 2.11 tells by an address that may be used again:
    it then copied what an operation changes in place, for a view that seemed to read it as it was.
    """
    for node in graph.nodes:
        if not (node.target in VIEWS or getattr(node.target, "is_view", False)):
            continue
        value, source = node.meta["val"], node.all_input_nodes[0].meta["val"]
        if isinstance(source, torch.Tensor) and not _share_memory(value, source):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
            node.meta["val"] = node.target(*args, **kwargs)


def _share_memory(value: object, other: torch.Tensor) -> bool:
    """Of one or several views."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(each.untyped_storage()._cdata == other.untyped_storage()._cdata for each in values)
