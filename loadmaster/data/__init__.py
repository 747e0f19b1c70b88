"""The data room: sources, chat rendering and loss mask, packing, loader with exact position.

`prepare` is the way in. Nothing here imports torch but `collate`, which is fetched on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadmaster.data.formats import Conversation, prompt_and_reference
from loadmaster.data.prepared import PreparedData, prepare, refuse_bad_rows
from loadmaster.data.preview import describe, judged_alone, show
from loadmaster.data.render import stop_token_ids, template_hash
from loadmaster.data.rows import PackedRow, PackedRows, packed_rows
from loadmaster.data.sampler import BatchSampler

if TYPE_CHECKING:
    from loadmaster.data.microbatch import MicroBatch, collate

__all__ = [
    "BatchSampler", "Conversation", "MicroBatch", "PackedRow", "PackedRows", "PreparedData", "collate", "describe",
    "judged_alone", "packed_rows", "prepare", "prompt_and_reference", "refuse_bad_rows", "show", "stop_token_ids",
    "template_hash",
]


def __getattr__(name: str) -> Any:
    if name not in ("MicroBatch", "collate"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loadmaster.data import microbatch

    return getattr(microbatch, name)
