"""Libraries imported without the optional ones that they would import too: seconds of every process's start.

transformers imports torchao for checkpoints in its formats, peft imports bitsandbytes (which imports torch's compiler)
for bases in its own; a base here is neither, and what does use the two (frozen.py, float8.py, the optimizers) imports
them for itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OPTIONAL = ("torchao", "bitsandbytes", "boto3")
"""boto3: of a questionnaire that accelerate has."""


@contextmanager
def without(*names: str) -> Iterator[None]:
    """What is imported here finds these packages missing, but for those that this process has imported before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # None: importlib's way to say that there is none
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name)


def peft_alone() -> None:
    """Import peft, which from then on takes every base for one without layers of bitsandbytes or torchao."""
    with without(*OPTIONAL):
        import peft  # noqa: F401
        from peft.import_utils import is_bnb_4bit_available, is_bnb_available, is_torchao_available

        for remembered in (is_bnb_available, is_bnb_4bit_available, is_torchao_available):
            remembered()


def deepspeed_told() -> None:
    """DeepSpeed, which accelerate imports when it saves, would warn where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
