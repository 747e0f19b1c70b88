"""What a job's result depends on, as hashes: whether a run is this job's, and which of its stages are stale.

`job_hash` covers what shapes the trained weights: two commands with the same hash train the same model, and the
second goes on in the first one's run directory. Each later stage adds the fields that only it reads, so a
change of export.formats exports again and trains nothing. Files are hashed by name here; the pipeline adds
their contents.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from loadmaster.config.fields import fields, written
from loadmaster.config.rates import peak_rate
from loadmaster.config.schema import STAGES, EndpointConfig, Job
from loadmaster.config.validate import to_dict
from loadmaster.files import sha256_json

# By stage, the sections and fields that are its inputs; a stage also depends on all stages before it.
STAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "plan": (
        "model", "data", "sequence_length", "objective", "preference", "method", "precision", "lora", "neftune_alpha",
        "optimizer", "batch", "epochs", "max_steps", "seed",
    ),
    "train": ("checkpoint.load_best", "evaluation.patience"),
    "evaluate": ("evaluation.task", "evaluation.max_rows", "evaluation.max_new_tokens"),
    "export": ("export", "endpoint.server"),
    "bundle": tuple(f"endpoint.{field.name}" for field in dataclasses.fields(EndpointConfig) if field.name != "server"),
}

# How the work is spread and on what: inputs of the plan stage alone. Later stages depend on what the plan then chose
# (the pipeline adds its method, precision and optimizer), so a run goes on with other GPUs, or another number of them.
SPREAD = (
    "micro_batch_size", "activation_checkpointing", "checkpointed_layers", "compile", "sharding", "offload", "plan",
    "hardware",
)

# What may change between two starts of the same run: names and places, how often to save and look, who watches.
NOT_INPUTS = (
    "recipe", "run_dir", "stop_after", "checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_best",
    "evaluation.every_steps", "evaluation.batch_size", "launch", "tracker",
)


SINCE: dict[str, Any] = {
    "lora.modules_to_save": [], "lora.dora": False, "optimizer.in_backward": "auto", "checkpointed_layers": "auto",
    "data.subset": None, "data.validation_split": "validation", "model.chat_template": None,
    "data.columns": None, "checkpoint.load_best": False,
    "evaluation.patience": None, "optimizer.warmup_steps": None, "optimizer.decay_ratio": 0.1,
}
"""Fields that came after runs were hashed without them, with what those runs did: left out where they say that."""


def job_hash(job: Job) -> str:
    """Hash of every field that shapes the steps of training; stable over machines, key order and versions of Python.

    After which of them a run ends early, and which checkpoint is taken, are not among them: a run that is done goes on
    to make the others, or to take another one.
    """
    same = dataclasses.replace(job, checkpoint=dataclasses.replace(job.checkpoint, load_best=False))
    evaluation = dataclasses.replace(job.evaluation, patience=None)
    return stage_inputs_hash(dataclasses.replace(same, evaluation=evaluation), "train")


def stage_inputs_hash(job: Job, stage: str) -> str:
    """Hash of every field that the output of `stage` depends on, those of the stages before it included.

    What only says how work is spread counts in the plan stage alone.
    """
    values, left_out = _inputs(job), set()
    for name, before in SINCE.items():
        *section, field = name.split(".")
        held = _value(values, section[0]) if section else values
        if held[field] == before:
            del held[field]
            left_out.add(name)
    if saved := values["lora"].get("modules_to_save"):  # a set: neither order nor repetition is another job
        values["lora"]["modules_to_save"] = sorted(set(saved))
    names = [name for earlier in STAGES[: STAGES.index(stage) + 1] for name in STAGE_FIELDS[earlier]]
    names += SPREAD if stage == "plan" else ()
    return sha256_json({name: _value(values, name) for name in names if name not in left_out})


def differing(job: Job, other: Job) -> list[str]:
    """Fields that shape the trained weights and that two jobs set otherwise, each with both values."""
    mine, theirs = _inputs(job), _inputs(other)
    shaping = [key for key in fields() if key.partition(".")[0] in STAGE_FIELDS["plan"]]
    found = [(key, _value(theirs, key), _value(mine, key)) for key in shaping]
    return [f"{key} is {written(there)} there and {written(here)} here" for key, there, here in found if there != here]


def _inputs(job: Job) -> dict[str, Any]:
    """The job's fields, with a learning rate left open as the number that it is."""
    values = to_dict(job)
    if job.method != "auto":
        values["optimizer"]["lr"] = peak_rate(job, job.method)
    return values


def _value(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
