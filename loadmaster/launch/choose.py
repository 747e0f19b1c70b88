"""Which machine to rent: the preflight plans the job on every offer, and the objective ranks those that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from loadmaster import catalog
from loadmaster.config.fields import nearest_card
from loadmaster.config.schema import HardwareConfig, Job, LaunchConfig
from loadmaster.errors import ConfigError, DoesNotFit
from loadmaster.launch.provider import Offer
from loadmaster.preflight import Plan, make_plan
from loadmaster.preflight.verification import can_export

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Choice:
    offer: Offer
    plan: Plan
    can_export: bool = True
    """Whether all that the job asks for passes there, and not its training alone."""

    @property
    def hours(self) -> float | None:
        return self.plan.hours

    @property
    def usd(self) -> float | None:
        """For the whole job at the price of this moment."""
        return None if self.hours is None else self.hours * self.offer.usd_per_hour


def nodes_of(job: Job) -> int:
    """Machines that the job runs on: launch.nodes, else hardware.nodes."""
    return job.hardware.nodes if job.launch.nodes == "auto" else job.launch.nodes


def wanted(job: Job) -> list[tuple[str, int | None]]:
    """(GPU of the catalogue, count or None for any) that the job may be rented on.

    Raises ConfigError where launch.gpus names what is not there, or contradicts hardware.gpu.
    """
    nodes = nodes_of(job)
    joined = _joinable(1 if job.launch.force_pods else nodes)
    known = list(catalog.gpus()) if job.launch.force_pods or nodes == 1 else joined
    fixed = None if job.hardware.gpu == "local" else (job.hardware.gpu, job.hardware.count)
    if fixed is not None and fixed[0] in catalog.gpus() and fixed[0] not in known:
        raise ConfigError.of("hardware.gpu", fixed[0], _unjoined(job), _instead(known))
    if job.launch.gpus == "auto":
        if fixed is None:
            return [(gpu, None) for gpu in joined]
        return [(fixed[0], None if fixed[1] == "auto" else fixed[1])]
    if fixed is not None:
        message = "hardware.gpu names the machine already"
        raise ConfigError.of("launch.gpus", job.launch.gpus, message, "give one of the two")
    found = []
    for word in job.launch.gpus:
        gpu, _, count = word.partition(":")
        if gpu not in catalog.gpus():
            guess = nearest_card(gpu, known)
            remedy = (f"launch.gpus=[{guess}]; " if guess else "") + f"one of {', '.join(known)}"
            raise ConfigError.of("launch.gpus", word, "is not in the catalogue", remedy)
        if gpu not in known:
            raise ConfigError.of("launch.gpus", word, _unjoined(job), _instead(known))
        if count and not (count.isdecimal() and int(count) in COUNTS):
            raise ConfigError.of("launch.gpus", word, "has no such count", f"{gpu}:1, :2, :4 or :8, or {gpu} for any")
        found.append((gpu, int(count) if count else None))
    return found


def _unjoined(job: Job) -> str:
    return (
        f"no cluster of {nodes_of(job)} nodes has it, and plain Pods have 100 Mbit/s between them where a cluster has "
        "1600 Gbit/s or more: they spend the hours that you pay for waiting for each other"
    )


def _instead(known: list[str]) -> str:
    return f"one of {', '.join(known) or 'fewer nodes'}; or, knowing that, launch.force_pods=true"


def counts(gpus: list[tuple[str, int | None]]) -> tuple[int, ...]:
    """GPU counts to ask the provider about."""
    return COUNTS if any(count is None for _, count in gpus) else tuple(sorted({count for _, count in gpus if count}))


def choices(job: Job, offers: list[Offer], dataset_tokens: int | None) -> list[Choice]:
    """Offers that the job fits and that launch.* allows, best first; those last on which its exports will not pass.

    Raises DoesNotFit with a line for each offer that fell, when none is left.
    """
    launch, gpus = job.launch, wanted(job)
    fit, fell = [], []
    for offer in offers:
        if not any(gpu == offer.gpu and count in (None, offer.count) for gpu, count in gpus):
            continue
        if offer.usd_per_hour <= 0:
            fell.append(f"{offer.label}: the provider names no price for it, so no limit of money would hold")
            continue
        price = f"{offer.label}: ${offer.usd_per_hour:.2f}/h"
        if launch.max_usd_per_hour is not None and offer.usd_per_hour > launch.max_usd_per_hour:
            fell.append(f"{price}, over launch.max_usd_per_hour={launch.max_usd_per_hour:g}")
            continue
        if launch.data_centers and offer.places:
            offer = replace(offer, places=tuple(place for place in offer.places if place in launch.data_centers))
            if not offer.places:
                fell.append(f"{offer.label}: not in stock in {', '.join(launch.data_centers)}")
                continue
        plan = make_plan(on(job, offer), dataset_tokens)
        choice = Choice(offer, plan, can_export(job, plan.verification))
        if not plan.fits:
            room = f"does not fit ({plan.memory_gib.total:.1f} GiB on a GPU, {plan.budget_gib:.1f} there)"
            fell.append(f"{price}, {plan.refusal or room}")
        elif launch.max_usd is not None and choice.usd is not None and choice.usd > launch.max_usd:
            fell.append(f"{price}, ${choice.usd:.2f} in all, over launch.max_usd={launch.max_usd:g}")
        else:
            fit.append(choice)
    if not fit:
        asked = ", ".join(f"{gpu}{f':{count}' if count else ''}" for gpu, count in gpus)
        listed = "\n".join(f"  {line}" for line in fell) or f"  the provider has none of {asked} in stock at present"
        raise DoesNotFit(f"no machine to rent for this job:\n{listed}")
    return sorted(fit, key=lambda choice: _rank(launch, choice))


def on(job: Job, offer: Offer) -> Job:
    """The job as it runs on that machine."""
    return replace(job, hardware=HardwareConfig(gpu=offer.gpu, count=offer.count, nodes=offer.nodes))


def _joinable(nodes: int) -> list[str]:
    """GPUs of the catalogue with a fabric that joins so many nodes."""
    return [machine["gpu"] for machine in catalog.machines() if machine["max_nodes"] >= nodes]


def _rank(launch: LaunchConfig, choice: Choice) -> tuple[float, ...]:
    """Dollars and hours, of the whole job or, where its length is not known, of a token."""
    speed = choice.plan.tokens_per_second or 1e-9
    hours = choice.hours if choice.hours is not None else 1 / speed
    usd = choice.usd if choice.usd is not None else choice.offer.usd_per_hour / speed
    return not choice.can_export, *((usd, hours) if launch.objective == "cost" else (hours, usd))
