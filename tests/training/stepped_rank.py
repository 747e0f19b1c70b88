"""One rank of a step in the backward pass in which a gradient is not finite on the first rank's shard alone.

    python -m tests.training.stepped_rank CASES.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from loadmaster.training.placement import local
from loadmaster.training.session import make_session
from loadmaster.training.world import join, leave
from tests.training.parity import JOB, plan, rows


def main(path: str) -> None:
    (case,) = json.loads(Path(path).read_text())
    world = join("cpu", 300)
    job = dataclasses.replace(JOB, optimizer=dataclasses.replace(JOB.optimizer, max_grad_norm=0.0))
    session = make_session(job, plan(case), world, 0, Path(case["model"]))
    before = {name: local(parameter).clone() for name, parameter in session.trained}
    spoiled = next(parameter for name, parameter in session.trained if "layers.1." in name)
    if world.lead:
        spoiled.register_post_accumulate_grad_hook(lambda p: local(p.grad).fill_(torch.inf))
    _, norm = session.gradients(session.split([rows(40)[i] for i in range(8)]), 100, 1e-3)
    moved = [name for name, parameter in session.trained if not torch.equal(local(parameter), before[name])]
    Path(case["out"]).mkdir(exist_ok=True)
    (Path(case["out"]) / f"{world.rank}.json").write_text(json.dumps({"moved": moved, "norm": norm.item()}))
    leave(world)


if __name__ == "__main__":
    main(sys.argv[1])
