"""How much of the fine-tune is there; see `loadmaster.export.figures` for the formula. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

TELLABLE = 0.05
"""Nats a token; a smaller fine-tune is lost in the rounding of other kernels, and the tuned share means nothing."""


def tuned_share(own: Sequence[float], trained: Sequence[float], base: Sequence[float]) -> tuple[float, float | None]:
    """(fine-tune in nats a token, tuned share or None where the fine-tune is too small to tell).

    own, trained, base: log-probabilities of the same tokens under the model in question, as trained, and untrained.
    """
    fine_tune = sum(abs(t - b) for t, b in zip(trained, base, strict=True)) / len(trained)
    if not fine_tune >= TELLABLE:
        return fine_tune, None
    square = sum((t - b) ** 2 for t, b in zip(trained, base, strict=True))
    return fine_tune, sum((o - b) * (t - b) for o, t, b in zip(own, trained, base, strict=True)) / square
