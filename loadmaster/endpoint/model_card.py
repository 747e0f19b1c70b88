"""README.md of a pushed model: what it was made from, how, what was measured, and how to serve it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from loadmaster.endpoint import readme, settings
from loadmaster.export.manifest import is_served
from loadmaster.export.table import COLUMNS, row

RELATION = {"adapter": "adapter", "bf16": "finetune"}
"""The Hub's word for how a model relates to its base; every other format is a quantization."""


def model_card(manifest: dict[str, Any], repository: str, job: dict[str, Any], licence: str | None) -> str:
    """The card as Markdown with the Hub's YAML header.

    job: see `loadmaster.endpoint.push._job_facts`. licence: of the base model, where it is known.
    """
    format_name, plan = manifest["format"], manifest.get("plan") or {}
    context = job.get("sequence_length") or plan.get("sequence_length") or 2048
    name = repository.rpartition("/")[2]
    if not is_served(manifest, format_name):
        command = None
    else:
        command = shlex.join(settings.vllm_command(settings.model_options(manifest, repository, context)))
    figures = {**manifest["verification"], "bytes": manifest["bytes"]}
    return readme.render(
        "model_card.md.j2", manifest=manifest, repository=repository, name=name, job=job, licence=licence, plan=plan,
        relation=RELATION.get(format_name, "quantized"), command=command, context=context,
        figures=readme.table((column for column, _ in COLUMNS), [row(format_name, figures)]), yaml=json.dumps,
        limits={key: value for key, value in figures.get("limits", {}).items() if value is not None},
    )
