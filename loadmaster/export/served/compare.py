"""A served model against the model as trained: the figures, their limits, and the judgement. Pure.

    difference    mean over tokens of |log p_served(y) - log p_trained(y)|, nats                y: the true next token
    from disk     the same against log p of the exported folder, activations in bf16: what the server does otherwise
    rounding      mean over tokens of |log p_rounded(y) - log p_disk(y)|, nats, both of the exported folder: what
                  rounding activations moves, where the format does it
    fine-tune     mean over tokens of |log p_trained(y) - log p_base(y)|, nats: what training changed
    tuned share   how much of it is served; loadmaster.export.figures has the formula

A server that loads an adapter and does not apply it reports no error (vLLM issues 34186, 48019): its tuned share is 0.
A coarse format may be far from the trained model and still be served right; the difference from disk tells the two
apart, so its limit is narrow and the same for every format that vLLM serves, but for the rounding of activations. A
server may round them by scales of another precision than ours, or not at all: an activation near the middle of two
values goes either way, and two such roundings are as far apart as each is from none. So it is held against none, where
a server that does not round is at 0, one that does is about `rounding` away, and a fault is as far away as it is: the
limit is the fixed one and `rounding` together (triangle inequality). All of it is measured on the same tokens.

Where an answer ends is a choice between two tokens, the one that ends it and the likeliest other. One that goes on
where ours ends counts only where the trained model was surer of its end than a good server may differ: each of the two
log-probabilities may be `max_difference` off in the mean, and twice that for one token (SURE_ENDS of them together).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from loadmaster.export.served.client import Served
from loadmaster.export.tuned import tuned_share


@dataclass(frozen=True)
class ServeLimits:
    max_difference: float
    max_from_disk: float
    min_top1_agreement: float
    min_tuned_share: float
    max_tuned_share: float
    min_first_token: float
    min_equal_answers: float


SURE_ENDS = 4
"""Times max_difference that a margin must have for an end to be sure."""

LIMITS = {
    "bf16": ServeLimits(0.06, 0.06, 0.95, 0.85, 1.15, 0.60, 0.25),
    "adapter": ServeLimits(0.06, 0.06, 0.95, 0.85, 1.15, 0.60, 0.25),
    "fp8": ServeLimits(0.25, 0.06, 0.87, 0.80, 1.20, 0.50, 0.0),
    "int4": ServeLimits(0.35, 0.06, 0.85, 0.75, 1.25, 0.50, 0.0),
}
LIMITS |= {
    "gguf": ServeLimits(0.15, 0.15, 0.87, 0.80, 1.20, 0.50, 0.0),
    "fp8_block": LIMITS["fp8"], "int4_gptq": LIMITS["int4"], "int4_awq": LIMITS["int4"], "nvfp4": LIMITS["int4"],
}
"""Between what good exports and broken ones gave on SmolLM2-135M (benchmarks/results/2026-11-28_served.md); those
of fp8 and int4 leave the room for a model of higher entropy that loadmaster.export.thresholds leaves them."""


def log_probability_figures(
    documents: list[dict[str, Any]], served: list[tuple[list[float], list[int]]], format_name: str | None = None
) -> dict[str, Any]:
    """Figures over all tokens of all documents.

    documents: of reference.py: log-probabilities "trained" and "base" of each token, the likeliest tokens "top",
    "exports": format -> log-probabilities of the folder as it is on disk, where it is not the trained model, and
    "rounded": the same with activations rounded, where the format does.
    served: the server's log-probabilities and likeliest tokens, in the same order. format_name: what is served.
    """
    trained, base, own, agree, on_disk, rounded = [], [], [], [], [], []
    for document, (log_p, top) in zip(documents, served, strict=True):
        unrounded = document.get("exports", {}).get(format_name, document["trained"])
        on_disk += unrounded
        rounded += document.get("rounded", {}).get(format_name, unrounded)
        trained += document["trained"]
        base += document["base"]
        own += log_p
        agree += [mine == theirs for mine, theirs in zip(document["top"], top, strict=True)]
    fine_tune, share = tuned_share(own, trained, base)
    return {
        "tokens": len(own),
        "difference": fmean(abs(s - t) for s, t in zip(own, trained, strict=True)),
        "from_disk": fmean(abs(s - d) for s, d in zip(own, on_disk, strict=True)),
        "rounding": fmean(abs(r - d) for r, d in zip(rounded, on_disk, strict=True)),
        "top1_agreement": fmean(agree),
        "fine_tune": fine_tune,
        "tuned_share": share,
    }


def answer_figures(
    references: list[dict[str, Any]], served: list[Served], stop_ids: list[int], limits: ServeLimits
) -> dict[str, Any]:
    """How far the served answers are ours, and whether they end where ours do.

    ended: of the answers that go as ours do up to our end, [how many end there, how many do or should: all but those
    that go on where the trained model was not sure]. overrun: answers with a stop token before their last token.
    """
    bodies = [_body(answer.ids, stop_ids) for answer in served]
    same_start = [
        (body == reference["ids"] and answer.finish_reason == "stop", reference["end_margin"])
        for reference, body, answer in zip(references, bodies, served, strict=True)
        if reference["ended"] and body[: len(reference["ids"])] == reference["ids"]
    ]
    ends = [ended for ended, margin in same_start if ended or margin > SURE_ENDS * limits.max_difference]
    return {
        "answers": len(served),
        "first_token": fmean(r["ids"][:1] == body[:1] for r, body in zip(references, bodies, strict=True)),
        "equal_answers": fmean(r["text"] == answer.text for r, answer in zip(references, served, strict=True)),
        "ended": [sum(ends), len(ends)],
        "overrun": sum(bool(set(body) & set(stop_ids)) for body in bodies),
    }


def _body(ids: list[int], stop_ids: list[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in stop_ids else ids


def failures(figures: dict[str, Any], limits: ServeLimits, name: str) -> list[str]:
    """Every way in which the served model is not the trained one, a sentence each. A figure that is no number fails.

    name: under which the model is to be served.
    """
    found = []
    if name not in figures["models"]:
        found.append(f"name: /v1/models has {', '.join(figures['models']) or 'no model'}, not {name}")
    if different := figures["rendering"]["different"]:
        found.append(
            f"rendering: {len(different)} of {figures['rendering']['cases']} conversations give other tokens than in "
            f"training ({', '.join(different)}): the server uses another chat template or tokenizer"
        )
    found += _log_probability_failures(figures, limits)
    for key, least, meaning in (
        ("first_token", limits.min_first_token, "share of greedy answers with our first token"),
        ("equal_answers", limits.min_equal_answers, "share of greedy answers equal to ours"),
    ):
        if key in figures and not figures[key] >= least:
            found.append(f"{key} is {figures[key]:.2f}, must be at least {least:g} ({meaning})")
    if deaf := [token for token, stopped in figures.get("stops_at", {}).items() if not stopped]:
        found.append(f"stop: the server goes on after token {', '.join(deaf)}, which ends a turn in training")
    if "ended" in figures and figures["ended"][0] < figures["ended"][1]:
        ended, same = figures["ended"]
        found.append(f"stop: {same - ended} of {same} answers go on where the trained model's surely end")
    if figures.get("overrun"):
        found.append(f"stop: {figures['overrun']} answers go on behind a token that ends a turn")
    return found


def _log_probability_failures(figures: dict[str, Any], limits: ServeLimits) -> list[str]:
    share, difference, agreement = figures["tuned_share"], figures["difference"], figures["top1_agreement"]
    found = []
    if share is not None and not limits.min_tuned_share <= share <= limits.max_tuned_share:
        base = "the base model is served, the fine-tune is not applied" if abs(share) < 0.2 else "of the fine-tune"
        found.append(
            f"tuned_share is {share:.2f}, must be {limits.min_tuned_share:g} to {limits.max_tuned_share:g} ({base})"
        )
    most_from_disk = limits.max_from_disk + figures["rounding"]
    for key, value, most, whose in (
        ("difference", difference, limits.max_difference, "the trained model's"),
        ("from_disk", figures["from_disk"], most_from_disk, "those of the same files as verification loads them"),
    ):
        if not (math.isfinite(value) and value <= most):
            found.append(
                f"{key} is {value:.4f}, must be at most {most:g} "
                f"(mean difference of log-probabilities from {whose}, nats)"
            )
    if not agreement >= limits.min_top1_agreement:
        found.append(
            f"top1_agreement is {agreement:.3f}, must be at least {limits.min_top1_agreement:g} "
            "(share of tokens with the same most likely next token)"
        )
    return found
