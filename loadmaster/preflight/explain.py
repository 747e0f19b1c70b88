"""Sentences about a plan: what it is, why this one, why not another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from loadmaster.config.model_folder import lacking
from loadmaster.config.rates import FAR, usual_rate
from loadmaster.config.schema import DATA_SUFFIXES, Job
from loadmaster.config.shipped import SCHEME, local_path
from loadmaster.preflight.batch import divisors
from loadmaster.preflight.calibration import CALIBRATED, quantizing
from loadmaster.preflight.candidate import Candidate, can_offload
from loadmaster.preflight.coefficients import coefficients
from loadmaster.preflight.exports import counts_exports, export_problems
from loadmaster.preflight.hardware import GIB, Hardware, not_offered, unknown_network
from loadmaster.preflight.hours import first_step_hours, mean_rows, reference_hours, run_hours, steps
from loadmaster.preflight.largest import ROW_STEP, largest_micro_batch, longest_row
from loadmaster.preflight.phases import answering
from loadmaster.preflight.plan import rounded
from loadmaster.preflight.refusals import TYPED, UNCOUNTED, uncounted_adapters
from loadmaster.preflight.search import Found
from loadmaster.preflight.setup import Setup, sharding_words
from loadmaster.preflight.shape import FLASH_HEAD, ModelShape
from loadmaster.preflight.targets import in_some_layers_only
from loadmaster.preflight.verification import VerificationNeed
from loadmaster.words import counted

RUNNER_UP = "runner-up"
FULLEST = {
    "train": "in a step",
    "load": "while it loads the model",
    "evaluate": "where it takes the held-out loss",
    "save": "while it saves a checkpoint",
}
"""Words for the phase of training that needs most (memory.phases_in_training)."""


def describe(setup: Setup) -> str:
    optimizer = setup.optimizer + (" with fp32 master weights" if setup.master_weights else "")
    optimizer += " in the backward pass" if setup.in_backward else ""
    parts = [setup.method, setup.precision, optimizer]
    if setup.sharding != "none":
        parts.append(sharding_words(setup))
    if setup.offload != "none":
        parts.append(f"{'optimizer' if setup.offload == 'optimizer' else 'weights and optimizer'} in host memory")
    but = f" of all but the last {setup.kept_layers}" if setup.kept_layers else ""
    parts.append(f"activation checkpointing {setup.checkpointing}{but}")
    rows = setup.micro_batch_size
    parts.append(f"{counted(rows, 'row')} of {setup.sequence_length} tokens at a time")
    return ", ".join(parts)


def shortfall(candidate: Candidate) -> str:
    """What a plan needs against what there is, in GiB."""
    need, budget = candidate.memory.needed_gib, candidate.budget_gib
    host, has = candidate.memory.host_gib, candidate.hardware.host_memory_gib
    said = []
    if need > budget:
        where = "" if candidate.hardware.is_cpu else " on each GPU"
        said.append(f"needs {need:.1f} GiB{where} of {budget:.1f}")
    if has is not None and host > has and not candidate.hardware.is_cpu:
        said.append(f"needs {host:.0f} GiB of host memory of {has:.0f}")
    return " and ".join(said) or f"fits: {need:.1f} GiB of {budget:.1f}"


def rejection(job: Job, candidate: Candidate) -> dict[str, Any]:
    return {
        "plan": describe(candidate.setup),
        "needs_gib": round(candidate.memory.needed_gib, 2),
        "budget_gib": round(candidate.budget_gib, 2),
        "host_memory_gib": candidate.memory.host_gib,
        "reason": shortfall(candidate) + _explicit_remedy(job, candidate),
    }


def _explicit_remedy(job: Job, failed: Candidate) -> str:
    """The number that would fit, of what was written and is too large."""
    too_large = failed.memory.needed_gib > failed.budget_gib
    alone = failed.setup.micro_batch_size == 1 and failed.setup.sequence_length > ROW_STEP
    if too_large and alone and (longest := longest_row(job, failed)):
        return f"; sequence_length={longest} fits"
    if job.micro_batch_size == "auto" or not too_large:
        return ""
    fits = largest_micro_batch(job, failed)
    if fits == 0:
        return "; not even micro_batch_size=1 fits"
    if failed.setup.in_backward:  # a step is one micro-batch
        return f"; batch.global_size={fits * failed.hardware.world_size} micro_batch_size={fits} fits"
    rows = job.batch.global_size // failed.hardware.world_size
    divides = max(size for size in divisors(rows) if size <= fits)
    usable = f" ({divides} is the largest that divides batch.global_size={job.batch.global_size})"
    return f"; micro_batch_size={fits} fits{'' if divides == fits else usable}"


def refused(job: Job, chosen: Candidate, found: Found, rejected: list[dict[str, Any]]) -> list[str]:
    """Why there is no plan; rejected: `rejection` of each plan that came nearest."""
    said = [str(refusal) for refusal in found.refusals] or _left_out(job, chosen.shape)
    said = said + [f"{row['plan']}: {row['reason']}" for row in rejected]
    return said + list(filter(None, [not_offered(chosen.hardware)]))


def reasons(
    job: Job, chosen: Candidate, found: Found, verification: VerificationNeed, dataset_tokens: int | None
) -> list[str]:
    """Why this plan, and what one should know of it."""
    shape, setup = chosen.shape, chosen.setup
    fullest = FULLEST[max(chosen.memory.phases, key=lambda phase: chosen.memory.phases[phase])]
    said = [f"training needs {chosen.memory.needed_gib:.1f} of {chosen.budget_gib:.1f} GiB, {fullest}"]
    said += how_much(job, dataset_tokens)
    if asking := reference_hours(job, chosen, dataset_tokens):
        took = f"{asking:.2g} of these hours" if asking >= 0.01 else "less than a minute"
        asked = "the model is asked about the answers before the first step"
        said.append(f"{asked}, {took}: {job.objective} compares with it")
    said += filter(None, [not_offered(chosen.hardware), unknown_network(chosen.hardware)])
    if found.nearest:
        better = found.nearest[-1]
        said.append(f"more faithful, but does not fit: {describe(better.setup)} {shortfall(better)}")
    said += _left_out(job, shape)
    said += [against(chosen, other) for other in found.others]
    if longest := _longest(job, chosen):
        said.append(f"the longest row that fits here, recomputed and one at a time: {longest}")
    known = shape.max_position
    if known and setup.sequence_length > known:
        said.append(
            f"rows of {setup.sequence_length:,} tokens are longer than the {known:,} that the model knows: "
            f"no single document should be; sequence_length={known} cuts or splits those that are"
        )
    said += about_rate(job, setup.method)
    said += about_warm_up(job, dataset_tokens)
    said += about_limits(job, chosen, dataset_tokens)
    if setup.adapters and in_some_layers_only(shape, setup.lora_targets):
        said.append(f"lora.targets adapts some layers only and was counted in all {shape.layers}: less is needed")
    if setup.offload != "none" and not chosen.hardware.is_cpu:
        said.append(f"{chosen.memory.host_gib:.0f} GiB of host memory hold what the GPUs cannot")
    said += about_answers(job, chosen)
    said += about_quantizing(job, chosen)
    said += about_verification(job, chosen, verification)
    if shape.language_model_of:
        said.append(
            f"{shape.language_model_of} is multimodal: its language model alone is trained, from a copy in the cache; "
            "an adapter goes onto the whole of it, whose other parts are as they were, and every other export is that "
            "language model without them, for text"
        )
    wide = sum(layers for view, layers in shape.views if view.head_dim > FLASH_HEAD)
    if wide and not chosen.hardware.is_cpu:
        said.append(
            f"{wide} of its {shape.layers} layers have heads of {shape.widest.head_dim} numbers; flash kernels take "
            f"{FLASH_HEAD}: attention there is by PyTorch's memory-efficient kernel, one document at a time; memory "
            "is counted for a row that is one document, its speed was not measured and is counted as a flash kernel's, "
            "so tokens a second are an upper bound"
        )
    if shape.estimate:
        off = ", and parameters and weights may be off by a third (an MLP without a gate has two matrices, not three)"
        traced = "" if job.plan.trace else (
            f"{off * shape.gated}; plan.trace=true counts the model itself and traces its step"
        )
        said.append(f"an estimate: {shape.estimate}{traced}")
    if job.stop_after == "plan":  # else they are refused
        said += [f"the export will not pass: {p.key}: {p.message}; {p.remedy}" for p in export_problems(job, shape)]
    if shape.name != job.model.name:
        said.append(f"model.path holds another model than {job.model.name}; it is called {shape.name}: set model.name")
    here = job.model.path is not None and job.launch.name == "local"  # else the folder is the hosts'
    if here and (missing := lacking(local_path(job.model.path))):
        said.append(f"model.path holds no {' and no '.join(missing)}: enough for a plan, not to train")
    return said


def _longest(job: Job, chosen: Candidate) -> str:
    """Tokens; where they are fewer than the model knows, also of rows whose layers' inputs go to host memory. Empty
    where none fits alone, beside accumulated gradients."""
    longest, known = longest_row(job, chosen), chosen.shape.max_position
    if not longest:
        return ""
    most, said = longest, f"{longest:,} tokens"
    if known and longest < known and job.activation_checkpointing == "auto" and can_offload(chosen.hardware):
        most = max(longest, longest_row(job, chosen, offload=True))
        said += f", or {most:,} with layers' inputs in host memory" if most > longest else ""
    beyond = f", {'more than' if most > known else 'of'} the {known:,} that the model knows" if known else ""
    return said + beyond


def _left_out(job: Job, shape: ModelShape) -> list[str]:
    """Why method=auto did not consider adapters."""
    if job.method != "auto" or not uncounted_adapters(job, shape):
        return []
    why = f"lora.targets=all-linear: {UNCOUNTED.format(name=shape.name)}"
    return [f"only full was considered, for {why}; {TYPED} lets lora and qlora compete"]


def how_much(job: Job, dataset_tokens: int | None) -> list[str]:
    """How much is trained on in the hours and for the dollars of the plan."""
    paths = job.data.paths
    # By file name: exports carry the plan, and are passed on.
    named = ", ".join(Path(path).name if os.path.exists(local_path(path)) else path for path in paths[:3])
    named += f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    if job.data.max_rows is not None:
        named = f"the first {counted(job.data.max_rows, 'row')} of {named}"
    count = steps(job, dataset_tokens)
    if count is None:
        files = [path for path in paths if path.lower().endswith(DATA_SUFFIXES) and not path.startswith(SCHEME)]
        absent = [path for path in files if not os.path.exists(local_path(path))]
        why = f", where there is no {' nor '.join(absent[:3])}" if absent else ""
        return [f"no hours or dollars: how much {named} holds is not known here{why}; max_steps would say it"]
    whole = "max_steps" if job.max_steps is not None else f"{job.epochs:g} epoch{'s' if job.epochs != 1 else ''}"
    shown = ", which is here to try things on" if all(path.startswith(SCHEME) for path in paths) else ""
    most = job.batch.global_size
    size = f"{'up to ' if mean_rows(job, dataset_tokens) < most else ''}{most} x {job.sequence_length:,} tokens"
    about = "" if job.max_steps is not None else "about "
    rows = f"{about}{counted(count, 'step')} of {size}"
    return [f"the hours are those of {rows}: {whole} of {named}{shown}"]


def about_rate(job: Job, method: str) -> list[str]:
    """The learning rate where it was left open, or is far from what this method usually takes."""
    usual, given = usual_rate(job, method), job.optimizer.lr
    trained = f"{method} and objective={job.objective}"
    if given == "auto":
        return [f"learning rate {usual:g}, the usual one of {trained}: optimizer.lr=auto"]
    times = given / usual
    if 1 / FAR < times < FAR:
        return []
    than = f"{times:,.0f} times" if times > 1 else f"1/{1 / times:,.0f} of"
    return [f"optimizer.lr={given:g} is {than} the usual learning rate of {trained}: optimizer.lr=auto takes {usual:g}"]


def about_warm_up(job: Job, dataset_tokens: int | None) -> list[str]:
    """Where it takes more steps than there are; of max_steps it is refused (warm_up_ends_within_the_run)."""
    warmup, count = job.optimizer.warmup_steps, steps(job, dataset_tokens)
    if not warmup or count is None or warmup < count:
        return []
    share = f"rises to {count / warmup:.0%} of its peak" if count < warmup else "comes to its peak in the last one"
    return [f"the learning rate {share}: optimizer.warmup_steps={warmup:,} in a run of about {counted(count, 'step')}"]


def about_limits(job: Job, chosen: Candidate, dataset_tokens: int | None) -> list[str]:
    """Where a limit of time or money ends the run before it is done; what is rented is chosen by these limits."""
    launch, hours = job.launch, run_hours(job, chosen, dataset_tokens)
    if launch.name != "local" or hours is None:
        return []
    pays_for: dict[str, float] = {}
    if launch.max_hours != "auto":
        pays_for["launch.max_hours"] = launch.max_hours
    if launch.max_usd is not None and chosen.hardware.usd_per_hour:
        pays_for["launch.max_usd"] = launch.max_usd / chosen.hardware.usd_per_hour
    limit = min(pays_for, key=pays_for.__getitem__, default=None)
    if limit is None or pays_for[limit] >= hours:
        return []
    given, share = getattr(launch, limit.partition(".")[2]), pays_for[limit] / hours
    ends = f"{limit}={given:g} stops the run after {share:.0%} of these {hours:.2f} hours"
    needed = 1.2 * first_step_hours(job, chosen, dataset_tokens)  # a stop is requested up to a tenth before the limit
    if pays_for[limit] >= needed:
        asking = pays_for[limit] < needed + 1.2 * reference_hours(job, chosen, dataset_tokens)
        return [f"{ends}, with {'what the model said so far' if asking else 'a checkpoint'}: the same command goes on"]
    least = f"{limit}={float(f'{1.1 * given * needed / pays_for[limit]:.2g}'):g}"
    return [f"{ends}, before the first step: nothing is saved and the same command comes no further; {least} does"]


def about_answers(job: Job, chosen: Candidate) -> list[str]:
    """Where the evaluate stage's answers may need more than there is: how long their prompts are is not known here."""
    need, asked = answering(job, chosen.shape, chosen.hardware, chosen.setup)
    budget = chosen.budget_gib * GIB
    if need.total <= budget or job.stop_after == "train":
        return []
    fit = max(0, int((budget - need.total + need.activations) * asked // need.activations))
    remedy = f"evaluation.batch_size={fit} fits" if fit else "not even evaluation.batch_size=1 fits"
    return [
        f"the evaluate stage needs {need.total / GIB:.1f} GiB of {chosen.budget_gib:.1f} if its prompts are a quarter "
        f"of a row long ({counted(asked, 'answer')} at a time): {remedy}"
    ]


def about_quantizing(job: Job, chosen: Candidate) -> list[str]:
    """Where formats that are calibrated need more than there is: a CPU holds the whole model meanwhile."""
    formats = [name for name in job.export.formats if name in CALIBRATED]
    need = quantizing(job, chosen.shape, chosen.hardware).total if formats and counts_exports(job) else 0.0
    if need <= chosen.budget_gib * GIB:
        return []
    named = " and ".join(formats)
    needs = f"that takes {need / GIB:.1f} GiB of {chosen.budget_gib:.1f}"
    return [f"{named} cannot be quantized here: {needs}; leave it out of export.formats, or stop_after=evaluate"]


def about_verification(job: Job, chosen: Candidate, need: VerificationNeed) -> list[str]:
    """Where the export's verification puts a model that one GPU does not hold, and what that costs."""
    if need.is_whole or not counts_exports(job):
        return []
    on_cpu = chosen.hardware.is_cpu
    if need.placement is None:
        holds = "this machine holds" if on_cpu else f"{chosen.hardware.label} and its host memory hold"
        return [
            f"the export will not pass here: its verification needs {need.bytes.total / GIB:.0f} GiB, of which "
            f"{holds} too little; end with stop_after=evaluate"
        ]
    said = f"exports are verified with {need.placement.words(not on_cpu)}"
    if need.seconds:
        moved = f"{(need.host_bytes + need.disk_bytes) / GIB:.0f} GiB are "
        moved += "read from there" if on_cpu else "brought to the first GPU"
        said += (
            f": {moved} in each of {need.passes} forward passes, "
            f"{need.seconds / 3600:.1f} hours (modelled) with {counted(need.answers, 'answer')} at a time, less with "
            "fewer or shorter ones (evaluation.max_rows, evaluation.max_new_tokens)"
        )
    where = "several GPUs" if sum(map(bool, need.placement.gpus)) > 1 else "a GPU with layers in host memory"
    return [said if on_cpu else f"{said}; not seen on {where} yet"]


def against(chosen: Candidate, other: Candidate) -> str:
    """What the runner-up would win or cost."""
    gib = round(other.memory.needed_gib - chosen.memory.needed_gib, 1)
    memory = f"{abs(gib):.1f} GiB {'more' if gib > 0 else 'less'}" if gib else "as much memory"
    if not chosen.tokens_per_second or not other.tokens_per_second:
        return f"{RUNNER_UP} ({describe(other.setup)}): {memory}"
    change = round(other.tokens_per_second / chosen.tokens_per_second - 1, 2)
    speed = f"{abs(change):.0%} {'faster' if change > 0 else 'slower'}" if change else "as fast"
    return f"{RUNNER_UP} ({describe(other.setup)}): {speed}, {memory}"


def runner_up(chosen: Candidate, other: Candidate) -> dict[str, Any]:
    return {
        "plan": describe(other.setup),
        "needs_gib": round(other.memory.needed_gib, 2),
        "tokens_per_second": rounded(other.tokens_per_second, 1),
        "difference": against(chosen, other),
    }


def basis(hardware: Hardware, setup: Setup) -> dict[str, str]:
    """Where the figures come from, and what they leave out."""
    table = coefficients()
    measured = table["context"]["cuda_gib"]
    here = hardware.gpu == measured.get("card")
    memory = "weights, gradients, states: exact; activations and loss: replay of the engine, equal to traces"
    if hardware.is_cpu:
        memory += "; the process itself: modelled"
    else:
        memory += f"; context and workspaces: measured on {measured['card']}, {measured['date']}"
    if setup.compiled:
        memory += "; what compiled layers keep: as the compiler's partitioner cuts them, not measured"
    if setup.in_backward:
        memory += "; steps in the backward pass: replayed, run on no GPU"
    if hardware.world_size > 1:
        memory += "; gathered weights and gradients on their way: equal to traces of fully_shard (ZeRO: modelled)"
        memory += "; communicators: modelled"
    efficiency = table["efficiency"]["matmul"]
    speed = f"roofline, efficiencies {efficiency['kind']} ({efficiency['date']})"
    if hardware.world_size > 1:
        speed += "; collectives over the links' published bandwidths: modelled, no run on several GPUs was measured"
    if not here and not hardware.is_cpu:
        speed += ", scaled to this card from its data sheet"
    return {
        "memory": memory,
        "speed": speed,
        "left_out": "fragmentation beyond the reserve, other processes on the card",
    }
