"""The rate that optimizer.lr=auto stands for."""

from __future__ import annotations

from typing import get_type_hints

import pytest

from loadmaster.config.compose import compose
from loadmaster.config.rates import USUAL, peak_rate
from loadmaster.config.schema import Job
from loadmaster.errors import ConfigError


@pytest.mark.parametrize("method, rate", [("lora", 2e-4), ("qlora", 2e-4), ("full", 1e-5)])
def test_each_method_has_its_rate_and_what_is_written_is_kept(method: str, rate: float) -> None:
    assert peak_rate(compose(["recipe=auto"]).job, method) == rate
    assert peak_rate(compose(["recipe=auto", "optimizer.lr=3e-3"]).job, method) == 3e-3


def test_every_objective_has_a_rate_for_whatever_may_train_it() -> None:
    assert set(USUAL) == set(get_type_hints(Job)["objective"].__args__)
    for objective, rates in USUAL.items():
        data = "tickets" if objective == "sft" else "ticket_pairs"
        words = ["recipe=auto", f"data={data}", f"objective={objective}"]
        assert peak_rate(compose(words).job, "lora") == rates["adapters"]
        if "full" in rates:
            assert peak_rate(compose([*words, "method=full"]).job, "full") == rates["full"]
            continue
        with pytest.raises(ConfigError, match="method"):
            compose([*words, "method=full"])


def test_recipes_for_8b_and_13b_leave_the_rate_to_method_and_objective() -> None:
    assert peak_rate(compose(["recipe=qlora_8b", "objective=dpo", "data=ticket_pairs"]).job, "qlora") == 5e-6
