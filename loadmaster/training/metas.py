"""Operations on the meta device, each worked out once: layers repeat, and sizes come of sizes alone.

Much of PyTorch's arithmetic of sizes is Python, and takes the most of a traced step. What makes new storages, or
changes its first argument's values, is remembered by the sizes and settings that it was given; views, and whatever has
values, are done each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PLAIN = (torch.Tensor, nn.Parameter)
AGAIN, FIRST_ARGUMENT = "again", "first argument"


class Metas:
    """Does operations, or makes tensors as they would: `Metas()(function, args, kwargs)` in a dispatch mode."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __call__(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            key = (function, _key(args), _key([*kwargs.items()]) if kwargs else ())
            known = self.known.get(key)
        except TypeError:  # a subclass, a tensor with values, or something without a hash
            return function(*args, **kwargs)
        if known is None:
            result = function(*args, **kwargs)
            self.known[key] = _known(function, args, kwargs, key[1], result)
            return result
        if known is AGAIN:
            return function(*args, **kwargs)
        if known is FIRST_ARGUMENT:
            return args[0]
        several, forms = known
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in forms]
        return several(made) if several else made[0]


def _key(value: Any) -> Any:
    kind = type(value)
    if kind in PLAIN:
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list:
        return tuple([_key(part) for part in value])
    if isinstance(value, torch.Tensor):
        raise TypeError
    return kind, value


def _known(function: Any, args: Any, kwargs: dict[str, Any], key: Any, result: Any) -> Any:
    if function._schema.is_mutable:
        itself = args and result is args[0] and torch.Tag.inplace_view not in function.tags and _key(args) == key
        return FIRST_ARGUMENT if itself and function._schema.name.endswith("_") else AGAIN
    several = type(result) if isinstance(result, tuple | list) else None
    made = list(result) if several else [result]
    if not made or not all(type(tensor) is torch.Tensor and tensor.is_meta for tensor in made):
        return AGAIN
    forms = [(tensor.size(), tensor.stride(), tensor.dtype) for tensor in made]
    storages = {tensor.untyped_storage()._cdata for tensor in made}
    given = {tensor.untyped_storage()._cdata for tensor in _tensors([args, *kwargs.values()])}
    alone = len(storages) == len(made) and not storages & given  # else a view, said or not
    for tensor, (size, stride, dtype) in zip(made, forms, strict=True):
        like = torch.empty_strided(size, stride, dtype=dtype, device="meta")
        alone &= like.untyped_storage().nbytes() == tensor.untyped_storage().nbytes() and not tensor.storage_offset()
    return (several, forms) if alone else AGAIN


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []
