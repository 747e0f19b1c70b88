"""Peak memory and speed of the real engine on a model with random weights, for memory.py.

The steps are those of the loop (same session, same backward, clip and step); only the weights and the
tokens are random. All tokens are trained, as in the rehearsal's worst case.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from loadmaster.config.rates import peak_rate
from loadmaster.config.schema import Job
from loadmaster.data import PackedRow
from loadmaster.models.frozen import frozen_form
from loadmaster.models.load import DTYPES, random_model
from loadmaster.preflight.plan import Plan
from loadmaster.training.batches import losses
from loadmaster.training.metrics import allocated_gib, peak_memory, reset_peak
from loadmaster.training.session import make_session
from loadmaster.training.world import World
from loadmaster.world_stages import device_type


def random_rows(count: int, length: int, vocabulary: int, document_tokens: int) -> list[PackedRow]:
    """Rows of exactly `length` tokens, made of documents of `document_tokens`, every token trained.

    Documents next to each other have ids as of a preference pair: two of them are one.
    """
    generator = np.random.default_rng(0)
    positions = np.arange(length) % document_tokens
    documents = -(-length // document_tokens)
    rows = []
    for index in range(count):
        ids = generator.integers(0, vocabulary, length)
        rows.append(PackedRow(ids, ids, positions, [f"random:{index}:{i}" for i in range(documents)]))
    return rows


def measure(job: Job, plan: Plan, config: dict[str, Any], steps: int = 5, warm_up: int = 2) -> dict[str, Any]:
    """Run `warm_up` + `steps` optimizer steps as the plan has them, and one evaluation batch.

    config: the model's config.json as a dict. Returns peaks (GiB: allocated, reserved, device; of the evaluation
    batch), what was allocated when the model was loaded and between two steps, seconds a step (median), tokens a
    second, and the last loss. Needs the memory of the job on this machine's device. Raises LoadmasterError for a GPU
    that PyTorch cannot use.
    """
    device = torch.device(device_type(plan, job.hardware.gpu))
    reset_peak(device)
    base = random_model(config, DTYPES[plan.precision], device, frozen_form(plan.method, plan.precision))
    session = make_session(job, plan, World(device=device), pad_token_id=0, base=base)
    loaded = _allocated(device)
    reset_peak(device)
    length = plan.sequence_length
    document = length if job.objective == "sft" else length // 2  # a pair of answers in each row
    count = plan.micro_batch_size * plan.gradient_accumulation_steps
    rows = random_rows(count, length, base.config.get_text_config().vocab_size, document)
    batches, terms = session.split(rows), sum(losses(row, job.objective) for row in rows)
    seconds, lr = [], peak_rate(job, plan.method)
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        loss, _ = session.gradients(batches, terms, lr)
        session.optimizer.step(lr)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    step_s = float(np.median(seconds[warm_up:]))
    peaks, resting = peak_memory(device), _allocated(device)
    reset_peak(device)
    session.model.eval()
    with torch.no_grad():
        session.loss(batches[0])
    return {
        "loaded_gib": loaded,
        "resting_gib": resting,
        **peaks,
        "evaluate_peak_allocated_gib": peak_memory(device)["peak_allocated_gib"],
        "first_step_s": seconds[0],
        "step_s": step_s,
        "tokens_per_second": count * length / step_s,
        "loss": loss.item(),
    }


def _allocated(device: torch.device) -> float:
    return allocated_gib(device) if device.type == "cuda" else peak_memory(device)["peak_allocated_gib"]
