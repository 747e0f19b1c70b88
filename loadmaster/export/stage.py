"""The export stage: write every format asked for, prove each, and publish all of them or none.

run_dir/export/<format>/ appears by rename, complete and with its manifest, only after the last format has
passed; a crash, a full disk or a failed check at any moment leaves earlier exports as they were.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadmaster import collector
from loadmaster.config.jobhash import job_hash
from loadmaster.config.model_folder import broken_files
from loadmaster.config.schema import Job
from loadmaster.data import Conversation, PreparedData
from loadmaster.data.render import stop_token_ids, template_hash
from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.evaluation import batch_size
from loadmaster.export import advice, answers, candidates, table, thresholds, verify
from loadmaster.export.build import Builder, Written
from loadmaster.export.manifest import adapter_reader, read_manifest, shaped_by, verify_manifest, write_manifest
from loadmaster.export.process import answering_s, run_step, timeout_s
from loadmaster.export.room import asking, moving_s, trained_model
from loadmaster.export.servers import oldest_reader
from loadmaster.export.weights import weight_bytes
from loadmaster.files import (
    PARTIAL_SUFFIX,
    as_object,
    is_full_disk,
    model_files,
    publish_folder,
    read_json,
    sha256_file,
    sha256_json,
    write_json,
)
from loadmaster.models.resolve import base_revision
from loadmaster.models.spread import free_device_memory
from loadmaster.preflight.config_json import base_name
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.verification import OTHER_PASSES, answer_passes
from loadmaster.rundir import object_in
from loadmaster.words import counted

SCRATCH = ".work.partial"
FINGERPRINTS = ".fingerprints.json"
HUB_BLOB = re.compile("[0-9a-f]{64}")


def export_all(
    job: Job, plan: Plan, run_dir: Path, base_folder: Path, prepared: PreparedData, tokenizer: Any,
    echo: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Write run_dir/export/<format>/ for every format of the job, each verified against the model as trained.

    Formats already published from the same inputs are left alone. Call it on the main process only.
    Returns {format: figures}: perplexity_ratio, mean_kl and p99_kl (nats a token), top1_agreement, task,
    task_retention, passed, limits, bytes.
    Raises ExportRejected when a format does not reach its thresholds or cannot be made, LoadmasterError where this
    machine has no room for it; then none of them is published, and what was published before stays as it was.
    """
    collector.resume()
    export = Export(job, plan, run_dir, base_folder, prepared, tokenizer, echo)
    for left in export.folder.glob(f".*{PARTIAL_SUFFIX}"):  # by a run that was killed, of formats named no more too
        shutil.rmtree(left, ignore_errors=True)
    done = {name: figures for name in job.export.formats if (figures := export.published(name)) is not None}
    for name in done:
        echo(f"  {name}: unchanged, skipped")
    todo = [name for name in dict.fromkeys(job.export.formats) if name not in done]
    if todo:
        free_device_memory()
        try:
            done |= export.make(todo)
        except Exception as error:
            if not is_full_disk(error):
                raise
            raise LoadmasterError(
                f"the disk of {run_dir} is full ({error}); nothing was published. "
                "Free some space, or set run_dir to a larger disk."
            ) from None
    return {name: done[name] for name in dict.fromkeys(job.export.formats)}


