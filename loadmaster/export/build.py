"""Write every folder that may be published: the adapter, the merged model, and what is quantized from it.

What streams (FP8, INT4 by rounding) is made in the same pass over the base that merges, so a run that exports nothing
else writes no 16-bit model. Calibration and GGUF need the merged model whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loadmaster.config.schema import Job
from loadmaster.data import PreparedData
from loadmaster.data.render import stop_token_ids
from loadmaster.errors import ExportRejected
from loadmaster.export import candidates, quantize
from loadmaster.export.adapter import read_adapter
from loadmaster.export.gguf import refuse_unwritable
from loadmaster.export.linear import QuantizeLinears, linear_weights, quantization_config
from loadmaster.export.merge import MergeReport, merge, round_trip
from loadmaster.export.process import run_step, timeout_s
from loadmaster.export.servers import Server, aimed_at, for_server, model_config
from loadmaster.export.sidecars import write_config, write_generation_config, write_tokenizer
from loadmaster.export.stream import Change, Unchanged, rewrite
from loadmaster.export.weights import tensor_files, weight_bytes
from loadmaster.files import read_json, write_json
from loadmaster.models.adapters import linear_names
from loadmaster.models.frozen import frozen_form
from loadmaster.models.language_model import for_whole, multimodal_of
from loadmaster.models.load import DTYPES
from loadmaster.models.shards import empty_model
from loadmaster.preflight.config_json import base_name
from loadmaster.preflight.exports import WITHOUT_AWQ
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.tensor_parallel import NVFP4_GROUP

Score = Callable[[dict[str, Path]], dict[str, Any]]
"""Scores merges of the model, name -> folder, against the live adapter: figures of the best, {"error": why} if none."""


@dataclass
class Written:
    """What lies in the folders."""

    candidates: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Format -> candidate -> the folder that would be published for it."""
    read_from: dict[str, Path] = field(default_factory=dict)
    """Candidate -> the folder that is scored in its place, its weights read back from a file that is no safetensors."""
    made: dict[str, Any] = field(default_factory=dict)
    """Candidate -> scheme, calibration, seconds."""
    merge: dict[str, Any] = field(default_factory=dict)
    adapter_rank: int | None = None


def streamed(formats: Sequence[str], source: Path, server: Server) -> dict[str, QuantizeLinears]:
    """How each candidate of `formats` is written whose weights stream through.

    source: the model to export, or its base, which tells as much. Raises ExportRejected where a format cannot hold it,
    or the server does not know the format.
    """
    config = read_json(source / "config.json")
    if "gguf" in formats:
        refuse_unwritable(source, config)
    if formats != ["adapter"]:
        model_config(config, server)
    if "int4_awq" in formats and config.get("model_type") in WITHOUT_AWQ:
        raise ExportRejected(
            f"int4_awq: llm-compressor does not know what AWQ may scale in {config['model_type']}. "
            "Take export.formats=[int4_gptq] instead."
        )
    wanted = candidates.needed(formats)
    linear = linear_weights(source) if {*wanted} & {*candidates.STREAMED, *candidates.CALIBRATED} else {}
    odd = [inputs for _, inputs in linear.values() if inputs % NVFP4_GROUP]
    if "nvfp4" in wanted and odd:
        raise ExportRejected(
            f"nvfp4 needs inputs in multiples of {NVFP4_GROUP}; a layer has {odd[0]}. "
            "Take export.formats=[fp8] instead."
        )
    found = candidates.streamed(wanted, linear)
    for config in [quantization_config(each.quantizer) for each in found.values()]:
        for_server(config, server)
    if "nvfp4" in wanted:
        for_server(NVFP4, server)
    return found


