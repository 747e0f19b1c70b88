"""What three compiled layers of a real shape have at once in a step, by the code that is generated for an H100, beside
what the preflight counts of them: without a GPU, in some ten seconds a case.

    python benchmarks/generated_steps.py
    python benchmarks/generated_steps.py '[{"model": "Qwen/Qwen3-0.6B", "method": "full", "tokens": 2048}]'
    python benchmarks/generated_steps.py --json ...

A case has a model of the catalogue, tokens of a row, and fields of the preflight's Setup (method, precision,
micro_batch_size, checkpointing, lora_targets, lora_dropout, dora, ...). What is there once a step, as what a layer's
backward pass has inside, is ten times the share of 3 layers that it is of a whole model: a count some per cent high
here is some tenths high there. A low one is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

if importlib.util.find_spec("triton") is None:
    sys.path.append(str(Path(sys.prefix) / "triton"))  # where `make setup` puts it; torch looks once
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from allocations import Recorder
from generated_allocations import Played

from loadmaster.config.schema import ModelConfig
from loadmaster.data import MicroBatch
from loadmaster.models import compiled
from loadmaster.models.forward import token_losses
from loadmaster.models.load import DTYPES
from loadmaster.models.recompute import checkpoint_activations
from loadmaster.preflight.config_json import find_config, from_config
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.step import training_step
from loadmaster.training.metas import Metas
from loadmaster.training.trace import _meta_model, with_trained_part

LAYERS, WORDS, TOKENS = 3, 2000, 4096
EIGHT, SMALL, PHI3 = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B", "microsoft/Phi-3-mini-4k-instruct"
CASES = [
    {"model": model, "method": method, "precision": precision, "checkpointing": checkpointing}
    for model in (EIGHT, SMALL)
    for method, precision in (("lora", "bf16"), ("lora", "fp8"), ("full", "bf16"), ("full", "fp8"))
    for checkpointing in ("none", "selective")
]
CASES += [{"model": PHI3, "method": "full", "precision": precision} for precision in ("bf16", "fp8")]


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """The case with the bytes that its step has at once in `generated`, and the preflight's in `counted`."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in case.items()}
    tokens = fields.pop("tokens", TOKENS)
    config, _ = find_config(ModelConfig(name=fields.pop("model")))
    config |= {"num_hidden_layers": LAYERS, "vocab_size": WORDS}
    config |= {name: 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config |= {"tie_word_embeddings": False}  # a tied table's gradients are added in place, but not under a recorder
    kinds = config.get("layer_types")
    config |= {"layer_types": kinds[:LAYERS]} if kinds else {}
    shape = from_config(config, config["model_type"])
    setup = Setup(
        **{"precision": "bf16", "optimizer": "adamw", "master_weights": True, "compiled": True} | fields,
        sequence_length=tokens,
    )
    return case | {"generated": generated(config, setup, tokens), "counted": int(training_step(shape, setup).peak)}


def generated(config: dict[str, Any], setup: Setup, tokens: int) -> int:
    torch._dynamo.reset()
    recorder = Recorder("meta", Metas())
    recorder.multiplied = lambda: None
    model = with_trained_part(_meta_model(config, DTYPES[setup.precision]), setup)
    checkpoint_activations(model, setup.checkpointing, setup.kept_layers)
    compiled.BACKEND = Played(recorder)
    compiled.compile_layers(model)
    recorder.held(model)
    before = len(recorder.events)
    model.train()
    ids = torch.zeros(setup.micro_batch_size, tokens, dtype=torch.long)
    with recorder:
        loss, _ = token_losses(model, MicroBatch(ids, ids, torch.arange(tokens).expand_as(ids)))
        loss.backward()
    live = most = 0
    there: dict[int, int] = {}
    for number, size in recorder.events[before:]:
        if size:
            there[number] = size
        live += size or -there.pop(number, 0)  # what was there before, a weight, is not let go
        most = max(most, live)
    return most


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", type=json.loads, default=CASES, help="a list of cases as JSON")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    for case in asked.cases:
        found = compare(case)
        most, counted = found["generated"], found["counted"]
        said = ", ".join(f"{name} {value}" for name, value in case.items())
        line = f"{said}: generated {most / 1e6:,.1f} MB, counted {counted / 1e6:,.1f} ({counted / most - 1:+.2%})"
        print(json.dumps(found) if asked.json else line, flush=True)
