"""Peak memory and speed of the real engine on a model with random weights: what benchmarks are made of.

The steps are those of the loop (same session, same backward, clip and step); only the weights and the
tokens are random. All tokens are trained, as in the rehearsal's worst case.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from loadmaster.config.schema import Job
from loadmaster.data import PackedRow
from loadmaster.models.frozen import frozen_form
from loadmaster.models.load import DTYPES, random_model
from loadmaster.preflight.plan import Plan
from loadmaster.training.batches import trained_tokens
from loadmaster.training.metrics import GIB, peak_memory
from loadmaster.training.session import make_session
from loadmaster.training.world import World


def random_rows(count: int, length: int, vocabulary: int, document_tokens: int, seed: int = 0) -> list[PackedRow]:
    """Rows of exactly `length` tokens, made of documents of `document_tokens`, every token trained."""
    generator = np.random.default_rng(seed)
    positions = np.arange(length) % document_tokens
    rows = []
    for index in range(count):
        ids = generator.integers(0, vocabulary, length)
        rows.append(PackedRow(ids, ids, positions, [f"random:{index}"]))
    return rows


def measure(job: Job, plan: Plan, config: dict[str, Any], steps: int = 5, warm_up: int = 2) -> dict[str, Any]:
    """Run `warm_up` + `steps` optimizer steps of one micro-batch each.

    config: the model's config.json as a dict. Returns peaks (GiB: loaded, allocated, reserved, device), seconds a
    step (median), tokens a second, and the last loss. Needs the memory of the job on this machine's device.
    """
    device = torch.device("cpu" if plan.hardware.gpu == "cpu" or not torch.cuda.is_available() else "cuda")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    base = random_model(config, DTYPES[plan.precision], device, frozen_form(plan.method, plan.precision))
    session = make_session(job, plan, World(device=device), pad_token_id=0, base=base)
    loaded = _allocated(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    length = plan.sequence_length
    rows = random_rows(plan.micro_batch_size, length, base.config.get_text_config().vocab_size, length)
    batches, trained = session.split(rows), sum(map(trained_tokens, rows))
    seconds = []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        loss = session.backward(batches, trained)
        session.optimizer.clip(job.optimizer.max_grad_norm)
        session.optimizer.step(job.optimizer.lr)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    step_s = float(np.median(seconds[warm_up:]))
    return {
        "loaded_gib": loaded,
        **peak_memory(device),
        "step_s": step_s,
        "tokens_per_second": plan.micro_batch_size * length / step_s,
        "loss": loss.item(),
    }


def _allocated(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return peak_memory(device)["peak_allocated_gib"]
