"""Adapters over nf4 and fp8 bases that two processes hold half of each: the losses are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import DTensor

from loadmaster.config.schema import LoraConfig
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.forward import causal_lm
from loadmaster.models.frozen import FORMS, FrozenLinear
from loadmaster.models.load import random_model
from loadmaster.models.recompute import checkpoint_activations

STEPS, RANKS = 20, 2
SHAPE = {
    "model_type": "llama", "hidden_size": 72, "intermediate_size": 101, "num_hidden_layers": 2, "vocab_size": 300,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def model_over(form: str) -> nn.Module:
    """Every process makes the same: blocks of 64 run over the ends of rows, 101 rows are no even number."""
    model = random_model(SHAPE, torch.float32, "cpu", form)
    model.set_attn_implementation("sdpa")
    model = make_trainable(model, "lora", LoraConfig(rank=4, alpha=8))
    checkpoint_activations(model, "full")
    return model.train()


def losses(model: nn.Module, rank: int, ranks: int) -> list[float]:
    """Mean loss of each step over this rank's share of four rows."""
    rows = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], lr=3e-3)
    seen = []
    for _ in range(STEPS):
        mine = rows.chunk(ranks)[rank]
        loss = model(input_ids=mine, labels=mine, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def one_of_two(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for form in FORMS:
        model = model_over(form)
        for layer in causal_lm(model).get_decoder().layers:
            fully_shard(layer, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        fully_shard(model)
        held = [p for m in model.modules() if isinstance(m, FrozenLinear) for p in m.parameters()]
        assert all(isinstance(p, DTensor) and p.dtype == torch.uint8 and not p.requires_grad for p in held)
        found[form] = {
            "losses": losses(model, rank, RANKS), "bytes": sum(p.to_local().numel() for p in held),
            "all_bytes": sum(p.numel() for p in held),
        }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_of_a_frozen_base_each_train_as_one_does(tmp_path: Path):
    mp.spawn(one_of_two, (str(tmp_path),), nprocs=RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for form in FORMS:
        alone = losses(model_over(form), 0, 1)
        together = [sum(step) / RANKS for step in zip(*(each[form]["losses"] for each in found), strict=True)]
        assert alone[-1] < 0.98 * alone[0]
        assert together == pytest.approx(alone, rel=0, abs=1e-5)
        held = [each[form]["bytes"] for each in found]
        assert sum(held) == found[0][form]["all_bytes"] and max(held) - min(held) < 0.03 * sum(held)
