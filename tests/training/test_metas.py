"""Operations on the meta device that are remembered give what they give when they are done."""

import pytest
import torch

from loadmaster.training.metas import Metas
from loadmaster.training.trace import Case
from tests.preflight.traced import traced_peaks

ATEN = torch.ops.aten


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


class Counted:
    """An operation that counts how often it is done."""

    def __init__(self, operation):
        self.operation, self.done = operation, 0
        self._schema, self.tags = operation._schema, operation.tags

    def __call__(self, *args, **kwargs):
        self.done += 1
        return self.operation(*args, **kwargs)


@pytest.mark.parametrize(
    ("operation", "args", "kwargs"),
    [
        (ATEN.mm.default, (meta(3, 4), meta(4, 5)), {}),
        (ATEN.mul.Tensor, (meta(3, 4).t(), meta(3)), {}),
        (ATEN.cat.default, ([meta(3, 4), meta(2, 4)],), {}),
        (ATEN._to_copy.default, (meta(3, 4),), {"dtype": torch.float32}),
        (ATEN.max.dim, (meta(3, 4), 1), {}),
        (ATEN.arange.default, (5,), {"device": torch.device("meta")}),
    ],
)
def test_what_makes_new_storages_is_done_once(operation, args, kwargs):
    metas, counted = Metas(), Counted(operation)
    first, again = (metas(counted, args, kwargs) for _ in range(2))
    assert counted.done == 1
    pairs = [(first, again)] if isinstance(first, torch.Tensor) else zip(first, again, strict=True)
    for one, other in pairs:
        assert (one.size(), one.stride(), one.dtype, one.device) == (
            other.size(), other.stride(), other.dtype, other.device,
        )
        assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_a_number_of_another_type_is_another_operation():
    metas = Metas()
    whole = meta(3, dtype=torch.int64)
    assert [metas(ATEN.mul.Tensor, (whole, number), {}).dtype for number in (1, 1.0, 1)] == [
        torch.int64, torch.float32, torch.int64,
    ]


def test_what_is_changed_in_place_is_given_back():
    metas, counted = Metas(), Counted(ATEN.add_.Tensor)
    given = meta(3, 4)
    assert metas(counted, (given, 1.0), {}) is given
    other = meta(3, 4)
    assert metas(counted, (other, 1.0), {}) is other and counted.done == 1


@pytest.mark.parametrize(
    ("operation", "args"),
    [(ATEN.view.default, ([12],)), (ATEN._unsafe_view.default, ([12],)), (ATEN.t.default, ()), (ATEN.t_.default, ()),
     (ATEN.split.Tensor, (2,))],
)
def test_views_are_made_each_time(operation, args):
    metas, counted = Metas(), Counted(operation)
    for _ in range(3):
        given = meta(3, 4)
        made = metas(counted, (given, *args), {})
        for tensor in made if isinstance(made, tuple | list) else [made]:
            assert tensor.untyped_storage()._cdata == given.untyped_storage()._cdata
    assert counted.done == 3


def test_what_has_values_is_computed():
    metas = Metas()
    for number in (1.0, 2.0):
        assert metas(ATEN.add.Tensor, (torch.tensor(number), 1.0), {}).item() == number + 1


@pytest.mark.parametrize(
    ("method", "precision"),
    [("full", "bf16"), ("full", "fp8"), ("lora", "fp8"), ("qlora", "bf16")],
)
def test_a_traced_step_is_the_one_in_which_every_operation_is_done(method, precision, monkeypatch):
    config = {
        "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1000,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }
    cases = [Case(512), Case(512, "selective", accumulated=True)]
    if (method, precision) != ("full", "fp8"):
        cases.append(Case(512, "full", objective="orpo"))
    settings = {"precision": precision, "dropout": 0.0 if method == "full" else 0.1}
    found = traced_peaks(config, method, cases, **settings)
    monkeypatch.setattr(Metas, "__call__", lambda self, function, args, kwargs: function(*args, **kwargs))
    assert traced_peaks(config, method, cases, **settings) == found
