"""The peak learning rate where optimizer.lr is auto: what is usual for what is trained, and on what.

    objective   adapters   full
    sft         2e-4       1e-5   QLoRA, 7B and 13B (arXiv 2305.14314, table 9); Llama 3 (arXiv 2407.21783, 4.1.3)
    dpo         5e-6       5e-7   what TRL's dpo.py begins with
    kto         5e-6       5e-7   the same; of all weights its kto.py's
    orpo        8e-5       8e-6   what TRL's orpo.py does

Adapters take ten times the rate of all weights or more (Schulman et al. 2025, "LoRA Without Regret"). So a rate that is
written for one method is not a rate for another, and a recipe that leaves the method open leaves the rate open too.
"""

from __future__ import annotations

from loadmaster.config.schema import Job

USUAL = {
    "sft": {"adapters": 2e-4, "full": 1e-5},
    "dpo": {"adapters": 5e-6, "full": 5e-7},
    "kto": {"adapters": 5e-6, "full": 5e-7},
    "orpo": {"adapters": 8e-5, "full": 8e-6},
}
FAR = 20
"""So many times the usual rate, or so small a part of it, is more likely another method's than meant."""


def peak_rate(job: Job, method: str) -> float:
    """optimizer.lr, or what auto stands for when `method` (lora, qlora or full) trains this job."""
    return usual_rate(job, method) if job.optimizer.lr == "auto" else job.optimizer.lr


def usual_rate(job: Job, method: str) -> float:
    return USUAL[job.objective]["full" if method == "full" else "adapters"]
