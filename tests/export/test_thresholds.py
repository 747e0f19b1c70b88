from __future__ import annotations

import pytest

from loadmaster.config.schema import ExportConfig, ThresholdsConfig
from loadmaster.export.thresholds import DEFAULTS, failures, limits

LIMIT = ThresholdsConfig(max_perplexity_ratio=1.1, max_mean_kl=0.1, min_top1_agreement=0.9, min_task_retention=0.8)
GOOD = {"perplexity_ratio": 1.1, "mean_kl": 0.1, "top1_agreement": 0.9, "task_retention": 0.8}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, []),
        ({"task_retention": None}, []),
        ({"perplexity_ratio": 1.11}, ["perplexity_ratio"]),
        ({"mean_kl": 0.11}, ["mean_kl"]),
        ({"top1_agreement": 0.89}, ["top1_agreement"]),
        ({"task_retention": 0.79}, ["task_retention"]),
        ({"mean_kl": float("nan")}, ["mean_kl"]),
        ({"perplexity_ratio": float("inf"), "top1_agreement": 0.0}, ["perplexity_ratio", "top1_agreement"]),
    ],
)
def test_every_figure_beyond_its_limit_is_named(change, failing):
    found = failures({**GOOD, **change}, LIMIT)
    assert [sentence.split()[0] for sentence in found] == failing


def test_the_users_limits_replace_the_shipped_ones_of_their_format_only():
    export = ExportConfig(thresholds={"int4": LIMIT})
    assert limits(export, "int4") == LIMIT
    assert limits(export, "fp8") == DEFAULTS["fp8"]
    assert limits(ExportConfig(), "adapter") == DEFAULTS["adapter"]


# (perplexity ratio, mean KL, top-1 agreement) on SmolLM2-135M with a ticket adapter, 2026-11-24: docs/export.md.
BROKEN = {
    "adapter not applied": (5.4465, 1.68414, 0.6849),
    "adapter's scale doubled": (1.0869, 0.09042, 0.9744),
    "adapter's scale halved": (1.0718, 0.06483, 0.9621),
    "adapter's scale as rsLoRA": (15.1015, 2.70053, 0.5780),
}


@pytest.mark.parametrize("name", BROKEN)
def test_exports_broken_on_purpose_do_not_pass_as_bf16(name):
    ratio, kl, agreement = BROKEN[name]
    assert failures({"perplexity_ratio": ratio, "mean_kl": kl, "top1_agreement": agreement}, DEFAULTS["bf16"])
