"""Modules trained whole beside an adapter, spread over processes: read, sharded, trained and saved as by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.training.test_parity import TOLERANCE, case, metrics, model, weights  # noqa: F401  (a fixture)
from tests.training.worlds import spawn

STEPS = 10  # with an evaluation, and a checkpoint before
TIED = {"modules_to_save": ["embed_tokens", "norm"], "steps": STEPS, "evaluated": True}
UNTIED = {**TIED, "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"], "model": "odd"}
DORA = {"dora": True, "steps": STEPS, "evaluated": True}
ONE = [
    case("tied", "lora", "none", **TIED),
    case("dora", "lora", "none", **DORA),
    case("untied", "qlora", "none", **UNTIED),
]
TWO = [
    case("tied-fsdp", "lora", "fsdp", 2, checkpointing="full", **TIED),
    case("untied-fsdp-whole", "qlora", "fsdp", 2, reshard_after_forward=False, **UNTIED),
    case("untied-zero2", "qlora", "zero2", 2, **UNTIED),
    case("tied-zero3", "lora", "zero3", 2, **TIED),
    case("dora-ddp", "lora", "ddp", 2, checkpointing="full", **DORA),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("saved")
    for size, cases in ((1, ONE), (2, TWO)):
        placed = [{**each, "model": str(model / each["model"]), "out": str(folder / each["name"])} for each in cases]
        spawn(folder, f"world-{size}", placed, size)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [each["name"] for each in TWO])
def test_losses_and_saved_modules_are_those_of_one_process(runs, name):
    alone, spread = (metrics(runs / each) for each in (name.split("-")[0], name))
    assert len(spread) == STEPS and spread[-1]["loss"] < spread[0]["loss"]
    for one, many in zip(alone, spread, strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & set(one):
            assert many[key] == pytest.approx(one[key], rel=TOLERANCE), (key, one["step"])
    wanted, got = weights(runs / name.split("-")[0]), weights(runs / name)
    assert wanted.keys() == got.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
    alone, spread = (json.loads((runs / each / "outcome.json").read_text()) for each in (name.split("-")[0], name))
    assert alone["evaluated"] == pytest.approx(alone["eval_loss"], rel=TOLERANCE)
    assert spread["evaluated"] == pytest.approx(alone["evaluated"], rel=TOLERANCE)
