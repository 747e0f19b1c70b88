"""Frozen nf4 and fp8 bases that several processes share: read, quantized, sharded, trained and saved as by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.test_parity import STEPS, TOLERANCE, case, metrics, model, weights  # noqa: F401  (a fixture)
from tests.training.worlds import spawn

FP8 = {"precision": "fp8", "steps": STEPS}
ONE = [case("qlora", "qlora", "none"), case("fp8", "lora", "none", **FP8)]
TWO = [
    case("qlora-fsdp-2", "qlora", "fsdp", 2, checkpointing="full"),
    case("qlora-fsdp-2-whole", "qlora", "fsdp", 2, reshard_after_forward=False),
    case("qlora-ddp-2", "qlora", "ddp", 2),
    case("fp8-fsdp-2", "lora", "fsdp", 2, **FP8),
    case("qlora-zero2-2", "qlora", "zero2", 2),
    case("qlora-zero3-2", "qlora", "zero3", 2, checkpointing="full"),
    case("qlora-zero3-2-all", "qlora", "zero3", 2, offload="all"),
    case("fp8-zero3-2", "lora", "zero3", 2, **FP8),
]
FOUR = [case("qlora-fsdp-4", "qlora", "fsdp", 4), case("fp8-fsdp-4", "lora", "fsdp", 4, checkpointing="full", **FP8)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("frozen")
    for size, cases in ((1, ONE), (2, TWO), (4, FOUR)):
        placed = [{**each, "model": str(model / "even"), "out": str(folder / each["name"])} for each in cases]
        spawn(folder, f"world-{size}", placed, size)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [each["name"] for each in TWO + FOUR])
def test_losses_and_adapters_over_a_shared_frozen_base_are_those_of_one_process(runs, name):
    """fp8 computes in bf16, where the order of a sum shows; nf4 here in fp32."""
    tolerance = TOLERANCE if name.startswith("qlora") else 1e-2
    alone, spread = (metrics(runs / each) for each in (name.split("-")[0], name))
    assert len(spread) == STEPS and spread[-1]["loss"] < spread[0]["loss"]
    for one, many in zip(alone, spread, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=tolerance), one["step"]
    wanted, got = weights(runs / name.split("-")[0]), weights(runs / name)
    assert wanted.keys() == got.keys() and len(wanted) == 2 * 7 * 3
    if name.startswith("qlora"):
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)
