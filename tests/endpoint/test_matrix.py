"""The decision matrix of the field: its figures are those of the plan, and docs/serving.md has them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.endpoint.matrix import BEGIN, CLAIMS, END, PAGE, matrix, planned, verdict

VERDICTS = {
    "RTX 4090 for 8B in 16 bits": ("true: 4.6 requests", 38_000),
    "RTX 4090 for 13B in INT4": ("true: 2.1 requests", 16_900),
    "L40S for 70B in INT4": ("true for short requests", 4_500),
    "the same with an FP8 cache": ("true: 1.1 requests", 9_100),
    "2x A100 80 GB for 70B in 16 bits": ("true: 1.7 requests", 13_800),
    "H100 80 GB for 70B in FP8": ("false", 1_800),
    "the same at 0.92 of the card": ("true for short requests", 7_000),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.said)
def test_each_claim_has_the_number_that_decides_it(claim) -> None:
    said, tokens = VERDICTS[claim.said]
    plan = planned(claim)
    assert plan.cache_tokens == pytest.approx(tokens, rel=0.02)
    assert verdict(plan).replace("*", "").startswith(said)


def test_a_verdict_turns_where_a_request_fits() -> None:
    plan = planned(CLAIMS[0])
    for tokens, said in ((8192, "**true**: 1.0"), (8191, "**true for short"), (2047, "**false**")):
        assert verdict(replace(plan, cache_tokens=tokens)).startswith(said)


def test_the_page_has_the_matrix_of_today() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0].strip() == matrix(), "python -m loadmaster.endpoint.matrix"
    for said in ("| no | ADA_24 |", "| yes | ADA_48_PRO | L40, RTX 6000 Ada Generation |"):
        assert said in matrix()
