"""Which GPU, how many, how many workers, for the load that the job states; each choice with its reason.

Made from the artifact's own config.json and the bytes of its weight files, so it holds for what was exported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loadmaster import catalog
from loadmaster.config.schema import EndpointConfig, Job
from loadmaster.config.shipped import local_path
from loadmaster.endpoint.arrivals import bursty, from_csv, poisson
from loadmaster.endpoint.economics import (
    MONTH_S,
    Bill,
    Prices,
    Service,
    cold_start_s,
    crossing_rate,
    crossing_utilisation,
    month,
)
from loadmaster.endpoint.load_test import LoadTest, plan_load
from loadmaster.endpoint.simulate import Fleet, Outcome, simulate
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.export.served.gpus import scale_block
from loadmaster.export.thresholds import FAMILIES
from loadmaster.files import read_json
from loadmaster.preflight.coefficients import value
from loadmaster.preflight.config_json import find_config, from_config, known_positions, short_positions
from loadmaster.preflight.exports import request_limit
from loadmaster.preflight.hardware import Hardware, from_catalog, rentable
from loadmaster.preflight.serving import (
    ServingPlan,
    cache_bytes_per_token,
    plan_serving,
    refuse_other_caches,
    weight_bytes,
)
from loadmaster.preflight.serving_speed import Speed, Traffic, usual_request
from loadmaster.preflight.shape import ModelShape
from loadmaster.preflight.tensor_parallel import divides
from loadmaster.words import counted

SHOWN = 5
"""Machines, the chosen one first."""
FEWEST_SIMULATED, MOST_SIMULATED = 5_000, 30_000
STARTS_TO_SEE = 20
"""A simulation that ends before so many cold starts could have followed each other says nothing of them."""
OTHER_FLEETS = ((0, 5, 1.0), (0, 60, 1.0), (0, 300, 1.0), (1, 60, 1.0), (0, 10, 0.5), (0, 10, 2.0))
"""(min workers, idle timeout in seconds, share of the most workers) to be compared with the chosen ones."""


@dataclass(frozen=True)
class Candidate:
    """One machine under the stated load."""

    plan: ServingPlan
    speed: Speed
    workers: int
    requests_at_once: int
    """That one worker should be given."""

    @property
    def usd_per_hour(self) -> float:
        return self.workers * (self.plan.flex_usd_per_hour or math.inf)


@dataclass(frozen=True)
class Sizing:
    """The endpoint as it will be asked for."""

    plan: ServingPlan
    traffic: Traffic
    workers: int
    """That the load needs while it lasts."""
    min_workers: int
    max_workers: int
    requests_at_once: int
    pool: str
    excluded: list[str]
    start_s: tuple[float, float]
    """Cold start from where the weights are, with a fast and a slow volume."""
    starts: dict[str, float]
    """Cold start from each place where the weights could be, seconds."""
    service: Service
    prices: Prices
    bills: list[Bill]
    """At a tenth of the stated load, at the load, and at ten times of it."""
    crossings: dict[str, tuple[float | None, float | None]]
    """active, pod -> (share of billed time, requests a second of one worker) from which each is cheaper than Flex."""
    outcomes: list[Outcome]
    """Simulated, the chosen fleet first; empty where there are too many requests to simulate."""
    reasons: list[str]
    runners_up: list[ServingPlan]
    load: LoadTest
    """What deploying measures the endpoint under, and what is expected of it."""


def size(job: Job, manifest: dict[str, Any], artifact: Path, context: int) -> Sizing:
    """The cheapest machine of the catalogue that carries the load, or the one that the job names.

    Raises ConfigError for a request that the model cannot take, LoadmasterError where the model cannot be planned.
    """
    wanted = job.endpoint
    traffic = traffic_of(wanted, context)
    config, form, checkpoint = _artifact(job, manifest, artifact)
    name = manifest["base_model"]["name"]
    refuse_other_caches(config, name)
    shape = from_config(config, name)
    most, named = request_limit(job, shape)
    if most and context > most:
        remedy = f"endpoint.max_model_len={most}"
        raise ConfigError.of("endpoint.max_model_len", context, f"is more than {named}", remedy)
    if checkpoint is None:
        checkpoint = weight_bytes(shape, form) + manifest["bytes"]
    machines = _machines(wanted, shape, scale_block(config))
    found = [_candidate(shape, machine, form, context, wanted, traffic, checkpoint) for machine in machines]
    able = sorted((c for c in found if c is not None), key=lambda c: (c.usd_per_hour, c.plan.gpus))
    if not able:
        raise _nothing(wanted, context, traffic)
    return _sizing(wanted, traffic, able, checkpoint)


def goes_over(job: Job, manifest: dict[str, Any], artifact: Path) -> bool:
    """Whether vLLM divides an export over endpoint.count; where that cannot be worked out, the size says why."""
    if job.endpoint.count == "auto":
        return True
    try:
        config = _artifact(job, manifest, artifact)[0]
        return divides(from_config(config, manifest["base_model"]["name"]), job.endpoint.count, scale_block(config))
    except LoadmasterError:
        return True


def longest_request(job: Job, manifest: dict[str, Any], artifact: Path) -> int:
    """endpoint.max_model_len in tokens; auto: those of a packed row, or all that the model knows where that is less."""
    if job.endpoint.max_model_len != "auto":
        return job.endpoint.max_model_len
    try:
        config = _artifact(job, manifest, artifact)[0]
        known = short_positions(config) or known_positions(config)
    except LoadmasterError:  # the size then says why there is none
        known = None
    return min(job.sequence_length, known or job.sequence_length)


def traffic_of(wanted: EndpointConfig, context: int) -> Traffic:
    """What the job says of its load; usual_request has what it leaves open."""
    prompt, output = usual_request(context, wanted.prompt_tokens, wanted.output_tokens)
    return Traffic(
        prompt_tokens=prompt, output_tokens=output, samples=wanted.best_of_n, prefix_share=wanted.prefix_share,
        requests_per_second=wanted.requests_per_second,
        p99_first_token_s=None if wanted.p99_first_token_ms is None else wanted.p99_first_token_ms / 1000,
    )


def _artifact(job: Job, manifest: dict[str, Any], artifact: Path) -> tuple[dict[str, Any], str, float | None]:
    """(config.json, format of its weights, bytes of them or None for an adapter over its base)."""
    if manifest["format"] == "adapter":
        return find_config(job.model)[0], "bf16", None
    path = artifact / "config.json"
    if not path.is_file():
        raise LoadmasterError(f"{path}: missing, so its size on a server cannot be worked out")
    weights = sum(file["bytes"] for file in manifest["files"] if file["path"].endswith(".safetensors"))
    return read_json(path), FAMILIES.get(manifest["format"], manifest["format"]), float(weights)


def _machines(wanted: EndpointConfig, shape: ModelShape, block: int) -> list[Hardware]:
    """Those that are asked for and that vLLM divides the model over. Raises LoadmasterError where it does over none.

    block: weights that share a scale; of Qwen2.5 72B in int4, two cards cut a group (its intermediate size is 231 of
    128), and the server does not start (QwenLM/Qwen3 #907).
    """
    if wanted.gpu == "auto":
        named = [m for m in rentable() if m.nodes == 1 and wanted.count in ("auto", m.count)]
    else:
        counts = (1, 2, 4, 8) if wanted.count == "auto" else (wanted.count,)
        named = [from_catalog(wanted.gpu, count) for count in counts]
    found = [machine for machine in named if divides(shape, machine.count, block)]
    if named and not found:
        over = " or ".join(str(count) for count in (1, 2, 4, 8) if divides(shape, count, block))
        raise LoadmasterError(
            f"{shape.name} cannot be divided over {wanted.count} GPUs as its weights are stored: set "
            f"endpoint.count={over}"
        )
    return found


def _candidate(
    shape: ModelShape, machine: Hardware, form: str, context: int, wanted: EndpointConfig, traffic: Traffic,
    checkpoint: float,
) -> Candidate | None:
    if machine.gpu not in catalog.serving()["gpus"]:
        return None
    plan = plan_serving(
        shape, machine, form, context, wanted.kv_cache_dtype, wanted.gpu_memory_utilization, traffic, checkpoint
    )
    if not plan.fits or plan.flex_usd_per_hour is None:
        return None
    per_token = cache_bytes_per_token(shape, wanted.kv_cache_dtype, machine.count)
    speed = Speed(shape, machine, form, checkpoint / machine.count, per_token)
    workers = speed.workers(traffic, plan.cache_tokens)
    if workers is None:
        return None
    return Candidate(plan, speed, workers, max(1, math.floor(speed.most_requests(traffic, plan.cache_tokens))))


def _nothing(wanted: EndpointConfig, context: int, traffic: Traffic) -> LoadmasterError:
    where = "no GPU of the catalogue" if wanted.gpu == "auto" else f"no number of {wanted.gpu} up to 8"
    late = "" if traffic.p99_first_token_s is None else f", its first token within {wanted.p99_first_token_ms:.0f} ms,"
    return LoadmasterError(
        f"{where} holds a request of {context:,} tokens x {traffic.samples}{late} at "
        f"{traffic.requests_per_second:g} requests a second. Serve a smaller format (endpoint.serve_as), try "
        "endpoint.kv_cache_dtype=fp8, a smaller endpoint.max_model_len, or another endpoint.gpu"
    )


def _sizing(wanted: EndpointConfig, traffic: Traffic, able: list[Candidate], checkpoint: float) -> Sizing:
    best = able[0]
    plan = best.plan
    need = best.workers
    most = max(wanted.min_workers, 2, 2 * need) if wanted.max_workers == "auto" else wanted.max_workers
    starts = (cold_start_s(checkpoint, wanted.weights, "high"), cold_start_s(checkpoint, wanted.weights, "low"))
    rate = traffic.requests_per_second
    per_worker = best.speed.requests_per_second(traffic, best.speed.most_requests(traffic, plan.cache_tokens))
    service = Service(best.speed.seconds_at(traffic, rate / need), starts[1], wanted.idle_timeout_s, per_worker)
    prices = Prices(plan.flex_usd_per_hour or 0.0, plan.pod_usd_per_hour or 0.0, wanted.active_discount)
    shares = crossing_utilisation(prices)
    facts = catalog.serving()["gpus"][plan.gpu]
    chosen = Fleet(wanted.min_workers, most, best.requests_at_once, starts[1], wanted.idle_timeout_s)
    return Sizing(
        plan=plan, traffic=traffic, workers=need, min_workers=wanted.min_workers, max_workers=most,
        requests_at_once=best.requests_at_once, pool=facts["pool"], excluded=list(facts["others"]), start_s=starts,
        starts=starts_of(checkpoint),
        service=service, prices=prices, bills=[_bill(best, traffic, service, prices, times) for times in (0.1, 1, 10)],
        crossings={name: (share, crossing_rate(service, prices, name)) for name, share in shares.items()},
        outcomes=_outcomes(wanted, service, chosen), reasons=_reasons(best, wanted, traffic, able),
        runners_up=[candidate.plan for candidate in able[1:SHOWN]],
        load=plan_load(best.speed, traffic, best.requests_at_once),
    )


def _bill(best: Candidate, traffic: Traffic, service: Service, prices: Prices, times: float) -> Bill:
    """Of so many times the load; more workers than are counted one by one are taken to be as many times those of it."""
    rate = times * traffic.requests_per_second
    workers = best.speed.workers(replace(traffic, requests_per_second=rate), best.plan.cache_tokens)
    return month(rate, service, prices, workers or math.ceil(times * best.workers))


def starts_of(checkpoint: float) -> dict[str, float]:
    """Cold start by where the weights are and how fast they come."""
    facts = catalog.serving()["cold_start"]
    speed = facts["volume_gb_per_s"]
    return {
        f"network volume at {speed['high']:g} GB/s": cold_start_s(checkpoint, "volume", "high"),
        f"network volume at {speed['low']:g} GB/s": cold_start_s(checkpoint, "volume", "low"),
        f"in the image, from a registry at {facts['registry_gb_per_s']['value']:g} GB/s": cold_start_s(
            checkpoint, "image"
        ),
        "nothing to read (in the host's memory)": cold_start_s(0, "volume"),
    }


def arrivals_of(wanted: EndpointConfig) -> list[float]:
    """Of as long a time as has a few thousand requests, at most a month; of a CSV its first 30,000."""
    rate = wanted.requests_per_second
    seconds = min(MONTH_S, MOST_SIMULATED / rate, max(3600.0, FEWEST_SIMULATED / rate))
    if wanted.arrivals == "poisson":
        return poisson(rate, seconds)
    if wanted.arrivals == "bursty":
        return bursty(rate, seconds)
    return from_csv(local_path(wanted.arrivals))[:MOST_SIMULATED]


def _outcomes(wanted: EndpointConfig, service: Service, chosen: Fleet) -> list[Outcome]:
    """The chosen fleet, and others with more or fewer workers always up and longer or shorter timeouts."""
    arrivals = arrivals_of(wanted)
    if len(arrivals) < 2 or arrivals[-1] < STARTS_TO_SEE * service.start_s:
        return []
    fleets = [chosen]
    for least, idle, share in OTHER_FLEETS:
        most = max(1, math.ceil(share * chosen.max_workers))
        fleet = replace(chosen, min_workers=min(least, most), max_workers=most, idle_timeout_s=idle)
        if fleet not in fleets:
            fleets.append(fleet)
    return [simulate(arrivals, service.request_s, fleet) for fleet in fleets]


def _reasons(best: Candidate, wanted: EndpointConfig, traffic: Traffic, able: list[Candidate]) -> list[str]:
    plan = best.plan
    more = f" (below are the {SHOWN} cheapest)" if len(able) > SHOWN else ""
    chosen = "asked for" if wanted.gpu != "auto" else f"the cheapest of {len(able)} machines that carry the load{more}"
    reasons = [
        f"{plan.gpus}x {plan.gpu}: {chosen}, {counted(best.workers, 'worker')} at ${plan.flex_usd_per_hour:.2f}/h each "
        "while up",
        f"{plan.cache_tokens:,} tokens of cache in {plan.cache_dtype} hold {plan.concurrent_requests:,.1f} requests of "
        f"{plan.context:,} tokens"
        + ("" if plan.cache_dtype == "fp8" else "; endpoint.kv_cache_dtype=fp8 holds twice as many, uncalibrated"),
        f"{best.requests_at_once} requests at once: as many of this traffic's mean length as it holds, and at most "
        f"{value('serving', 'most_sequences'):g} sequences",
    ]
    if wanted.max_model_len == "auto":
        reasons.append(f"max_model_len=auto: {plan.context:,} tokens, a trained row or all that the model knows")
    if plan.gpus > 1:
        reasons.append(f"tensor parallel over {plan.gpus} cards divides weights and KV heads; fewer do not carry it")
    if traffic.samples > 1:
        reasons.append(f"best of {traffic.samples}: a request holds {traffic.samples} times the cache")
    if wanted.min_workers == 0:
        reasons.append("min_workers=0: nothing is billed while nobody asks, and the first request waits for a start")
    if wanted.max_workers == "auto":
        reasons.append("max_workers=auto: twice what the load needs, at least 2")
    return reasons
