"""What the trained model says, for a server to be compared with; in a process of its own.

Log-probabilities of held-out documents, each alone (a server cannot be given a packed row), under the model as
trained, under its base and under each quantized export as it lies on disk; and greedy answers of the trained one, with
how sure it is that they end where they do. An export whose activations are rounded is scored twice: as its server does
it, and with the activations left in bf16. The process ends before a server starts, so both never share the memory.
"""

from __future__ import annotations

import itertools
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadmaster import collector

if __name__ == "__main__":  # before what takes long to import
    collector.pause()

import numpy as np
import torch
from torch import nn

from loadmaster.data import Conversation, PackedRow, collate
from loadmaster.evaluation.generate import generate_ids, prompt_ids, stop_ids
from loadmaster.export.loading import load_export
from loadmaster.export.process import progress, read_spec, step, write_result
from loadmaster.export.room import spread_over
from loadmaster.models.forward import logits_of, trained_hidden
from loadmaster.models.frozen import round_inputs
from loadmaster.models.load import DTYPES, load_base, load_trained
from loadmaster.models.loss import CHUNK_TOKENS
from loadmaster.models.spread import NoRoom, free_device_memory
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.out_of_memory import ran_out

BATCH_SIZE = 8


def main(arguments: list[str]) -> None:
    told = read_spec(arguments)
    base, trained = Path(told["base"]), Path(told["trained"])
    device = spread_over(told["device"], Path(told["scratch"]), told["working"], told["passing"], kept=0.0)
    how: dict[str, Any] = {"dtype": DTYPES[told["precision"]], "device": device, "frozen": told["frozen"]}
    tokenizer = load_tokenizer(base)
    rows = [_row(document) for document in told["documents"]]
    conversations = [Conversation(**conversation) for conversation in told["prompts"]]

    progress("scoring the trained model")
    model = load_trained(base, trained, **how)
    round_inputs(model, False)  # as `verify` holds it
    scored = [_scored(model, row, tokenizer.pad_token_id) for row in rows]
    answers = generate_ids(model, tokenizer, conversations, told["max_new_tokens"], BATCH_SIZE)
    margins = [
        end_margin(model, tokenizer, conversation, ids) if len(ids) < told["max_new_tokens"] else None
        for conversation, ids in zip(conversations, answers, strict=True)
    ]
    progress("scoring its base")
    if hasattr(model, "disable_adapter"):
        without = model.disable_adapter()
    else:
        del model
        free_device_memory()
        model, without = load_base(base, **how).eval(), nullcontext()
    with without:
        of_base = [_scored(model, row, tokenizer.pad_token_id) for row in rows]
    on_disk, rounded, broken = {}, {}, {}
    for name, folder in told["exports"].items():
        progress(f"scoring {name} from disk")
        model = rounding = layer = None  # each holds on to the model before
        free_device_memory()
        try:
            model = load_export(Path(folder), device)
        except Exception as error:  # the folder may hold anything; the other formats are checked all the same
            if isinstance(error, NoRoom) or ran_out(error):  # say nothing of the folder
                raise
            broken[name] = str(error)
            continue
        rounding = rounding_layers(model)
        if rounding:
            rounded[name] = [_scored(model, row, tokenizer.pad_token_id)["own"] for row in rows]
        for layer in rounding:
            layer.quantization_enabled = False
        on_disk[name] = [_scored(model, row, tokenizer.pad_token_id)["own"] for row in rows]

    write_result(
        told,
        {
            "documents": [
                {
                    "ids": row.input_ids.tolist(), "positions": _positions(row),
                    "trained": ours["own"], "top": ours["top"], "base": theirs["own"],
                    "exports": {name: each[number] for name, each in on_disk.items()},
                    "rounded": {name: each[number] for name, each in rounded.items()},
                }
                for number, (row, ours, theirs) in enumerate(zip(rows, scored, of_base, strict=True))
            ],
            "broken": broken,
            "answers": [
                {
                    "ids": ids, "text": tokenizer.decode(ids, skip_special_tokens=True),
                    "ended": margin is not None, "end_margin": margin,
                }
                for ids, margin in zip(answers, margins, strict=True)
            ],
        },
    )


def split_row(row: PackedRow) -> list[PackedRow]:
    """The documents of a packed row, each a row of its own."""
    starts = [*np.flatnonzero(row.position_ids == 0).tolist(), len(row)]
    return [
        replace(
            row, input_ids=row.input_ids[start:end], labels=row.labels[start:end],
            position_ids=row.position_ids[start:end], document_ids=[],
        )
        for start, end in itertools.pairwise(starts)
    ]


@torch.no_grad()
def end_margin(model: nn.Module, tokenizer: Any, conversation: Conversation, ids: list[int]) -> float:
    """By how much the likeliest token that ends an answer is likelier, behind `ids`, than the likeliest other; nats."""
    stops = stop_ids(model, tokenizer)
    whole = [*prompt_ids(tokenizer, conversation), *ids, stops[0]]
    row = _row({"input_ids": whole, "labels": [-100] * (len(whole) - 1) + stops[:1]})
    hidden, _, _ = trained_hidden(model, collate([row], stops[0]))
    logits = logits_of(model, hidden)[0]
    ending = logits[stops].max()
    logits[stops] = -torch.inf
    return float(ending - logits.max())


def rounding_layers(model: nn.Module) -> list[Any]:
    """Layers of an export that round their inputs, as compressed-tensors does it where `quantization_enabled`."""
    schemes = ((layer, getattr(layer, "quantization_scheme", None)) for layer in model.modules())
    return [layer for layer, scheme in schemes if scheme is not None and scheme.input_activations is not None]


def _row(document: dict[str, list[int]]) -> PackedRow:
    ids = np.array(document["input_ids"])
    return PackedRow(ids, np.array(document["labels"]), np.arange(len(ids)), [])


def _positions(row: PackedRow) -> list[int]:
    """Where trained tokens stand that have one before them: those whose log-probabilities are taken, in order."""
    return [at for at in np.flatnonzero(row.labels != -100).tolist() if at > 0]


@torch.no_grad()
def _scored(model: nn.Module, row: PackedRow, pad_token_id: int) -> dict[str, list[Any]]:
    """Of each trained token: its log-probability, and the likeliest one there. Logits are alive a chunk at a time."""
    own: list[float] = []
    top: list[int] = []
    hidden, targets, _ = trained_hidden(model, collate([row], pad_token_id))
    for some, true in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
        log_p = torch.log_softmax(logits_of(model, some), dim=-1)
        own += log_p.gather(-1, true.unsqueeze(-1)).squeeze(-1).tolist()
        top += log_p.argmax(-1).tolist()
    return {"own": own, "top": top}


if __name__ == "__main__":
    step(main, sys.argv[1:])
