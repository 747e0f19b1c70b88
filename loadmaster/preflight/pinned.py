"""What pinned host memory takes: PyTorch's allocator rounds every block up to a power of two.

    at::CachingHostAllocator   size = PowerOf2Ceil(size), without a least one. A block that is let go stays in the pool
                               of its process, pinned, for another that rounds to the same size.

Pinned are, with a GPU: fsdp offload=all: each parameter's shard and each gradient's, a block each (FSDPParam,
foreach_reduce). DeepSpeed's offload: what zero.py says. Inputs under activation_checkpointing=offload, in pieces.
Copies for checkpoints, where there is room. Not pinned: what our optimizer steps on the host, its states, the
rehearsal's copy, moments. Sources: torch 2.13, deepspeed 0.19.8.
"""

from __future__ import annotations

PIECE_BYTES = 2**26
"""Smallest piece that an input is cut into (loadmaster.models.recompute); the last one may be less."""


def pinned(size: int) -> int:
    """Bytes that a block of so many takes."""
    return 1 << (size - 1).bit_length() if size else 0


def in_pieces(size: int) -> int:
    """Bytes that an input of so many takes, cut into pieces that are powers of two, and a rest."""
    return size - size % PIECE_BYTES + pinned(size % PIECE_BYTES)
