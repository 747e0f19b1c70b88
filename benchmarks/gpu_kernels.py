"""A card's own kernels held against exact arithmetic: a minute on a GPU that nothing was run on before.

    python benchmarks/gpu_kernels.py            attention of packed documents, products over nf4 and FP8 bases, adapters
    python benchmarks/gpu_kernels.py --size 256 smaller products, as the tests run it

Everything else that training runs was held against a CPU's numbers, or is read off generated code; these operations
have kernels of a card alone. Of each output and gradient it prints how far it is from float32's as a
share of the norm, and ends with 1 where that is beyond a limit.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from loadmaster.models.attention import _by_document
from loadmaster.models.compiled import set_compiler
from loadmaster.models.flash import LENGTHS, WHOLE_LIMIT, Call, apart, results
from loadmaster.models.frozen import FORMS

CALLS = Call(32, 8, 128, None, None), Call(8, 4, 256, 0.05, 64), Call(9, 3, 64, None, None)
"""Llama 3.1 8B, Gemma 3 in its windows, SmolLM2."""
ROWS = 1, 7, 4096
"""One of generation, one that no tile divides, a micro-batch's."""
LIMITS = {"nf4": 0.01, "fp8": 0.06}
"""Of bf16's rounding, and that of inputs and gradients to FP8: 0.002 and 0.027 on a CPU's kernels."""
RANK, ADAPTED_LIMIT = 16, 0.02
"""Of adapters. Of bf16's rounding of several products one after another: 0.006 on a CPU's kernels, 0.9 with a term that
is lost."""


def attention(call: Call, lengths: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """Of the output and each gradient: how far the whole is from float32, document by document."""
    own, bounds = results(call, lengths, device), [0, *torch.tensor(lengths).cumsum(0).tolist()]
    generator = torch.Generator(device).manual_seed(0)  # the numbers that `results` draws

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, call.head_dim, device=device, generator=generator)

    total, sharpness = bounds[-1], torch.logspace(-1, 1, call.heads, 2.0, device=device)[:, None]
    numbers = [
        normal(total, call.heads) * sharpness,
        normal(total, call.key_value_heads) + normal(1, call.key_value_heads),
        normal(total, call.key_value_heads),
    ]
    leaves = [each.bfloat16().float().requires_grad_() for each in numbers]
    d_output = normal(total, call.heads).bfloat16().float()
    q, k, v = (each.transpose(1, 2) for each in leaves)
    output = _by_document(q, k, v, bounds, call.scale, 0.0, call.window).transpose(1, 2)
    exact = dict(zip(own, (output, *torch.autograd.grad(output, leaves, d_output)), strict=True))
    return {name: apart(own[name], exact[name].detach())[1] for name in own}


def products(form: str, rows: int, size: int, device: torch.device) -> dict[str, float]:
    """Of a frozen layer's output and its input's gradient, eager and compiled, from what its codes say in float32."""
    weight = torch.randn(size // 4, size, device=device, dtype=torch.bfloat16)
    layer = FORMS[form](size, size // 4)
    layer.fill(weight)
    x = torch.randn(rows, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    d_output = torch.randn(rows, size // 4, device=device, dtype=torch.bfloat16)
    held = layer.multiplied_with(torch.bfloat16).float()
    exact = {"output": x.detach().float() @ held.t(), "dx": d_output.float() @ held}
    found = {}
    compiled = torch.compile(lambda layer, x: 1.0 * layer(x), dynamic=False)  # of fixed shapes, as decoder layers are
    for how, run in (("", nn.Module.__call__), ("compiled ", compiled)):
        output = run(layer, x)
        (d_x,) = torch.autograd.grad(output, x, d_output)
        for name, made in (("output", output), ("dx", d_x)):
            found[how + name] = ((made.detach().float() - exact[name]).norm() / exact[name].norm()).item()
    return found


class Adapted(nn.Module):
    """A frozen linear layer and its adapter, of which each is about half of the result."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.randn(outputs, RANK) / RANK**0.5)
        nn.init.normal_(self.base.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class GatedMLP(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.gate, self.up, self.down = Adapted(size, 2 * size), Adapted(size, 2 * size), Adapted(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def adapters(form: str, rows: int, size: int, device: torch.device) -> dict[str, float]:
    """Of an MLP's output, and its gradients at most, compiled as decoder layers are: sums of a base's products and an
    adapter's are made in place there (loadmaster/models/added.py)."""
    with device:
        mlp = GatedMLP(size).bfloat16()
    exact = copy.deepcopy(mlp).float()
    for layer, plain in zip(mlp.children(), exact.children(), strict=True):
        if form in FORMS:
            base = FORMS[form](layer.base.in_features, layer.base.out_features)
            base.fill(layer.base.weight.data)
            layer.base, plain.base.weight.data = base, base.multiplied_with(torch.bfloat16).float()
    x, d_output = (torch.randn(rows, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def results(run: Callable, mlp: nn.Module, x: Tensor, d_output: Tensor) -> list[Tensor]:
        trained = [x.requires_grad_(), *(each for each in mlp.parameters() if each.requires_grad)]
        output = run(mlp, x)
        return [output.detach(), *torch.autograd.grad(output, trained, d_output)]

    expected = results(nn.Module.__call__, exact, x.detach().float(), d_output.float())
    found = {}
    compiled = torch.compile(lambda mlp, x: mlp(x), dynamic=False)
    for how, run in (("", nn.Module.__call__), ("compiled ", compiled)):
        made = zip(results(run, mlp, x, d_output), expected, strict=True)
        output, *gradients = (((each.float() - other).norm() / other.norm()).item() for each, other in made)
        found |= {how + "output": output, how + "gradients": max(gradients)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs of the products; most of their rows, too")
    told = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, or none that PyTorch can use")
    torch.manual_seed(0)
    set_compiler()
    device, beyond = torch.device("cuda"), 0
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    cases = [(f"attention {call}, {lengths}", WHOLE_LIMIT, attention, (call, lengths, device))
             for call in CALLS for lengths in LENGTHS]
    cases += [(f"{form}, {rows} rows", limit, products, (form, rows, told.size, device))
              for form, limit in LIMITS.items() for rows in [min(each, told.size) for each in ROWS]]
    cases += [(f"adapters over {form}, {told.size} rows", ADAPTED_LIMIT, adapters, (form, told.size, told.size, device))
              for form in ("bf16", "nf4")]
    for name, limit, run, inputs in cases:
        try:
            found = run(*inputs)
        except Exception as error:  # the other kernels may be right
            said, wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", True
        else:
            said = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
            wrong = not all(value <= limit for value in found.values())  # NaN is beyond it
        beyond += wrong
        print(f"{'BEYOND ' if wrong else ''}{name}: {said} (limit {limit})", flush=True)
    return int(beyond > 0)


if __name__ == "__main__":
    sys.exit(main())
