"""`loadmaster doctor`: what this machine has; under launch/torchrun.py, whether all machines of a job are alike."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loadmaster.config.origins import COMMAND_LINE
from loadmaster.errors import ConfigError
from loadmaster.packages import versions
from loadmaster.preflight.hardware import detect_local
from loadmaster.training.ranks import is_member, torchrun_variables

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "llmcompressor", "datasets")


def doctor(overrides: list[str]) -> int:
    os.environ.update(torchrun_variables(os.environ))
    if is_member():
        return _of_all(overrides)
    if overrides:
        message = "a job's words are for python launch/torchrun.py -m loadmaster.cli doctor; this looks at one machine"
        raise ConfigError.of(overrides[0], None, message, "loadmaster doctor", COMMAND_LINE)
    here = detect_local()
    host = "" if here.host_memory_gib is None else f", host memory {here.host_memory_gib:.1f} GiB"
    device = "the CPU" if here.is_cpu else f"{here.count}x {here.gpu}, {here.memory_gib:.1f} GiB each"
    rows = {"device": device + host, "disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free here"}
    rows |= dict.fromkeys(PACKAGES, "not installed") | versions(PACKAGES)
    for name, said in rows.items():
        print(f"{name:<{max(map(len, rows))}}  {said}")
    return 0


def _of_all(overrides: list[str]) -> int:
    """The check that training begins with, by itself: nothing is loaded or trained."""
    from loadmaster.config.compose import compose
    from loadmaster.config.jobhash import job_hash
    from loadmaster.config.overrides import note_repeated
    from loadmaster.dataset_size import dataset_tokens
    from loadmaster.preflight import make_plan
    from loadmaster.training.doctor import describe, examine, needs_of
    from loadmaster.training.watchdog import Watchdog, as_they_begin
    from loadmaster.training.world import join, leave
    from loadmaster.world_stages import device_type

    note_repeated(overrides)
    composed = compose(overrides)
    job = composed.job
    with composed.located():
        plan = make_plan(job, dataset_tokens(job))
    world = join(device_type(plan, job.hardware.gpu))
    try:
        with as_they_begin(world.rank), Watchdog(world, None):  # a host may be lost meanwhile
            reports = examine(world, job_hash(job), "", Path("."), needs_of(plan), print if world.lead else str)
        if world.lead:
            print("\n".join(describe(reports)))
    finally:
        leave(world)
    return 0
