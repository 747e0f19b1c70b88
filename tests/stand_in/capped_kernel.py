"""The fused attention kernel of capped scores on a stand-in of a GPU, by Triton's interpreter, against the exact one.

Run by test_training.py; prints, by window, how far output and gradients of q, k and v are from those of fp32, as a
share of their norm.
"""

from __future__ import annotations

import json

import torch

from loadmaster.models import capped

BOUNDS, SOFTCAP, SCALE = [0, 100, 180, 256], 50.0, 0.125
"""One block holds the end of a document and a whole one."""


def main() -> None:
    torch.manual_seed(0)
    found = {}
    for window in (None, 64):
        inputs = [torch.randn(1, heads, BOUNDS[-1], 64).bfloat16() for heads in (4, 2, 2)]
        gradient = torch.randn(1, 4, BOUNDS[-1], 64).bfloat16()
        exact, fused = ([x.to(device, dtype).requires_grad_() for x in inputs] for device, dtype in
                        (("cpu", torch.float32), ("cuda", torch.bfloat16)))
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        expected, _ = capped.capped_attention(*exact, bounds, SCALE, SOFTCAP, window)
        blocks = capped.visible_blocks(BOUNDS, [window], torch.device("cuda"))
        output = capped._compiled()(*fused, blocks["documents"], blocks["blocks"][window], SCALE, SOFTCAP, window)
        expected.backward(gradient.float())
        output.backward(gradient.cuda())
        pairs = [(output, expected), *((mine.grad, theirs.grad) for mine, theirs in zip(fused, exact, strict=True))]
        with torch.no_grad():
            found[str(window)] = [float((a.cpu().float() - b).norm() / b.norm()) for a, b in pairs]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
