"""The catalogue is whole: every machine's GPU is known and priced, every price is dated and has a source."""

from __future__ import annotations

import datetime

import pytest

from loadmaster import catalog


@pytest.mark.parametrize("name", catalog.gpus())
def test_gpu_facts_are_complete_and_dense(name: str) -> None:
    facts = catalog.gpus()[name]
    assert facts["tflops"]["bf16"] > facts["tflops"]["fp32"] > 0
    assert 0 < facts["memory_gib"] < 200
    assert facts["link"] in ("nvlink", "pcie")
    assert ("fp8" in facts["tflops"]) == (facts["compute_capability"] >= 8.9)
    if "fp8" in facts["tflops"]:
        assert facts["tflops"]["fp8"] == pytest.approx(2 * facts["tflops"]["bf16"], rel=0.02)


def test_every_machine_has_a_known_and_priced_gpu() -> None:
    for machine in catalog.machines():
        assert machine["gpu"] in catalog.gpus()
        assert machine["gpu"] in catalog.prices()["gpus"]
        assert machine["host_memory_gib_per_gpu"] > 0


def test_every_price_has_a_date_and_that_date_a_source() -> None:
    for price in catalog.prices()["gpus"].values():
        assert isinstance(price["date"], datetime.date)
        assert price["date"] in catalog.prices()["sources"]


def test_a_shape_is_found_by_every_name_it_has() -> None:
    shapes = catalog.shapes()
    assert len({entry["_parameters"] for entry in shapes.values()}) >= 35
    assert shapes["meta-llama/llama-3.1-8b-instruct"]["_parameters"] == 8_030_261_248
