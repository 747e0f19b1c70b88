"""The export stage: write every format asked for, prove each, and publish all of them or none.

run_dir/export/<format>/ appears by rename, complete and with its manifest, only after the last format has
passed; a crash, a full disk or a failed check at any moment leaves earlier exports as they were.
"""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from loadmaster.config.jobhash import job_hash
from loadmaster.config.schema import Job
from loadmaster.data import PreparedData
from loadmaster.data.render import stop_token_ids, template_hash
from loadmaster.errors import ExportRejected
from loadmaster.export import quantize, table, thresholds, verify
from loadmaster.export.manifest import read_manifest, verify_manifest, versions, write_manifest
from loadmaster.export.merge import MergeReport, merge, nf4_round_trip, read_adapter
from loadmaster.export.process import run_step, timeout_s
from loadmaster.export.sidecars import write_config, write_generation_config, write_tokenizer
from loadmaster.export.weights import readable_by_all, shards
from loadmaster.files import publish_folder, read_json, sha256_json, write_json
from loadmaster.models.load import DTYPES
from loadmaster.models.resolve import base_revision
from loadmaster.preflight.plan import Plan

SCRATCH = ".work.partial"


def export_all(
    job: Job, plan: Plan, run_dir: Path, base_folder: Path, prepared: PreparedData, tokenizer: Any,
    echo: Callable[[str], None],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Write and verify run_dir/export/<format>/ for every format of the job; see `loadmaster.export.export_all`."""
    export = Export(job, plan, run_dir, base_folder, prepared, tokenizer, echo)
    done = {name: figures for name in job.export.formats if (figures := export.published(name)) is not None}
    for name in done:
        echo(f"  {name}: unchanged, skipped")
    todo = [name for name in dict.fromkeys(job.export.formats) if name not in done]
    if todo:
        _free_device_memory()
        try:
            done |= export.make(todo)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise ExportRejected(
                f"the disk of {run_dir} is full ({error}); nothing was published. "
                "Free some space, or set run_dir to a larger disk."
            ) from None
    return {name: done[name] for name in dict.fromkeys(job.export.formats)}


class Export:
    """One call of the stage: what the formats share."""

    def __init__(
        self, job: Job, plan: Plan, run_dir: Path, base_folder: Path, prepared: PreparedData, tokenizer: Any,
        echo: Callable[[str], None],
    ):  # fmt: skip
        self.job, self.plan, self.base, self.prepared = job, plan, base_folder, prepared
        self.tokenizer, self.echo = tokenizer, echo
        self.folder = run_dir / "export"
        self.trained = run_dir / ("model" if plan.method == "full" else "adapter")
        if not self.trained.is_dir():
            raise ExportRejected(f"{self.trained} is not there: train first (stop_after=train or later).")
        self.trained_evaluation = run_dir / "eval.json"

    # ------------------------------------------------------------- what is there already

    def inputs_hash(self, name: str) -> str:
        """Hash of everything that decides this format's files and figures."""
        validation = self.prepared.validation
        return sha256_json(
            {
                "format": name,
                "base": _fingerprint(self.base),
                "trained": _fingerprint(self.trained),
                "method": [self.plan.method, self.plan.precision],
                "data": [self.prepared.train.fingerprint, validation.fingerprint if validation is not None else None],
                "export": [self.job.export.calibration_rows, self.job.export.verification_rows],
                "limits": asdict(thresholds.limits(self.job.export, name)),
                "task": [self.job.evaluation.task, self.job.evaluation.max_rows, self.job.evaluation.max_new_tokens],
                "versions": versions(),
            }
        )

    def published(self, name: str) -> dict[str, Any] | None:
        """Figures of a format that is published, whole, and made from these same inputs."""
        try:
            manifest = read_manifest(self.folder / name)
        except ExportRejected:
            return None
        if manifest.get("inputs_hash") != self.inputs_hash(name) or verify_manifest(self.folder / name):
            return None
        return {**manifest["verification"], "bytes": manifest["bytes"]}

    # ------------------------------------------------------------- making them

    def make(self, formats: list[str]) -> dict[str, dict[str, Any]]:
        """Write, verify and publish `formats`; raises ExportRejected, publishing none, when one of them fails."""
        with ExitStack() as publishing:
            scratch = publishing.enter_context(_scratch(self.folder / SCRATCH))
            folders = {name: publishing.enter_context(publish_folder(self.folder / name)) for name in formats}
            facts, candidates = self._write(folders, scratch)
            results = self._verify(candidates, scratch)
            for name, figures in results.items():
                folder = folders[name]
                if "candidate" in figures and Path(chosen := candidates[name][figures["candidate"]]) != folder:
                    shutil.copytree(chosen, folder, dirs_exist_ok=True, copy_function=shutil.move)
                figures["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                self.echo("  " + table.line(name, figures))
            self._refuse_failures(results)
            for name, folder in folders.items():
                self._finish(name, folder, facts.get(name, {}), facts["merge"], results[name])
        return results

    def _write(
        self, folders: dict[str, Path], scratch: Path
    ) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Path]]]:
        """Fill the folders, or candidates for them in scratch; returns facts and candidate folders by format."""
        candidates: dict[str, dict[str, Path]] = {}
        facts: dict[str, dict[str, Any]] = {"merge": {}}
        if "adapter" in folders:
            facts["adapter"] = {"rank": self._write_adapter(folders["adapter"])}
            candidates["adapter"] = {"adapter": folders["adapter"]}
        if set(folders) - {"adapter"}:
            merged = folders.get("bf16") or scratch / "bf16"
            merged.mkdir(exist_ok=True)
            self.echo("  merging" if self.plan.method != "full" else "  copying the trained model")
            facts["merge"] = asdict(self._write_merged(merged))
            if "bf16" in folders:
                candidates["bf16"] = {"bf16": merged}
            quantized = {name: quantize.CANDIDATES[name] for name in folders if name in quantize.CANDIDATES}
            if quantized:
                facts |= self._quantize(quantized, merged, scratch)
                candidates |= {name: {each: scratch / each for each in found} for name, found in quantized.items()}
        return facts, candidates

    def _write_adapter(self, target: Path) -> int:
        """Copy the adapter; returns its largest rank, which a server has to be started with."""
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (self.trained / name).is_file():
                raise ExportRejected(
                    f"{self.trained} has no {name}: export.formats=[adapter] needs method=lora or qlora."
                )
            shutil.copyfile(self.trained / name, target / name)
        config = read_json(target / "adapter_config.json")
        # peft puts in the path on the machine that trained.
        config["base_model_name_or_path"] = self.job.model.name
        write_json(target / "adapter_config.json", config)
        write_tokenizer(self.tokenizer, target)
        return max([config["r"], *(config.get("rank_pattern") or {}).values()])

    def _write_merged(self, target: Path) -> MergeReport:
        full = self.plan.method == "full"
        source = self.trained if full else self.base
        adapter = None if full else read_adapter(self.trained)
        seen_as = nf4_round_trip(DTYPES[self.plan.precision]) if self.plan.method == "qlora" else None
        report = merge(source, target, adapter, torch.bfloat16, seen_as)
        write_config(source, target, report.tied_embeddings)
        write_tokenizer(self.tokenizer, target)
        write_generation_config(self.base, target, self.tokenizer, stop_token_ids(self.tokenizer))
        return report

    def _quantize(self, quantized: dict[str, tuple[str, ...]], merged: Path, scratch: Path) -> dict[str, Any]:
        targets = {each: str(scratch / each) for found in quantized.values() for each in found}
        calibration = []
        if "int4" in quantized:
            calibration = quantize.calibration_tokens(
                self.prepared.train_conversations, self.tokenizer, self.job.export.calibration_rows,
                self.job.sequence_length,
            )  # fmt: skip
        spec = {"model": str(merged), "targets": targets, "calibration": calibration}
        made = run_step("loadmaster.export.quantize", spec, scratch, timeout_s(_weight_bytes(merged)), self._echo_step)
        for folder in targets.values():
            for path in merged.iterdir():
                if path.suffix != ".safetensors" and path.name not in ("config.json", "model.safetensors.index.json"):
                    shutil.copyfile(path, Path(folder) / path.name)
        return {name: {each: made[each] for each in found} for name, found in quantized.items()}

    def _verify(self, candidates: dict[str, dict[str, Path]], scratch: Path) -> dict[str, dict[str, Any]]:
        validation = self.prepared.validation
        rows = verify.held_out_rows(
            self.prepared.train if validation is None else validation, self.job.export.verification_rows,
            self.plan.model.vocabulary_size,
        )  # fmt: skip
        spec = verify.spec(
            base=self.base, trained=self.trained, precision=self.plan.precision, nf4=self.plan.method == "qlora",
            device="cpu" if self.plan.hardware.gpu == "cpu" else "cuda", rows=rows,
            conversations=self.prepared.validation_conversations, evaluation=self.job.evaluation,
            trained_task=self._trained_task(),
            formats={
                name: [verify.Candidate(each, str(folder), name == "adapter") for each, folder in found.items()]
                for name, found in candidates.items()
            },
        )  # fmt: skip
        weight_bytes = _weight_bytes(self.base) * (1 + sum(map(len, candidates.values())))
        results = run_step("loadmaster.export.verify", spec, scratch, timeout_s(weight_bytes), self._echo_step)
        for name, figures in results.items():
            limit = thresholds.limits(self.job.export, name)
            figures["failures"] = [figures["error"]] if "error" in figures else thresholds.failures(figures, limit)
            figures["passed"] = not figures["failures"]
            figures["limits"] = asdict(limit)
            figures["scored_on"] = "held-out rows" if validation is not None else "training rows (nothing is held out)"
        return results

    def _trained_task(self) -> dict[str, Any] | None:
        """The trained model's task figures, where the evaluate stage has measured them."""
        if not self.trained_evaluation.is_file():
            return None
        task = read_json(self.trained_evaluation).get("after", {}).get("task")
        return {key: value for key, value in task.items() if key != "samples"} if task else None

    def _refuse_failures(self, results: dict[str, dict[str, Any]]) -> None:
        failed = {name: figures["failures"] for name, figures in results.items() if not figures["passed"]}
        if not failed:
            return
        reasons = "\n".join(f"  {name}: {reason}" for name, reasons in failed.items() for reason in reasons)
        advice = "Leave the format out of export.formats, or, if you accept the loss, set export.thresholds."
        if self.plan.method == "qlora" and list(failed) == ["adapter"]:
            advice = (
                "The adapter was trained over 4-bit weights; over the 16-bit base that a server loads it is another "
                "model. export.formats=[bf16] merges it into the weights that it was trained over."
            )
        raise ExportRejected(f"not what was trained, so nothing was published:\n{reasons}\n{advice}")

    def _finish(
        self, name: str, folder: Path, made: dict[str, Any], merged: dict[str, Any], figures: dict[str, Any]
    ) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                readable_by_all(path)
        stop_ids = read_json(folder / "generation_config.json")["eos_token_id"] if name != "adapter" else None
        write_manifest(
            folder,
            {
                "format": name,
                "base_model": {"name": self.job.model.name, "revision": base_revision(self.job.model, self.base)},
                "recipe": self.job.recipe,
                "job_hash": job_hash(self.job),
                "inputs_hash": self.inputs_hash(name),
                "plan": self.plan.to_dict(),
                "chat_template_sha256": template_hash(self.tokenizer) if self.tokenizer.chat_template else None,
                "stop_token_ids": stop_ids or stop_token_ids(self.tokenizer),
                **({"adapter": made} if name == "adapter" else {"merge": merged, "quantization": made}),
                "verification": {key: value for key, value in figures.items() if key != "bytes"},
            },
        )

    def _echo_step(self, text: str) -> None:
        self.echo(f"  {text}")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; what a killed run left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(folder: Path) -> list[Any]:
    """What tells one model folder from another without reading all of its weights: names, sizes, times of change."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _weight_bytes(folder: Path) -> int:
    return sum(shard.stat().st_size for shard in shards(folder))


def _free_device_memory() -> None:
    """Give cached memory back to the device: the steps run in processes of their own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
