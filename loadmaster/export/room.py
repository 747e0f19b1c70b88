"""What a verification may take of the machine that it runs on, measured as it starts: every visible GPU's free memory,
the host's, and the disk that the export is written on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loadmaster.config.schema import EvaluationConfig
from loadmaster.host_memory import free_host_bytes
from loadmaster.models.frozen import frozen_form
from loadmaster.models.spread import Spread
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import GIB
from loadmaster.preflight.placement import Room
from loadmaster.preflight.plan import Plan
from loadmaster.training import allocator


def spread_over(device: str, scratch: Path | None, working: float, passing: float, kept: float) -> Spread:
    """Where the models of a verification go; `device` alone where it holds them. Memory of a GPU grows from here on.

    scratch: folder for what is written of layers on disk; None: none go there.
    working, passing: bytes beside weights, on the first GPU and on each other one.
    kept: bytes that stay in host memory meanwhile.
    """
    on_disk = scratch is not None
    allocator.settle(torch.device(device))
    gpus, host = free_bytes(device)
    host = max(0.0, host - kept)
    room = Room(gpus, host, on_disk, working, passing) if gpus else Room((host,), 0.0, on_disk, working, passing)
    return Spread(room, device, (scratch or Path()) / "offload")


def beside_weights(plan: Plan) -> tuple[float, float]:
    """`working` and `passing` as planned; a plan made before they were in it has none."""
    planned = plan.verification or {"working_gib": 0.0, "passing_gib": 0.0}
    return planned["working_gib"] * GIB, planned["passing_gib"] * GIB


def trained_model(plan: Plan, base: Path, trained: Path, device: str, scratch: Path) -> dict[str, Any]:
    """How another process loads the model as trained, JSON-able; device and scratch as in `spread_over`."""
    working, passing = beside_weights(plan)
    return {
        "base": str(base), "trained": str(trained), "precision": plan.precision,
        "frozen": frozen_form(plan.method, plan.precision), "device": device, "scratch": str(scratch),
        "working": working, "passing": passing,
    }


def asking(plan: Plan, evaluation: EvaluationConfig) -> EvaluationConfig:
    """With as many answers at a time as were planned, where that is left open."""
    planned = (plan.verification or {}).get("answers_at_a_time", "auto")
    return replace(evaluation, batch_size=planned) if evaluation.batch_size == "auto" else evaluation


def moving_s(plan: Plan) -> float:
    """How much longer than reading a verification may take for what it moves: twice what is modelled."""
    return 2 * 3600 * (plan.verification or {}).get("moving_hours", 0.0)


def free_bytes(device: str) -> tuple[tuple[float, ...], float]:
    """(free on each visible GPU, but for what fragmentation takes; free in host memory)."""
    if device == "cpu":
        return (), free_host_bytes()
    usable = 1 - value("fragmentation", "share")
    gpus = range(torch.cuda.device_count())
    return tuple(usable * torch.cuda.mem_get_info(gpu)[0] for gpu in gpus), free_host_bytes()
