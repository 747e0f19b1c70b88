"""A card's own kernels held against exact arithmetic: a minute on a GPU that nothing was run on before.

    python benchmarks/gpu_kernels.py            attention of packed documents, and products over nf4 and FP8 bases
    python benchmarks/gpu_kernels.py --size 256 smaller products, as the tests run it

Everything else that training runs was held against a CPU's numbers, or is read off generated code; these operations
have kernels of a card alone. Of each output and gradient it prints how far it is from float32's as a
share of the norm, and ends with 1 where that is beyond a limit.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

from loadmaster.models.attention import _by_document
from loadmaster.models.flash import LENGTHS, WHOLE_LIMIT, Call, apart, results
from loadmaster.models.frozen import FORMS

CALLS = Call(32, 8, 128, None, None), Call(8, 4, 256, 0.05, 64), Call(9, 3, 64, None, None)
"""Llama 3.1 8B, Gemma 3 in its windows, SmolLM2."""
ROWS = 1, 7, 4096
"""One of generation, one that no tile divides, a micro-batch's."""
LIMITS = {"nf4": 0.01, "fp8": 0.06}
"""Of bf16's rounding, and that of inputs and gradients to FP8: 0.002 and 0.027 on a CPU's kernels."""


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs of the products; most of their rows, too")
    told = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, or none that PyTorch can use")
    torch.manual_seed(0)
    device, beyond = torch.device("cuda"), 0
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    cases = [(f"attention {call}, {lengths}", WHOLE_LIMIT, attention, (call, lengths, device))
             for call in CALLS for lengths in LENGTHS]
    cases += [(f"{form}, {rows} rows", limit, products, (form, rows, told.size, device))
              for form, limit in LIMITS.items() for rows in [min(each, told.size) for each in ROWS]]
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
