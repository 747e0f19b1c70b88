"""What an export must reach to be published, and the judgement.

The defaults were measured on SmolLM2-135M with the adapter of the smoke recipe (see docs/export.md for the
figures): each limit lies between the worst good export and the best of those broken on purpose.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from loadmaster.config.schema import ExportConfig, ThresholdsConfig

DEFAULTS = {
    "bf16": ThresholdsConfig(
        max_perplexity_ratio=1.02, max_mean_kl=0.005, min_top1_agreement=0.95, min_task_retention=0.90
    ),
    "fp8": ThresholdsConfig(
        max_perplexity_ratio=1.06, max_mean_kl=0.06, min_top1_agreement=0.87, min_task_retention=0.85
    ),
    "int4": ThresholdsConfig(
        max_perplexity_ratio=1.15, max_mean_kl=0.12, min_top1_agreement=0.85, min_task_retention=0.75
    ),
}


def limits(export: ExportConfig, format_name: str) -> ThresholdsConfig:
    """The limits of one format: the user's where given, else the shipped ones. An adapter is held to bf16's."""
    key = "bf16" if format_name == "adapter" else format_name
    given = (export.thresholds or {}).get(key)  # type: ignore[call-overload]
    if given is None:
        return DEFAULTS[key]
    return replace(DEFAULTS[key], **{name: value for name, value in asdict(given).items() if value is not None})


def failures(figures: dict[str, Any], limit: ThresholdsConfig) -> list[str]:
    """Every figure beyond its limit, as a sentence each; empty: the export may be published.

    figures: perplexity_ratio, mean_kl (nats a token), top1_agreement, and task_retention where there is a task.
    A figure that is not a number fails.
    """
    checks = [
        ("perplexity_ratio", "perplexity over the trained model's", limit.max_perplexity_ratio, False),
        ("mean_kl", "mean KL divergence, nats per token", limit.max_mean_kl, False),
        ("top1_agreement", "share of tokens with the same most likely next token", limit.min_top1_agreement, True),
        ("task_retention", "task metric over the trained model's", limit.min_task_retention, True),
    ]
    failed = []
    for key, meaning, bound, at_least in checks:
        value = figures.get(key)
        if value is None:
            continue
        if not math.isfinite(value) or (value < bound if at_least else value > bound):
            word = "at least" if at_least else "at most"
            failed.append(f"{key} is {value:.4g}, must be {word} {bound:g} ({meaning})")
    return failed
