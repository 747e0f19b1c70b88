"""Export: merge, quantize, verify, publish (stage.export_all). `report_table` shows what that found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loadmaster.export.table import report_table

if TYPE_CHECKING:
    from loadmaster.config.schema import Job

__all__ = ["refuse_unholdable", "report_table"]


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
