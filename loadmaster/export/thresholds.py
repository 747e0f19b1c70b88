"""What an export must reach to be published, and the judgement.

The defaults were measured on SmolLM2-135M with the adapter of the smoke recipe: each limit lies between the worst good
export and the best of those broken on purpose. Figures: benchmarks/results/2026-11-24_exports_good_and_broken.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from loadmaster.config.schema import ExportConfig, ThresholdsConfig

DEFAULTS = {
    "bf16": ThresholdsConfig(
        max_perplexity_ratio=1.02, max_mean_kl=0.005, max_p99_kl=0.1, min_top1_agreement=0.95, min_task_retention=0.90,
        min_tuned_share=0.95, max_tuned_share=1.05,
    ),
    "fp8": ThresholdsConfig(
        max_perplexity_ratio=1.06, max_mean_kl=0.06, max_p99_kl=1.0, min_top1_agreement=0.87, min_task_retention=0.85,
        min_tuned_share=0.85, max_tuned_share=1.15,
    ),
    "int4": ThresholdsConfig(
        max_perplexity_ratio=1.15, max_mean_kl=0.12, max_p99_kl=2.5, min_top1_agreement=0.85, min_task_retention=0.75,
        min_tuned_share=0.70, max_tuned_share=1.30,
    ),
}
"""Flipped answers have no shipped limit: an answer of hundreds of tokens flips at one near tie, in good exports too."""
FAMILIES = {
    "adapter": "bf16", "fp8_block": "fp8", "gguf": "fp8", "int4_gptq": "int4", "int4_awq": "int4", "nvfp4": "int4",
}
"""Formats that are held to another one's limits, unless the job sets theirs."""


@dataclass(frozen=True)
class Limit:
    """One figure, the field of ThresholdsConfig that bounds it, and what it means."""

    figure: str
    field: str
    meaning: str

    @property
    def is_least(self) -> bool:
        return self.field.startswith("min_")


LIMITS = (
    Limit("tuned_share", "min_tuned_share", "how much of the fine-tune is there; at 0 it was not applied"),
    Limit("tuned_share", "max_tuned_share", "how much of the fine-tune is there; above 1 its scale is too large"),
    Limit("perplexity_ratio", "max_perplexity_ratio", "perplexity over the trained model's"),
    Limit("mean_kl", "max_mean_kl", "mean KL divergence, nats per token"),
    Limit("p99_kl", "max_p99_kl", "99th percentile of the KL divergence of a token, nats"),
    Limit("top1_agreement", "min_top1_agreement", "share of tokens with the same most likely next token"),
    Limit("flipped_answers", "max_flipped_answers", "share of greedy answers that are not the trained model's"),
    Limit("task_retention", "min_task_retention", "task metric over the trained model's"),
)


FEW_TOKENS = 500
"""Held-out tokens below which figures say little (the 99th percentile is that of five), and a run says so."""


MOST_BY_CHANCE = 0.05


def of_few(limit: ThresholdsConfig, tokens: int | None) -> ThresholdsConfig:
    """The limits over so few tokens that one or two would decide, two standard errors wider, MOST_BY_CHANCE at most.

    Of top-1 agreement that error is a share's. A perplexity ratio is the exponential of a mean of differences of log p,
    whose variance over tokens is about twice their mean KL divergence (to the second order of the difference): twice
    the largest that is let pass.
    """
    if tokens is None or tokens >= FEW_TOKENS:
        return limit

    def by_chance(variance: float) -> float:
        return min(2 * math.sqrt(variance / max(tokens, 1)), MOST_BY_CHANCE)

    least, most, divergence = limit.min_top1_agreement, limit.max_perplexity_ratio, limit.max_mean_kl
    if least is not None:
        limit = replace(limit, min_top1_agreement=round(least - by_chance(least * (1 - least)), 4))
    if most is not None and divergence is not None:
        limit = replace(limit, max_perplexity_ratio=round(most * math.exp(by_chance(2 * divergence)), 4))
    return limit


def limits(export: ExportConfig, format_name: str, tokens: int | None = None) -> ThresholdsConfig:
    """The limits of one format: the user's where given, for it or for its family, else the shipped ones, over so many
    held-out tokens."""
    family = FAMILIES.get(format_name, format_name)
    given = export.thresholds or {}
    chosen = given.get(format_name, given.get(family))  # type: ignore[call-overload]
    shipped = of_few(DEFAULTS[family], tokens)
    if chosen is None:
        return shipped
    return replace(shipped, **{name: value for name, value in asdict(chosen).items() if value is not None})


def failures(figures: dict[str, Any], limit: ThresholdsConfig) -> list[str]:
    """Every check that did not pass and every figure beyond its limit, a sentence each that begins with its name.

    figures: "error" where it could not be loaded, "checks" (name -> sentences), and numbers by the names in LIMITS; one
    that was not measured (None) cannot fail, one that is not a number does. Empty: the export may be published.
    """
    failed = [figures["error"]] if "error" in figures else []
    failed += [f"{name}: {sentence}" for name, found in figures.get("checks", {}).items() for sentence in found]
    for each, value, bound in _beyond(figures, limit):
        word = "at least" if each.is_least else "at most"
        failed.append(f"{each.figure} is {value:.4g}, must be {word} {bound:g} ({each.meaning})")
    return failed


def _beyond(figures: dict[str, Any], limit: ThresholdsConfig) -> Iterator[tuple[Limit, float, float]]:
    """(limit, figure, bound) of each figure that is beyond its limit, or no number."""
    for each in LIMITS:
        value, bound = figures.get(each.figure), getattr(limit, each.field)
        if value is None or bound is None:
            continue
        if not math.isfinite(value) or (value < bound if each.is_least else value > bound):
            yield each, value, bound


def accepting(format_name: str, figures: dict[str, Any], limit: ThresholdsConfig) -> list[str] | None:
    """Words of a command line that would let these figures pass; None where no limit does, as where a check failed."""
    if "error" in figures or any(figures.get("checks", {}).values()):
        return None
    words = []
    for each, value, _ in _beyond(figures, limit):
        if not math.isfinite(value) or (each.field == "min_tuned_share" and value <= 0):
            return None
        words.append(f"export.thresholds.{format_name}.{each.field}={_outward(value, each.is_least)}")
    return words


def _outward(value: float, down: bool) -> str:
    """A number of two or three digits beside `value`, on the side on which it passes."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{(math.floor if down else math.ceil)(value / unit) * unit:.4g}"
