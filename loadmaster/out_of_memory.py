"""A GPU's memory that ran out in the middle of a stage, as an error that says where and what would do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loadmaster.errors import LoadmasterError

REMEDIES = {
    "train": "the same command goes on from the last checkpoint: with activation_checkpointing=full, a smaller "
    "micro_batch_size, or plan.reserve=0.1, which leaves more of the card free",
    "evaluate": "the same command goes on with this stage: with a smaller evaluation.batch_size or "
    "evaluation.max_new_tokens",
    "export": "the same command goes on with this stage: with a smaller evaluation.batch_size, or on a larger card",
}


WORDS = ("out of memory", "cublas_status_alloc_failed")
"""In what is said where memory was asked for past PyTorch's allocator: by cuBLAS, by NCCL, to load a kernel, to pin."""


def ran_out(error: BaseException | None) -> bool:
    """Whether an error says that a GPU's memory ran out, or the host's that is pinned for it. Not a compiler's."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    if isinstance(error, torch.OutOfMemoryError):
        return True
    compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return not compiler and any(word in str(error).lower() for word in WORDS)


@contextmanager
def explained(stage: str) -> Iterator[None]:
    """Raises LoadmasterError for what torch raises where a GPU has no more memory."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise LoadmasterError(
            f"out of GPU memory in the {stage} stage{seen()}. Another program on the card may hold some of it "
            f"(nvidia-smi lists them).\nfix: {REMEDIES[stage]}"
        ) from error


def seen() -> str:
    """What this process had of its GPU, and what is free: the rest of it is another program's."""
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    peak, free, total = (size / 2**30 for size in (torch.cuda.max_memory_allocated(), free, total))
    return f" ({peak:.1f} GiB allocated at the peak, {free:.1f} of {total:.1f} GiB free now)"
