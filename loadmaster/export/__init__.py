"""Export: merge, quantize, verify, publish. `report_table` shows what `export_all` found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadmaster.export.table import report_table

if TYPE_CHECKING:
    from loadmaster.config.schema import Job
    from loadmaster.data import PreparedData
    from loadmaster.preflight.plan import Plan

__all__ = ["export_all", "refuse_unholdable", "report_table"]


def refuse_unholdable(job: Job, base_folder: Path, method: str) -> None:
    """Raises ConfigError where the job ends with exports that its base says cannot be made, or with a whole model that
    cannot be saved: before it is trained."""
    exported = job.stop_after in ("export", "bundle")
    if not exported and method != "full":
        return
    from loadmaster.errors import ConfigError, ExportRejected
    from loadmaster.export.build import refuse_renamed, streamed
    from loadmaster.export.servers import aimed_at

    formats = list(dict.fromkeys(job.export.formats))
    wrong, remedy = ("model.name", job.model.name), "another model, or this one in other files"
    try:
        if method == "full" or formats != ["adapter"]:
            refuse_renamed(base_folder, whole=method == "full")
        wrong, remedy = ("export.formats", formats), "other export.formats, or stop_after=evaluate"
        if exported:
            streamed(formats, base_folder, aimed_at(job.endpoint.server))
    except ExportRejected as error:
        raise ConfigError.of(*wrong, str(error), remedy) from None


def export_all(
    job: Job, plan: Plan, run_dir: Path, base_folder: Path, prepared: PreparedData, tokenizer: Any,
    echo: Callable[[str], None],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write run_dir/export/<format>/ for every format of the job, each verified against the model as trained.

    Formats already published from the same inputs are left alone. Call it on the main process only.
    Returns {format: figures}: perplexity_ratio, mean_kl and p99_kl (nats a token), top1_agreement, task,
    task_retention, passed, limits, bytes.
    Raises ExportRejected when a format does not reach its thresholds or cannot be made, LoadmasterError where this
    machine has no room for it; then none of them is published, and what was published before stays as it was.
    """
    # Imported when it is called, so that reading a manifest does not import torch.
    from loadmaster.export.stage import export_all as run

    return run(job, plan, run_dir, base_folder, prepared, tokenizer, echo)
