"""A Llama small enough to export in seconds, with the real tokenizer, an adapter on it, and a run around both."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import save_adapter, save_tiny_llama

from loadmaster.config.schema import DataConfig, EvaluationConfig, ExportConfig, Job, ModelConfig
from loadmaster.preflight.plan import HardwareSummary, MemoryGib, ModelSummary, PhasesGib, Plan

NAMES = ("Grace", "Noah", "Ava", "Liam", "Emma", "Ben", "Ivy", "Max", "Zoe", "Leo", "Mia", "Sam")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer)


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory, tiny) -> Path:
    return save_adapter(tiny, tmp_path_factory.mktemp("tiny_adapter"))


def make_plan(method: str = "lora") -> Plan:
    return Plan(
        fits=True, model=ModelSummary("tiny", 3_000_000, 10_000, 2, 64, 49152, "llama"),
        hardware=HardwareSummary("cpu", 1, 1, 8.0, 8.0), method=method, precision="fp32", sharding="none",
        offload="none", activation_checkpointing="none", optimizer="adamw", master_weights=False, micro_batch_size=1,
        gradient_accumulation_steps=1, sequence_length=128, memory_gib=MemoryGib(*[0.0] * 9),
        phases_gib=PhasesGib(*[0.0] * 5), budget_gib=8.0, host_memory_gib=1.0, disk_gib=1.0, tokens_per_second=None,
        hours=None, cost_usd=None,
    )


class Run:
    """A run directory after training, ready to be exported."""

    def __init__(self, folder: Path, base: Path, adapter: Path, tokenizer):
        rows = [
            {"messages": [
                {"role": "user", "content": f"Hello, {name} here, order {index}."},
                {"role": "assistant", "content": f'{{"customer":"{name}","order":"{index}"}}'},
            ]}
            for index, name in enumerate(NAMES)
        ]
        for name, part in (("train", rows[:8]), ("validation", rows[8:])):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        self.job = Job(
            recipe="tiny", model=ModelConfig(name="example/tiny", path=str(base)), sequence_length=128,
            data=DataConfig(path=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl")),
            evaluation=EvaluationConfig(task="exact_match", max_new_tokens=4),
            export=ExportConfig(formats=["bf16"], calibration_rows=4),
        )
        self.plan, self.base, self.tokenizer = make_plan(), base, tokenizer
        self.folder = folder / "run"
        shutil.copytree(adapter, self.folder / "adapter")
        self.cache = folder / "cache"
        self.log: list[str] = []
        self.prepare()

    def prepare(self) -> None:
        from loadmaster.data import prepare

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOADMASTER_CACHE", str(self.cache))
            self.prepared = prepare(self.job, self.tokenizer)

    def export(self, *formats: str):
        from loadmaster.export.stage import export_all

        job = replace(self.job, export=replace(self.job.export, formats=list(formats)))
        return export_all(job, self.plan, self.folder, self.base, self.prepared, self.tokenizer, self.log.append)


@pytest.fixture
def run(tmp_path, tiny, tiny_adapter, tokenizer) -> Run:
    return Run(tmp_path, tiny, tiny_adapter, tokenizer)