def refuse_renamed(base: Path, whole: bool) -> None:
    """Raises ExportRejected for a model whose layers have other names as transformers builds it than in its files.

    whole: it is trained whole, and may lie in its files without its head (layers. for model.layers.).
    """
    model, there = empty_model(base, torch.bfloat16), tensor_files(base)
    without_head = {f"{model.base_model_prefix}.{name}" for name in there}
    renamed = [name for name in linear_names(model) if f"{name}.weight" not in there]
    headless = all(f"{name}.weight" in without_head for name in renamed)
    if not renamed or (whole and headless):
        return
    kind = read_json(base / "config.json").get("model_type", "this model")
    remedy = (
        "It was saved without its head: save it once with one, by AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(ANOTHER), and train that."
        if headless
        else "Multimodal models are so; take one of the family that is text only, or export.formats=[adapter], "
        "whose adapters its language model alone gets."
    )
    raise ExportRejected(
        f"the files of {kind} have other names for its layers than transformers, which trains it ({len(renamed)} "
        f"layers, as {renamed[-1]}): what was trained cannot be put in their place. {remedy}"
    )


NVFP4 = {"format": "nvfp4-pack-quantized", "config_groups": {"": {"weights": {"scale_dtype": "torch.float8_e4m3fn"}}}}
"""What of llm-compressor's config for nvfp4 a server has to know."""


