"""Products of bf16 by float32, in a process of its own: PyTorch keeps what is registered until it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from loadmaster.export.loading import load_export
from loadmaster.models import bf16_products
from loadmaster.models.load import load_base
from loadmaster.models.shards import empty_model

CHECK = """
import warnings
warnings.simplefilter("error")
import torch
from torch.nn.functional import linear
from loadmaster.models import bf16_products

bf16_products.lacks_bf16 = lambda: True
bf16_products.quicken()
bf16_products.quicken()
torch.manual_seed(0)
bf16_products.FEWEST_ROWS = 2
bf16_products.BLOCK = 64 * 7  # 50 columns are blocks of 7, and one column of the last

def drawn(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)

def near(made, right, off=0.004):  # half of bf16's step, twice where a sum of such is rounded again
    assert made.dtype == torch.bfloat16 and made.shape == right.shape
    assert (made.double() - right).abs().max() <= off * right.abs().max(), (made.double() - right).abs().max()

x, weight, bias = drawn(3, 5, 64), drawn(50, 64), drawn(50)
for added in (None, bias):
    x.grad = weight.grad = bias.grad = None
    made = linear(x, weight, added)
    exact = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    right = linear(exact[0], exact[1], None if added is None else exact[2])
    near(made, right)
    pull = drawn(3, 5, 50).detach()
    made.backward(pull)
    right.backward(pull.double())
    near(x.grad, exact[0].grad)
    near(weight.grad, exact[1].grad)
    if added is not None:
        near(bias.grad, exact[2].grad, 0.02)  # a sum that PyTorch makes in bf16

with torch.inference_mode():
    rows, columns = x[0], weight.t()
    right = 0.5 * bias.double() - 2 * rows.double() @ columns.double()
    near(torch.addmm(bias, rows, columns, beta=0.5, alpha=-2), right)
    assert torch.addmm(torch.full_like(bias, torch.nan), rows, columns, beta=0).isfinite().all()
    for given in (bias.new_empty(5, 50), bias.new_empty(0), bias.new_empty(50, 5).t()):
        assert torch.addmm(bias, rows, columns, beta=0.5, alpha=-2, out=given) is given
        near(given, right)
    near(torch.bmm(x, x.mT), x.double() @ x.double().mT)
    near(torch.mm(rows, columns, out=bias.new_empty(5, 50)), rows.double() @ columns.double())
    near(x.mT[1] @ x[1], x.double().mT[1] @ x.double()[1])
    assert linear(x[:, :0], weight).shape == (3, 0, 50)
    assert (rows[:, :0] @ columns[:0]).eq(0).all()
    near(linear(x[0, :1], weight), x[0, :1].double() @ weight.double().t())
    near(weight @ bias.new_ones(64), weight.double().sum(1))
    assert torch.equal(rows.float() @ columns.float(), torch.mm(rows.float(), columns.float()))
try:
    rows @ columns[:5]
except RuntimeError as error:
    assert "shapes cannot be multiplied" in str(error), error
else:
    raise AssertionError("shapes that do not fit were multiplied")
for multiply, left, right in (
    (torch.mm, rows[0], columns), (torch.mm, rows, columns[:, 0]), (torch.mm, rows, columns[None, :, :50]),
    (torch.mm, rows, bias.new_ones(1, 64, 64)), (torch.bmm, rows[0], x),
):
    try:
        multiply(left, right)
    except RuntimeError as error:
        assert "must be a" in str(error), error
    else:
        raise AssertionError("factors that are no matrices were multiplied")
try:
    torch.mm(rows.detach(), columns.detach(), out=torch.empty(5, 50))
except RuntimeError as error:
    assert "dtype" in str(error), error
else:
    raise AssertionError("a result of another dtype was filled")
try:
    rows @ columns.float()
except RuntimeError as error:
    assert "dtype" in str(error), error
else:
    raise AssertionError("two dtypes were multiplied")
print("right")
"""


def test_products_and_their_gradients_are_those_of_float64_to_a_rounding():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "right", done.stderr


@pytest.mark.parametrize(("cpu", "lacks"), [
    ({"architecture": "x86_64", "avx2": True}, True), ({"architecture": "x86_64", "avx512_f": True}, True),
    ({"architecture": "x86_64", "avx512_bf16": True}, False), ({"architecture": "x86_64", "amx_bf16": True}, False),
    ({"architecture": "aarch64", "neon": True}, False),
])
def test_only_x86_without_instructions_for_bf16_lacks_them(cpu, lacks, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert bf16_products.lacks_bf16() == lacks


@pytest.mark.parametrize("lacks", [True, False])
def test_nothing_is_registered_where_pytorchs_own_are_quick(lacks, monkeypatch):
    calls = []
    monkeypatch.setattr(bf16_products, "_registered", lambda: calls.append(1))
    monkeypatch.setattr(bf16_products, "lacks_bf16", lambda: lacks)
    bf16_products.quicken()
    assert len(calls) == lacks


def test_whatever_way_a_model_is_loaded_its_products_are_quick(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(bf16_products, "_registered", lambda: calls.append(1))
    monkeypatch.setattr(bf16_products, "lacks_bf16", lambda: True)
    ways = (
        lambda: load_base(tiny, torch.bfloat16, "cpu"), lambda: empty_model(tiny, torch.bfloat16),
        lambda: load_export(tiny, "cpu"),
    )
    for count, load in enumerate(ways, 1):
        load()
        assert len(calls) == count