class Export(Builder):
    """What is made is proven, and published."""

    @property
    def folder(self) -> Path:
        return self.run_dir / "export"

    def _fingerprint(self, model: Path) -> list[Any]:
        return fingerprint(model, self.run_dir / FINGERPRINTS)

    # ------------------------------------------------------------- what is there already

    def inputs_hash(self, name: str) -> str:
        """Hash of everything that decides this format's files and figures."""
        validation = self.prepared.validation
        return sha256_json(
            {
                "format": name,
                "base": self._fingerprint(self.base),
                "trained": self._fingerprint(self.trained),
                "method": [self.plan.method, self.plan.precision],
                "data": [self.prepared.train.fingerprint, validation.fingerprint if validation is not None else None],
                "export": [self.job.export.calibration_rows, self.job.export.verification_rows],
                "limits": asdict(thresholds.limits(self.job.export, name)),
                "task": [self.job.evaluation.task, self.job.evaluation.max_rows, self.job.evaluation.max_new_tokens],
                "server": [self.server.compressed_tensors, self.server.reads_transformers_5],
                "gguf": self.job.export.gguf_type if name == "gguf" else None,
                "versions": shaped_by(),
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
        for name in formats:
            for line in advice.lines(name, self.job.endpoint.gpu):
                self.echo(f"  {name}: {line}")
        self._refuse_broken_inputs()
        with ExitStack() as publishing:
            scratch = publishing.enter_context(_scratch(self.folder / SCRATCH))
            folders = {name: publishing.enter_context(publish_folder(self.folder / name)) for name in formats}
            written = self.build(folders, scratch, lambda merges: self._score_merges(merges, scratch))
            results = self._verify(written, scratch, self.prepared.validation_conversations)
            self._gather(results, folders, written)
            self._refuse_failures(results)
            for name, folder in folders.items():
                self._finish(name, folder, written, results[name])
        return results

    def _refuse_broken_inputs(self) -> None:
        """A base or a trained model that was torn after training; the plan looked at the base, but long ago."""
        found = [f"{self.base}: config.json is not there"] * (not (self.base / "config.json").is_file())
        found += [f"{folder}: {what}" for folder in (self.base, self.trained) for what in broken_files(folder)]
        if found:
            raise ExportRejected("what is to be exported is damaged, so nothing was made:\n  " + "\n  ".join(found))
        there = dict(self._fingerprint(self.trained))
        # Of each file, as training wrote it; of a run of an earlier version nothing.
        known = as_object(object_in(self.run_dir / "result.json").get("trained_sha256"))
        if changed := [name for name, digest in known.items() if there.get(name) != digest]:
            raise ExportRejected(
                f"{self.trained} is not what was trained, so nothing was made: {', '.join(changed)} changed since "
                "training wrote it (another SHA-256)\n"
                f"    fix: remove {self.trained}; the same command writes it again from the last checkpoint"
            )

    def _gather(self, results: dict[str, dict[str, Any]], folders: dict[str, Path], written: Written) -> None:
        """Put the candidate that was chosen into each format's folder."""
        for name, figures in results.items():
            folder = folders[name]
            if "candidate" in figures and (chosen := written.candidates[name][figures["candidate"]]) != folder:
                shared = sum(chosen in found.values() for found in written.candidates.values()) > 1
                copy = shutil.copyfile if shared else shutil.move
                shutil.copytree(chosen, folder, dirs_exist_ok=True, copy_function=copy)
            figures["bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            self.echo("  " + table.line(name, figures))
        counts = [figures["tokens"] for figures in results.values() if "tokens" in figures]
        tokens = min(counts, default=thresholds.FEW_TOKENS)
        if tokens < thresholds.FEW_TOKENS:
            self.echo(
                f"  these figures are of {counted(tokens, 'held-out token')}, too few to tell much: a larger "
                "data.validation, or export.verification_rows where it cuts them"
            )

    def _score_merges(self, merges: dict[str, Path], scratch: Path) -> dict[str, Any]:
        """Figures of the merge nearest to the live adapter; no answers are generated."""
        return self._verify(Written(candidates={"bf16": merges}), scratch, [])["bf16"]

    def _verify(
        self, written: Written, scratch: Path, conversations: Sequence[Conversation]
    ) -> dict[str, dict[str, Any]]:
        validation = self.prepared.validation
        rows = verify.held_out_rows(
            self.prepared.train if validation is None else validation, self.job.export.verification_rows,
            self.plan.model.vocabulary_size,
        )
        evaluation = asking(self.plan, self.job.evaluation)
        device = "cpu" if self.plan.hardware.gpu == "cpu" else "cuda"
        spec = verify.spec(
            **trained_model(self.plan, self.base, self.trained, device, scratch),
            rows=rows, conversations=conversations, evaluation=evaluation,
            formats={
                name: [
                    verify.Candidate(
                        each, str(written.read_from.get(each, folder)), name == "adapter",
                        each in candidates.BASELINES.get(name, ()),
                    )
                    for each, folder in found.items()
                ]
                for name, found in written.candidates.items()
            },
        )
        models, each = 1 + sum(map(len, written.candidates.values())), weight_bytes(self.base)
        passes = models * answer_passes(evaluation, batch_size(evaluation), len(conversations))
        passes += len(written.candidates) * OTHER_PASSES
        limit_s = timeout_s(models * each) + moving_s(self.plan) + answering_s(passes, each, device)
        results = run_step("loadmaster.export.verify", spec, scratch, limit_s, lambda text: self.echo(f"  {text}"))
        for name, figures in results.items():
            limit = thresholds.limits(self.job.export, name, figures.get("tokens"))
            figures["failures"] = thresholds.failures(figures, limit)
            figures["passed"] = not figures["failures"]
            figures["limits"] = asdict(limit)
            figures["scored_on"] = "held-out rows" if validation is not None else "training rows (nothing is held out)"
        return results

    def _refuse_failures(self, results: dict[str, dict[str, Any]]) -> None:
        failed = {name: figures["failures"] for name, figures in results.items() if not figures["passed"]}
        if not failed:
            return
        reasons = "\n".join(f"  {name}: {reason}" for name, reasons in failed.items() for reason in reasons)
        remedy = self._to_accept({name: results[name] for name in failed})
        if self.plan.method == "qlora" and list(failed) == ["adapter"]:
            remedy = (
                "The adapter was trained over 4-bit weights; over the 16-bit base that a server loads it is another "
                "model. export.formats=[bf16] merges it into the weights that it was trained over."
            )
        elif self.plan.method == "qlora" and "bf16" in failed:
            remedy = candidates.NEITHER_IS_CLOSE
        raise ExportRejected(f"not what was trained, so nothing was published:\n{reasons}\n{remedy}", results)

    def _to_accept(self, failed: dict[str, dict[str, Any]]) -> str:
        """What lets a run end well: without these formats, or with limits that they reach, where it is limits that they
        do not."""
        leave_out = f"Leave {' and '.join(failed)} out of export.formats"
        words = [
            thresholds.accepting(name, figures, thresholds.limits(self.job.export, name, figures.get("tokens")))
            for name, figures in failed.items()
        ]
        if any(each is None for each in words):
            return f"{leave_out}: no limit of export.thresholds lets this pass."
        return f"{leave_out}, or, if you accept the loss, {' '.join(word for each in words for word in each or [])}"

    def _finish(self, name: str, folder: Path, written: Written, figures: dict[str, Any]) -> None:
        if name == "adapter":
            made: dict[str, Any] = {"adapter": {"rank": written.adapter_rank}}
        else:
            of_candidates = {each: written.made[each] for each in written.candidates[name] if each in written.made}
            merge = written.merge
            if figures["candidate"] in candidates.MERGES and "taken" not in merge:  # this verification chose
                merge = {**merge, "taken": figures["candidate"], "candidates": figures["candidates"]}
            made = {"merge": merge, "quantization": of_candidates}
        oldest: dict[str, Any] = {}
        if name == "adapter":
            oldest = {"oldest_server": adapter_reader(read_json(folder / "adapter_config.json"))}
        if "==" in self.job.endpoint.server and name not in ("adapter", "gguf"):
            oldest = {"oldest_server": oldest_reader(self.server, name != "bf16")}
        smoke = figures.pop("smoke", [])  # kept beside the artifact, which may be passed on
        stop_ids = read_json(folder / "generation_config.json")["eos_token_id"] if name != "adapter" else None
        manifest = write_manifest(
            folder,
            {
                "format": name,
                "base_model": {"name": base_name(self.job.model), "revision": base_revision(self.job.model, self.base)},
                "recipe": self.job.recipe,
                "job_hash": job_hash(self.job),
                "inputs_hash": self.inputs_hash(name),
                "trained_sha256": dict(self._fingerprint(self.trained)),
                "plan": self.plan.to_dict(),
                "data": {"sha256": self.prepared.train.fingerprint.partition(":")[0], "held_out": figures["scored_on"]},
                "chat_template_sha256": template_hash(self.tokenizer) if self.tokenizer.chat_template else None,
                "stop_token_ids": stop_ids or stop_token_ids(self.tokenizer),
                "aimed_at": asdict(self.server),
                **oldest,
                **made,
                "verification": {key: value for key, value in figures.items() if key != "bytes"},
            },
        )
        answers.keep(self.run_dir, manifest, smoke)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards; what a killed run left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(folder: Path, cache: Path) -> list[Any]:
    """What tells one model folder from another: names and hashes of its files, so a copy is the same model.

    cache: file that keeps each hash with the size and time of change that it was taken at; hashing 16 GB takes a
    while, and nothing is read again on a run that changes nothing.
    """
    known = read_json(cache) if cache.is_file() else {}
    files = model_files(folder)
    found = {}
    for path in files:
        facts = path.stat()
        key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
        # The Hub's cache links to files that are named by their hash.
        named = path.resolve().name if HUB_BLOB.fullmatch(path.resolve().name) else None
        found[key] = named or known.get(key) or sha256_file(path)
    if not found.keys() <= known.keys():
        write_json(cache, {**known, **found})
    return [[path.name, digest] for path, digest in zip(files, found.values(), strict=True)]