@dataclass
class Builder:
    """One call of the stage: what the formats share, and how their files are made."""

    job: Job
    plan: Plan
    run_dir: Path
    base: Path
    prepared: PreparedData
    tokenizer: Any
    echo: Callable[[str], None]

    def __post_init__(self) -> None:
        self.trained = self.run_dir / self.plan.trained
        if not self.trained.is_dir():
            raise ExportRejected(f"{self.trained} is not there: train first (stop_after=train or later).")
        self.server = aimed_at(self.job.endpoint.server)

    @property
    def source(self) -> Path:
        """Where the config and, without an adapter, the weights come from."""
        return self.trained if self.plan.method == "full" else self.base

    def build(self, folders: Mapping[str, Path], scratch: Path, score: Score) -> Written:
        """Every candidate of every format; those of bf16 and the adapter in `folders` where nothing is to choose."""
        quantizers = streamed(list(folders), self.source, self.server)
        written = Written()
        if "adapter" in folders:
            written.adapter_rank = self._write_adapter(folders["adapter"])
            written.candidates["adapter"] = {"adapter": folders["adapter"]}
        formats = [name for name in folders if name != "adapter"]
        if not formats:
            return written
        wanted = candidates.needed(formats)
        outputs: dict[Path, Change] = {_made(scratch / name): quantizer for name, quantizer in quantizers.items()}
        whole = [name for name in wanted if name not in quantizers and name != "bf16"]
        if self.plan.method == "qlora":
            merged, report = self._nearer_merge(formats, scratch, score, written)
            if outputs:
                rewrite(merged, Unchanged(), outputs)
        else:
            merged = folders["bf16"] if "bf16" in folders else _made(scratch / "bf16") if whole else None
            report = self._merge(merged, None, outputs)
            written.merge = asdict(report)
            if "bf16" in folders:
                written.candidates["bf16"] = {"bf16": merged}
        for name, quantizer in quantizers.items():
            config = for_server(quantization_config(quantizer.quantizer), self.server)
            self._write_beside(scratch / name, report.tied_embeddings, config)
            written.made[name] = quantizer.facts()
        if whole:
            self._build_whole(whole, merged, report.tied_embeddings, scratch, written)
        for name in set(formats) - {"bf16"}:
            written.candidates[name] = {each: scratch / each for each in candidates.CANDIDATES[name]}
        return written

    def _write_adapter(self, target: Path) -> int:
        """Copy the adapter; returns its largest rank, which a server has to be started with."""
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (self.trained / name).is_file():
                raise ExportRejected(
                    f"{self.trained} has no {name}: export.formats=[adapter] needs method=lora or qlora."
                )
            shutil.copyfile(self.trained / name, target / name)
        if multimodal_of(self.base) is not None:  # whose own names it goes onto the published base by
            for_whole(self.trained, target)
        config = read_json(target / "adapter_config.json")
        # peft puts in the path on the machine that trained.
        config["base_model_name_or_path"] = base_name(self.job.model)
        write_json(target / "adapter_config.json", config)
        write_tokenizer(self.tokenizer, target, self.server)
        return max([config["r"], *(config.get("rank_pattern") or {}).values()])

    def _merge(
        self, target: Path | None, which: str | None = None, outputs: Mapping[Path, Change] | None = None
    ) -> MergeReport:
        """The trained weights in bf16. which: of the two merges of a QLoRA adapter."""
        full = self.plan.method == "full"
        self.echo("  copying the trained model" if full else f"  merging {which}" if which else "  merging")
        adapter = None if full else read_adapter(self.trained)
        as_stored = full or which == candidates.STORED_BASE
        form = frozen_form(self.plan.method, self.plan.precision)
        seen_as = None if as_stored else round_trip(form, DTYPES[self.plan.precision])
        report = merge(self.source, target, adapter, torch.bfloat16, seen_as, outputs)
        if target is not None:
            self._write_beside(target, report.tied_embeddings)
        return report

    def _nearer_merge(
        self, formats: list[str], scratch: Path, score: Score, written: Written
    ) -> tuple[Path, MergeReport]:
        """Both merges of a QLoRA adapter; (folder of the one nearer to the live adapter, its report)."""
        folders = {name: _made(scratch / f"merged-{index}") for index, name in enumerate(candidates.MERGES)}
        reports = {name: self._merge(folder, name) for name, folder in folders.items()}
        report = reports[candidates.AS_TRAINED]
        written.merge = asdict(report)
        if formats == ["bf16"]:  # its verification scores both, and nothing is made from them
            written.candidates["bf16"] = dict(folders)
            return folders[candidates.AS_TRAINED], report
        scores = score(folders)
        if "error" in scores:
            raise ExportRejected(f"the merged model cannot be scored, so nothing was published:\n  {scores['error']}")
        taken = scores["candidate"]
        written.merge |= {"taken": taken, "candidates": scores["candidates"]}
        self.echo(f"  {candidates.said_of_merges(taken, scores['candidates'])}")
        if "bf16" in formats:
            written.candidates["bf16"] = {taken: folders[taken]}
        elif scores["failures"]:  # else the verification of bf16 says it, and stops
            self.echo("  " + candidates.NEITHER_IS_CLOSE)
            for reason in scores["failures"]:
                self.echo(f"    {reason}")
        return folders[taken], report

    def _write_beside(self, folder: Path, tied_embeddings: bool, quantization: dict[str, Any] | None = None) -> None:
        """Everything that lies beside the weights."""
        write_config(self.source, folder, tied_embeddings, self.server, quantization)
        write_tokenizer(self.tokenizer, folder, self.server)
        write_generation_config(self.base, folder, self.tokenizer, stop_token_ids(self.tokenizer))

    def _build_whole(
        self, names: list[str], merged: Path, tied_embeddings: bool, scratch: Path, written: Written
    ) -> None:
        """What is made from the merged model in a process of its own: calibration, layer by layer, and GGUF."""
        calibration = []
        if any(name in candidates.CALIBRATED for name in names):
            calibration = quantize.calibration_tokens(
                self.prepared.train_conversations, self.tokenizer, self.job.export.calibration_rows,
                self.job.sequence_length,
            )
        spec = {
            "model": str(merged), "targets": {name: str(_made(scratch / name)) for name in names},
            "calibration": calibration,
            "gguf": {
                "name": self.job.recipe, "kind": self.job.export.gguf_type,
                "stop_token_ids": stop_token_ids(self.tokenizer), "read_back": str(scratch / "gguf-read"),
            },
        }
        limit_s = timeout_s(len(names) * weight_bytes(merged))
        made = run_step("loadmaster.export.quantize", spec, scratch, limit_s, lambda text: self.echo(f"  {text}"))
        for name in names:
            written.made[name] = made[name]
            folder = scratch / name
            if name == "gguf":
                written.read_from[name] = folder = Path(made[name].pop("read_from"))
                write_generation_config(self.base, scratch / name, self.tokenizer, stop_token_ids(self.tokenizer))
            config = read_json(folder / "config.json").get("quantization_config")
            self._write_beside(folder, tied_embeddings, config and for_server(config, self.server))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
