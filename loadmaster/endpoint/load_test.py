"""The short load that a new endpoint is measured under, and what the serving plan expects of it.

    requests in groups of `at_once`, all of a group at the same moment, of the stated lengths but not longer than
    PROMPT_TOKENS and OUTPUT_TOKENS
    first token      prefills of a group one after another: their mean is (at_once + 1) / 2 prefills, and a step
    tokens/s each    output / (output x step(at_once) + prefills of the others, which stop it)

Modelled like the plan itself (preflight/serving_speed.py), so `endpoint.max_slowdown` is wide: it is there to catch
the wrong card, a CPU fallback, or a cache that swaps, not to grade the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from loadmaster.preflight.serving_speed import Speed, Traffic

REQUESTS, AT_ONCE = 8, 4
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 64


@dataclass(frozen=True)
class LoadTest:
    """What is sent, and the figures that are planned for it."""

    requests: int
    at_once: int
    prompt_tokens: int
    """At most; distinct prompts, so that no prefix cache helps."""
    output_tokens: int
    first_token_s: float
    """Mean, of a server that is up."""
    tokens_per_second_each: float
    """Of one answer after its first token."""


def plan_load(speed: Speed, traffic: Traffic, slots: int) -> LoadTest:
    """slots: requests that a worker is given at once."""
    prompt, output = min(traffic.prompt_tokens, PROMPT_TOKENS), min(traffic.output_tokens, OUTPUT_TOKENS)
    sent = replace(traffic, prompt_tokens=prompt, output_tokens=output, prefix_share=0.0, samples=1)
    at_once = min(AT_ONCE, slots)
    prefill, step = speed.prefill_s(sent), speed.step_s(sent, at_once)
    answering = output * step + (at_once - 1) * prefill
    return LoadTest(
        requests=REQUESTS, at_once=at_once, prompt_tokens=prompt, output_tokens=output,
        first_token_s=round(prefill * (at_once + 1) / 2 + step, 4),
        tokens_per_second_each=round(output / answering, 1),
    )
