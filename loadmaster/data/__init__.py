"""The data room: sources, chat rendering and loss mask, packing, loader with exact position.

`prepare` is the way in. Each name is fetched on first use: a plan that reads the size of files needs no numpy, and
nothing here but `collate` imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadmaster.data.formats import Conversation, in_turn, prompt_and_reference
    from loadmaster.data.microbatch import MicroBatch, collate
    from loadmaster.data.prepared import PreparedData, prepare, refuse_bad_rows
    from loadmaster.data.preview import describe, judged_alone, show
    from loadmaster.data.render import stop_token_ids, template_hash
    from loadmaster.data.rows import PackedRow, PackedRows, packed_rows
    from loadmaster.data.sampler import BatchSampler

_LIES_IN = {
    "formats": ("Conversation", "in_turn", "prompt_and_reference"), "microbatch": ("MicroBatch", "collate"),
    "prepared": ("PreparedData", "prepare", "refuse_bad_rows"), "preview": ("describe", "judged_alone", "show"),
    "render": ("stop_token_ids", "template_hash"), "rows": ("PackedRow", "PackedRows", "packed_rows"),
    "sampler": ("BatchSampler",),
}

__all__ = [
    "BatchSampler", "Conversation", "MicroBatch", "PackedRow", "PackedRows", "PreparedData", "collate", "describe",
    "in_turn", "judged_alone", "packed_rows", "prepare", "prompt_and_reference", "refuse_bad_rows", "show",
    "stop_token_ids", "template_hash",
]


def __getattr__(name: str) -> Any:
    for module, names in _LIES_IN.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
