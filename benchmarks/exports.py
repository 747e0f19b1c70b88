"""Measure what tells a good export from a broken one: the figures of verification, on a run's exports and on wrecks.

    python benchmarks/exports.py RUN                        # every case, as a table
    python benchmarks/exports.py RUN --cases bf16 fp8       # some
    python benchmarks/exports.py RUN --validation FILE      # on other held-out conversations than the run's own

RUN: a finished run of `python train.py` with the formats bf16, fp8 and int4. Broken exports are made from its bf16
one, in a scratch folder; int4 and fp8 wrecks as bf16 weights that hold the values of the broken quantization. Each
case is a line of JSON on stdout as it is done; the table follows. The limits of loadmaster.export.thresholds were set
between the good and the broken (benchmarks/results/).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loadmaster.config.compose import read_job
from loadmaster.data import prepare
from loadmaster.export import live_checks, verify
from loadmaster.export.adapter import read_adapter
from loadmaster.export.tuned_weights import tuned_weights
from loadmaster.export.verify import Candidate, Verification
from loadmaster.models.frozen import frozen_form
from loadmaster.models.load import DTYPES, load_trained
from loadmaster.models.resolve import resolve_base
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.preflight.plan import Plan

Weights = dict[str, torch.Tensor]
COLUMNS = (
    "perplexity_ratio", "mean_kl", "p99_kl", "top1_agreement", "flipped_answers", "tuned_share", "task_retention",
)


class Materials:
    """The weights that wrecks are made of: the base's, the merged ones, and the adapter's updates, in float32."""

    def __init__(self, run: Path, base: Path):
        self.base = {name: each.float() for name, each in load_file(base / "model.safetensors").items()}
        self.merged = {
            name: each.float() for name, each in load_file(run / "export" / "bf16" / "model.safetensors").items()
        }
        self.adapter = read_adapter(run / "adapter")
        self.layers = sorted(self.adapter.updates)

    def scaled(self, factor: float) -> Weights:
        return {name: self.base[name] + factor * (each - self.base[name]) for name, each in self.merged.items()}

    def changed(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Weights:
        return {**self.merged, name: change(self.merged[name])}

    def quantized(self, weights: Weights, bits: int, group: int | None) -> Weights:
        return {name: _rounded(each, bits, group) if name in self.layers else each for name, each in weights.items()}


def _rounded(weight: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """Round to nearest: symmetric integers, one scale for each group of inputs (None: each row)."""
    parts = weight.reshape(weight.shape[0], -1, group or weight.shape[1])
    scale = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    return ((parts / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(weight.shape)


def _noise(weight: torch.Tensor, relative: float) -> torch.Tensor:
    return weight + relative * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


UP, KEY = "model.layers.7.mlp.up_proj.weight", "model.layers.7.self_attn.k_proj.weight"
GOOD = ("adapter", "bf16", "fp8", "int4", "int4, round to nearest, groups of 64")
CASES: dict[str, Callable[[Materials], Weights]] = {
    "int4, round to nearest, groups of 64": lambda m: m.quantized(m.merged, 4, 64),
    "adapter not applied": lambda m: m.base,
    "adapter's scale doubled": lambda m: m.scaled(2),
    "adapter's scale halved": lambda m: m.scaled(0.5),
    "adapter's scale 10% too small": lambda m: m.scaled(0.9),
    "adapter left out of one layer": lambda m: m.changed(UP, lambda w: m.base[UP]),
    "key projection of one layer zeroed": lambda m: m.changed(KEY, torch.zeros_like),
    "up projection of one layer re-initialised": lambda m: m.changed(UP, lambda w: _noise(0 * w, 1) * w.std()),
    "merged into a base that is 5% off": lambda m: {name: _noise(each, 0.05) for name, each in m.merged.items()},
    "fp8, scale of one layer doubled": lambda m: m.changed(UP, lambda w: 2 * w),
    "int4, one scale a row": lambda m: m.quantized(m.merged, 4, None),
    "int4, three bits": lambda m: m.quantized(m.merged, 3, 64),
    "int4, of the base": lambda m: m.quantized(m.base, 4, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--cases", nargs="+", choices=[*GOOD[:4], *CASES], default=[*GOOD[:4], *CASES])
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--no-answers", action="store_true", help="no flips, no task metric: much faster")
    arguments = parser.parse_args()
    job = read_job(arguments.run / "config.yaml").job
    if arguments.validation:
        job = replace(job, data=replace(job.data, validation=str(arguments.validation)))
    base = resolve_base(job.model)
    prepared = prepare(job, load_tokenizer(base))
    assert prepared.validation is not None, "the run holds nothing out"
    plan = Plan.read(arguments.run / "plan.json")
    verification = Verification(
        verify.spec(
            base=base, trained=arguments.run / "adapter", precision=plan.precision,
            frozen=frozen_form(plan.method, plan.precision), device="cpu",
            rows=verify.held_out_rows(prepared.validation, 10**6, plan.model.vocabulary_size),
            conversations=[] if arguments.no_answers else list(prepared.validation_conversations),
            evaluation=replace(job.evaluation, max_rows=None),
            formats={},
        ), {},
    )
    materials = Materials(arguments.run, base)
    live = load_trained(
        base, arguments.run / "adapter", DTYPES[plan.precision], "cpu", frozen=frozen_form(plan.method, plan.precision)
    )
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in arguments.cases:
            folder = arguments.run / "export" / case
            if case in CASES:
                folder = _wreck(materials, arguments.run / "export" / "bf16", CASES[case](materials), Path(scratch))
            elif case == "adapter" and not folder.is_dir():
                folder = _adapter_folder(arguments.run, Path(scratch))
            kind = case if case in GOOD[:4] else "bf16"
            if kind == "bf16" and not case.startswith("int4"):  # whose weights are not to be the trained ones
                verification.merged_weights = live_checks.merged_weights(live, [folder], base)
            if live_checks.keeps_matrices(kind):
                verification.tuned_weights = tuned_weights(live, [folder], base)
            found[case] = verification.of(kind, [Candidate(case, str(folder), case == "adapter")])
            found[case].pop("smoke", None)
            print(json.dumps({"case": case, "good": case in GOOD, **found[case]}), flush=True)
    print(_table(found))


def _wreck(materials: Materials, source: Path, weights: Weights, scratch: Path) -> Path:
    folder = scratch / "wreck"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    kept = {name: weights[name].to(torch.bfloat16).contiguous() for name in materials.merged}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _adapter_folder(run: Path, scratch: Path) -> Path:
    """The trained adapter with the tokenizer beside it, as the export stage writes it."""
    folder = scratch / "adapter"
    shutil.copytree(run / "adapter", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(run / "export" / "bf16" / name, folder / name)
    return folder


def _table(found: dict[str, dict[str, Any]]) -> str:
    rows = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for case, figures in found.items():
        cells = ["" if figures.get(key) is None else f"{figures[key]:.5f}" for key in COLUMNS]
        rows.append(f"| {'' if case in GOOD else '*broken:* '}{case} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
