"""The recipes with a frozen fp8 base, every stage of them, scaled down to a tiny model on the CPU.

The plan is the one made for an H100, which has the fp8 units that the recipe asks for; only the device that it then
runs on is the CPU. There the weights are held in fp8 all the same, and multiplied in bf16.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loadmaster import pipeline
from loadmaster.config.compose import compose
from loadmaster.models.frozen import FrozenFP8Linear
from loadmaster.models.load import load_base, load_trained
from loadmaster.preflight.plan import HardwareSummary, Plan

RECIPES = [("fp8_8b", 1), ("fp8_70b", 2), ("fp8_405b", 2)]
"""With the processes that train and evaluate each; more than one share the base by FSDP2."""
SCALED_DOWN = [
    "hardware=h100_80gb_x1", "sequence_length=64", "max_steps=3", "batch.global_size=4", "data=tickets",
    "data.max_rows=24", "evaluation.max_rows=2", "evaluation.max_new_tokens=4", "tracker=none", "export=bf16",
    "compile=false",
    "export.thresholds={bf16: {min_task_retention: 0, max_perplexity_ratio: 1.1, max_mean_kl: 0.1, "
    "min_top1_agreement: 0.8}}",
]


def go(tiny: Path, folder: Path, monkeypatch, processes: int, *overrides: str) -> tuple[int, str]:
    made = pipeline.make_plan

    def for_an_h100_run_on_the_cpu(*arguments, **more) -> Plan:
        plan = made(*arguments, **more)
        assert plan.fits and plan.hardware.gpu == "h100_80gb"
        return replace(plan, hardware=HardwareSummary("cpu", processes, 1, 8.0, 8.0))

    here = replace(pipeline.detect_local(), count=processes)
    monkeypatch.setattr(pipeline, "make_plan", for_an_h100_run_on_the_cpu)
    monkeypatch.setattr(pipeline, "detect_local", lambda: here)
    console = Console(file=io.StringIO(), width=120)
    shared = [f"hardware.count={processes}", "sharding=fsdp"] if processes > 1 else []
    composed = compose([f"model.path={tiny}", f"run_dir={folder}", *SCALED_DOWN, *shared, *overrides])
    return pipeline.run(composed, console), console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("recipe, processes", RECIPES)
def test_every_stage_of_an_fp8_recipe_runs_and_the_merge_is_over_the_base_that_was_trained_over(
    recipe, processes, few_words, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    code, output = go(few_words, run, monkeypatch, processes, f"recipe={recipe}")
    assert code == 0, output
    plan, result = Plan.read(run / "plan.json"), json.loads((run / "result.json").read_text())
    assert (plan.method, plan.precision, plan.world_size) == ("lora", "fp8", processes)
    assert plan.sharding == ("fsdp" if processes > 1 else "none")
    assert result["steps"] == 3 and result["exports"]["bf16"]["passed"]
    assert (run / "bundle" / "manifest.json").is_file()

    trained = load_trained(few_words, run / "adapter", torch.bfloat16, "cpu", "fp8")
    layers = {name: layer for name, layer in trained.named_modules() if isinstance(layer, FrozenFP8Linear)}
    assert len(layers) == 14
    merged = load_base(run / "export" / "bf16", torch.bfloat16, "cpu").state_dict()
    for name, layer in layers.items():
        adapter = trained.get_submodule(name.removesuffix(".base_layer"))
        update = adapter.lora_B["default"].weight.float() @ adapter.lora_A["default"].weight.float()
        expected = layer.dequantized(torch.float32) + adapter.scaling["default"] * update
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert torch.equal(merged[f"{plain}.weight"], expected.to(torch.bfloat16)), plain
