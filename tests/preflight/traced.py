"""Peaks of the engine's traced step, which the preflight's replay is held against."""

from __future__ import annotations

from typing import Any

from loadmaster.models.load import DTYPES
from loadmaster.preflight.setup import Setup
from loadmaster.training.metas import Metas
from loadmaster.training.trace import Case, _meta_model, _traced_peak, with_trained_part


def traced_peaks(
    config: dict[str, Any],
    method: str,
    cases: list[Case],
    rank: int = 16,
    targets: Any = "all-linear",
    precision: str = "bf16",
    dropout: float = 0.0,
    modules_to_save: tuple[str, ...] = (),
    dora: bool = False,
) -> list[int]:
    """For each case the peak bytes of one micro-batch, besides weights and the gradients that were there before.

    config: the model's config.json as a dict.
    """
    targets = tuple(targets) if isinstance(targets, list) else targets
    setup = Setup(method=method, precision=precision, optimizer="adamw", master_weights=True, lora_rank=rank,
                  lora_targets=targets, lora_dropout=dropout, modules_to_save=modules_to_save, dora=dora)
    model = with_trained_part(_meta_model(config, DTYPES[precision]), setup)
    metas = Metas()
    return [_traced_peak(model, case, metas) for case in cases]
