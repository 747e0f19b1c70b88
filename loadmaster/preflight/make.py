"""`make_plan`: the one function that the rest of the program calls."""

from __future__ import annotations

from dataclasses import replace

from loadmaster import catalog
from loadmaster.config.rates import peak_rate
from loadmaster.config.schema import Job
from loadmaster.preflight import saved, targets
from loadmaster.preflight.alternatives import alternatives
from loadmaster.preflight.candidate import Candidate, closeness
from loadmaster.preflight.config_json import find_shape
from loadmaster.preflight.disk import disk_bytes
from loadmaster.preflight.elsewhere import elsewhere
from loadmaster.preflight.explain import basis, reasons, refused, rejection, runner_up
from loadmaster.preflight.exports import counts_exports, refuse_unholdable
from loadmaster.preflight.hardware import GIB, OWN_PRICE, Hardware, find_hardware
from loadmaster.preflight.hours import run_hours, run_usd, steps
from loadmaster.preflight.phases import components_gib, phase_bytes, phases_gib
from loadmaster.preflight.plan import HardwareSummary, ModelSummary, Plan, rounded
from loadmaster.preflight.refusals import with_a_batch_that_divides
from loadmaster.preflight.search import Found, search, smallest
from loadmaster.preflight.speed import model_flops
from loadmaster.preflight.verification import verifying


def make_plan(
    job: Job,
    dataset_tokens: int | None = None,
    with_alternatives: bool = True,
    with_elsewhere: bool = False,
    card_share: float = 1.0,
) -> Plan:
    """The plan for a job; `fits` is False when there is none, with what came nearest and what would do.

    dataset_tokens: tokens of one epoch, for hours and dollars; None leaves them out unless max_steps is set.
    with_alternatives: look for what would do when nothing fits, on all machines of the catalogue.
    with_elsewhere: price what fits on all machines of the catalogue.
    card_share: plan for so much of each card's memory (loadmaster.training.traced_plan).
    Raises LoadmasterError for a model whose config.json cannot be found or read, ConfigError for unknown hardware.
    """
    shape, hardware = find_shape(job.model, traced=job.plan.trace), find_hardware(job.hardware)
    if job.method != "full":
        saved.refuse_unknown(shape, job.lora.modules_to_save)
        targets.refuse_unknown(shape, job.lora.targets, job.model.path or job.model.name)
    refuse_unholdable(job, shape)
    hardware = replace(hardware, memory_gib=card_share * hardware.memory_gib)
    found = search(job, shape, hardware)
    divided = with_a_batch_that_divides(job, shape, hardware) if found.refusals else None
    near = search(divided, shape, hardware) if divided is not None else found
    chosen = near.best or min(near.nearest, key=closeness, default=None) or smallest(job, shape, hardware)
    plan = _plan(job, chosen, found, dataset_tokens)
    if divided is not None:
        plan = replace(plan, planned_with=f"batch.global_size={divided.batch.global_size}")
    if found.best is not None:
        if not with_elsewhere:
            return plan
        return replace(plan, elsewhere=elsewhere(job, chosen, dataset_tokens), elsewhere_order=job.plan.objective)
    if not with_alternatives:
        return plan
    return replace(plan, alternatives=alternatives(job, shape, hardware, dataset_tokens))


def _plan(job: Job, chosen: Candidate, found: Found, dataset_tokens: int | None) -> Plan:
    shape, setup, hardware, fits = chosen.shape, chosen.setup, chosen.hardware, found.best is not None
    phases, verification = phase_bytes(job, shape, hardware, setup), verifying(job, shape, hardware, setup)
    rejected = [rejection(job, each) for each in found.nearest]
    why = reasons(job, chosen, found, verification, dataset_tokens) if fits else refused(job, chosen, found, rejected)
    head = setup.trains("lm_head") or (shape.tied and setup.trains("embed_tokens"))
    # What does not run has no speed, and costs nothing.
    speed, hours = (chosen.tokens_per_second, run_hours(job, chosen, dataset_tokens)) if fits else (None, None)
    return Plan(
        fits=fits,
        model=ModelSummary(
            name=shape.name,
            parameters=shape.parameters,
            trainable_parameters=setup.trainable(shape),
            layers=shape.layers,
            hidden_size=shape.hidden_size,
            vocabulary_size=shape.vocabulary_size,
            family=shape.family,
            estimate=shape.estimate,
            flops_per_token=model_flops(shape, job.sequence_length, setup.adapters, head),
        ),
        hardware=HardwareSummary(
            gpu=hardware.gpu,
            count=hardware.count,
            nodes=hardware.nodes,
            memory_gib=round(hardware.memory_gib, 2),
            host_memory_gib=rounded(hardware.host_memory_gib, 2),
        ),
        method=setup.method,
        precision=setup.precision,
        sharding=setup.sharding,
        replicas=setup.replicas,
        reshard_after_forward=setup.reshard_after_forward,
        offload=setup.offload,
        activation_checkpointing=setup.checkpointing,
        checkpointed_layers=setup.checkpointed_layers(shape),
        optimizer=setup.optimizer,
        master_weights=setup.master_weights,
        learning_rate=peak_rate(job, setup.method),
        micro_batch_size=setup.micro_batch_size,
        gradient_accumulation_steps=setup.gradient_accumulation_steps,
        sequence_length=setup.sequence_length,
        compile=setup.compiled,
        optimizer_in_backward=setup.in_backward,
        memory_gib=chosen.memory.train.gib(),
        phases_gib=phases_gib(phases),
        phase_components_gib=components_gib(phases),
        peak_gib=chosen.memory.peak,
        budget_gib=round(chosen.budget_gib, 2),
        host_memory_gib=chosen.memory.host_gib,
        disk_gib=round((disk_bytes(job, shape, setup) + verification.disk_bytes) / GIB, 2),
        tokens_per_second=rounded(speed, 1),
        hours=rounded(hours, 4),
        steps=steps(job, dataset_tokens),
        cost_usd=run_usd(hours, hardware.usd_per_hour),
        reasons=why,
        rejected=rejected + [refusal.row() for refusal in found.refusals],
        runners_up=[runner_up(chosen, other) for other in found.others],
        price=_price(hardware),
        basis=basis(hardware, setup),
        verification={**verification.summary(), "in_hours": counts_exports(job) and not hardware.is_cpu},
    )


def _price(hardware: Hardware) -> dict | None:
    if hardware.usd_per_hour is None:
        return None
    if hardware.price_note == OWN_PRICE:
        return {
            "usd_per_hour": round(hardware.usd_per_hour, 2),
            "date": None,
            "source": OWN_PRICE,
            "provider": "your own",
        }
    listed = catalog.prices()["gpus"][hardware.gpu]
    return {
        "usd_per_hour": round(hardware.usd_per_hour, 2),
        "date": str(listed["date"]),
        "hosts": listed.get("hosts", "secure"),
        "source": catalog.prices()["sources"].get(listed["date"], ""),
        "provider": catalog.prices()["provider"],
    }
