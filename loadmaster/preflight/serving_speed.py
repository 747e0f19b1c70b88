"""How fast a server answers, by a roofline: prefill is bound by FLOPs, decoding by reading weights and cache.

    prefill of P tokens    2 x active weights x P / (tp x peak x efficiency)
    one decode step of N   (weights + N x cached tokens x bytes a token) / (bandwidth x efficiency) + overhead
    tensor parallel        two all-reduces a layer besides, of the hidden state over the link, or their latency
    request alone          prefill + output x step(1)
    N requests at once     N / (N x prefill + output x step(N x samples))  requests a second

Modelled, not measured: good for choosing a card and a number of workers, no promise about one request.
`loadmaster deploy` measures the endpoint and says how far off this was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from loadmaster.config.schema import Auto
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.hardware import Hardware
from loadmaster.preflight.shape import ModelShape

ALL_REDUCE_S = 20e-6
"""Latency of one small all-reduce inside a node; a judgement."""
STEP_S = 1e-3
"""Of each step for the scheduler and launches, whatever the model's size; a judgement."""
MOST_LOADED = 0.8
"""Share of a server's highest rate that is planned for; queues grow without end towards 1."""
MOST_WORKERS = 64


@dataclass(frozen=True)
class Traffic:
    """What is asked of an endpoint. Tokens are those of one usual request."""

    prompt_tokens: int
    output_tokens: int
    samples: int = 1
    """Answers generated for each prompt (best of N)."""
    prefix_share: float = 0.0
    """Share of the prompt that requests have in common, found in the prefix cache."""
    requests_per_second: float = 0.1
    p99_first_token_s: float | None = None

    @property
    def new_prompt_tokens(self) -> float:
        return self.prompt_tokens * (1 - self.prefix_share)

    @property
    def mean_cached_tokens(self) -> float:
        """That one running answer holds on average: its prompt, and half of what it will say."""
        return self.prompt_tokens + self.output_tokens / 2


def usual_request(context: int, prompt: int | Auto, output: int | Auto) -> tuple[int, int]:
    """(prompt, answer), tokens: what is open is three quarters and a quarter of context, or what the other leaves."""
    answer = max(1, context // 4) if output == "auto" else output
    asked = max(1, min(context * 3 // 4, context - answer)) if prompt == "auto" else prompt
    if output == "auto":
        answer = max(1, min(answer, context - asked))
    return asked, answer


@dataclass(frozen=True)
class Speed:
    """One server. weight_bytes and bytes_per_token are those of one card."""

    shape: ModelShape
    hardware: Hardware
    format: str
    weight_bytes: float
    bytes_per_token: int

    def prefill_s(self, traffic: Traffic) -> float:
        peak = self.hardware.tflops.get("bf16", self.hardware.tflops.get("fp32", 0.0)) * 1e12
        if self.format == "fp8" and self.hardware.has_fp8:
            peak = self.hardware.tflops["fp8"] * 1e12
        flops = 2 * self.shape.active_matrix_parameters * traffic.new_prompt_tokens
        queries = sum(layers * view.query_size for view, layers in self.shape.views)
        flops += 2 * queries * traffic.new_prompt_tokens * traffic.prompt_tokens
        compute = flops / (self.hardware.count * peak * value("efficiency", "matmul"))
        return max(compute + self.all_reduces_s(traffic.new_prompt_tokens), self.step_s(traffic, 1))

    def all_reduces_s(self, tokens: float) -> float:
        """Of one forward pass over so many tokens; 0 on one card."""
        cards = self.hardware.count
        if cards == 1:
            return 0.0
        sent = tokens * self.shape.hidden_size * 2 * 2 * (cards - 1) / cards
        link = self.hardware.link_gb_per_s * 1e9 * value("efficiency", "link")
        return 2 * self.shape.layers * max(ALL_REDUCE_S, sent / link)

    def step_s(self, traffic: Traffic, answers: float) -> float:
        """One token for each of so many running answers."""
        read = self.weight_bytes + answers * traffic.mean_cached_tokens * self.bytes_per_token
        reading = read / (self.hardware.bandwidth_gb_per_s * 1e9 * value("serving", "bandwidth"))
        return STEP_S + reading + self.all_reduces_s(answers)

    def first_token_s(self, traffic: Traffic) -> float:
        return self.prefill_s(traffic) + self.step_s(traffic, traffic.samples)

    def most_requests(self, traffic: Traffic, cache_tokens: int) -> float:
        """Running at once: what the cache holds at their mean length, up to the server's limit of sequences."""
        cached = cache_tokens / (traffic.samples * traffic.mean_cached_tokens)
        return min(cached, value("serving", "most_sequences") / traffic.samples)

    def requests_per_second(self, traffic: Traffic, running: float) -> float:
        """With so many requests running at any time. Prefill of one stops the answers of all."""
        decode = traffic.output_tokens * self.step_s(traffic, running * traffic.samples)
        return running / (running * self.prefill_s(traffic) + decode)

    def answer_tokens_per_second(self, traffic: Traffic, cache_tokens: int) -> float:
        """With the cache full: all answers, those that best-of-N throws away as well."""
        running = self.most_requests(traffic, cache_tokens)
        return self.requests_per_second(traffic, running) * traffic.output_tokens * traffic.samples

    def seconds_alone(self, traffic: Traffic) -> float:
        return self.prefill_s(traffic) + traffic.output_tokens * self.step_s(traffic, traffic.samples)

    def seconds_at(self, traffic: Traffic, rate: float) -> float:
        """Of one request while `rate` a second come to this server; of a server that is too slow, with all slots full.

        N requests run at once where N = rate x seconds(N); seconds(N) is a straight line in N.
        """
        alone = self.seconds_alone(traffic)
        two = 2 / self.requests_per_second(traffic, 2)
        slope = two - alone
        running = rate * (alone - slope) / (1 - rate * slope) if rate * slope < 1 else math.inf
        most = value("serving", "most_sequences") / traffic.samples
        return alone + slope * (max(1.0, min(running, most)) - 1)

    def p99_first_token_s(self, traffic: Traffic, rate: float) -> float:
        """99th percentile at `rate` requests a second, prefills queueing one after another (M/D/1).

        The wait's tail is taken as exponential, P(W > t) = load x exp(-load t / mean wait), which is exact in the mean
        (Pollaczek-Khinchine) and close in the tail. Infinite when the load is 1 or more.
        """
        service = self.prefill_s(traffic)
        load = rate * service
        if load >= 1:
            return math.inf
        wait = load * service / (2 * (1 - load))
        tail = 0.0 if load <= 0.01 else wait / load * math.log(load / 0.01)
        return self.first_token_s(traffic) + tail

    def workers(self, traffic: Traffic, cache_tokens: int) -> int | None:
        """Servers that carry the traffic at MOST_LOADED of their rate and within its p99; None: not MOST_WORKERS do."""
        highest = MOST_LOADED * self.requests_per_second(traffic, self.most_requests(traffic, cache_tokens))
        for workers in range(max(1, math.ceil(traffic.requests_per_second / highest)), MOST_WORKERS + 1):
            late = self.p99_first_token_s(traffic, traffic.requests_per_second / workers)
            if traffic.p99_first_token_s is None or late <= traffic.p99_first_token_s:
                return workers
            if self.first_token_s(traffic) > traffic.p99_first_token_s:
                return None
        return None
