"""Pinned host memory goes by powers of two: figures added up by hand, and block by block from real models."""

from __future__ import annotations

import json
from functools import partial
from math import ceil
from types import SimpleNamespace

import pytest
import torch

from loadmaster import catalog
from loadmaster.models import recompute
from loadmaster.preflight.memory import host_bytes
from loadmaster.preflight.pinned import in_pieces, pinned
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shards import whole
from loadmaster.preflight.zero import sub_group_size, sub_groups
from tests.preflight.test_memory import GIB, shape_of

MIB, PROCESS = 2**20, 3 * GIB


def setup(sharding: str, offload: str, gpus: int, **fields) -> Setup:
    known = {"method": "full", "precision": "bf16", "optimizer": "adamw", "master_weights": True}
    return Setup(**known, sharding=sharding, offload=offload, world_size=gpus, gpus_per_node=gpus, **fields)


def parameters(name: str) -> list[torch.Tensor]:
    """Of transformers' model, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((catalog.FOLDER / "shapes" / f"{name}.json").read_text())["config"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    return list(model.parameters())


def test_a_block_takes_the_next_power_of_two() -> None:
    assert [pinned(size) for size in (0, 1, 2, 3, 4, 5, 2**30, 2**30 + 1)] == [0, 1, 2, 4, 4, 8, 2**30, 2**31]


@pytest.mark.parametrize("tokens", [1, 2048, 78_475, 2**18])
def test_an_input_takes_what_its_pieces_take(tokens: int) -> None:
    with torch.device("meta"):
        pieces = recompute.host_pieces(torch.empty(1, tokens, 3584, dtype=torch.bfloat16), pinned=False)
    assert in_pieces(2 * 3584 * tokens) == sum(pinned(piece.nbytes) for piece in pieces)


@pytest.mark.parametrize(("sharding", "offload"), [("fsdp", "all"), ("zero2", "optimizer"), ("zero3", "none")])
def test_inputs_in_host_memory_are_counted_under_every_sharding(sharding: str, offload: str) -> None:
    """2048 inputs of 3584 elements are 14 MiB, which take 16."""
    shape = shape_of("qwen2.5-7b")
    without, found = (host_bytes(shape, setup(sharding, offload, 2, checkpointing=c)) for c in ("full", "offload"))
    assert found - without == 2 * 28 * 16 * MIB


@pytest.mark.parametrize(("gpus", "mib"), [(2, 13_808), (4, 6_904)])
def test_qwen_7b_in_host_memory_by_hand(gpus: int, mib: int) -> None:
    """A GPU's half: embedding and head 519.75 MiB each, which take 1024; of 28 layers query and output 12.25 (16), key
    and value 1.75 (2), three matrices of the MLP 64.75 (128). Biases and norms: 3584 bytes (4096) and 512. The fp32
    gradient of embedding or head, as it is stepped, is not pinned.
    """
    vectors = (28 * (3 * 4096 + 2 * 512) + 4096) * 2 // gpus
    shape, sharded = shape_of("qwen2.5-7b"), setup("fsdp", "all", gpus)
    weights = mib * MIB + vectors
    unit = whole(shape, sharded)
    assert unit.pinned == unit.trained_pinned == weights
    frequencies = unit.replicated
    each = PROCESS + ((2 + 12) * shape.parameters + 4 * 152_064 * 3584) / gpus + 2 * weights + frequencies
    assert frequencies == 512 and host_bytes(shape, sharded) == pytest.approx(gpus * each, abs=1)


@pytest.mark.parametrize("gpus", [2, 4, 7])
@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3.2-1b", "gemma-2-2b"])
def test_shards_take_what_those_of_transformers_parameters_take_one_by_one(name: str, gpus: int) -> None:
    blocks = [2 * p[: -(-len(p) // gpus)].numel() for p in parameters(name)]
    assert whole(shape_of(name), setup("fsdp", "all", gpus)).pinned == sum(map(pinned, blocks))


def test_what_is_not_pinned_is_not_rounded() -> None:
    shape = shape_of("llama-3.1-8b")
    alone = host_bytes(shape, setup("none", "optimizer", 1))
    assert alone == PROCESS + (2 + 2 + 12) * shape.parameters + 4 * 128_256 * 4096  # the embedding's gradient in fp32
    assert host_bytes(shape, setup("fsdp", "optimizer", 2)) == pytest.approx(alone + PROCESS, abs=4)


def test_70b_under_zero2_by_hand() -> None:
    """A quarter is 17,638,426,624 elements. In fp32 65.7 GiB, which take 128, for weights and gradients; in bf16 32.9,
    which take 64; the embedding 1.96, which takes 2. Moments and the rehearsal's copy take what they are.
    """
    shape = shape_of("llama-3.1-70b")
    each = PROCESS + (2 + 8) * 17_638_426_624 + (128 + 128 + 64 + 2) * GIB
    for sharding in ("zero1", "zero2"):
        assert host_bytes(shape, setup(sharding, "optimizer", 4)) == 4 * each


@pytest.mark.parametrize(("name", "gpus"), [("llama-3.2-1b", 2), ("qwen2.5-7b", 2), ("qwen2.5-7b", 8)])
def test_sub_groups_of_zero3_are_deepspeeds(name: str, gpus: int) -> None:
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
    params = [SimpleNamespace(partition_numel=partial(ceil, p.numel() / gpus)) for p in parameters(name)]
    size = sub_group_size(shape_of(name), setup("zero3", "all", gpus))
    groups = stage3._create_fp16_sub_groups(SimpleNamespace(sub_group_size=size), params)
    real = [sum(p.partition_numel() for p in group) for group in groups]
    found = sub_groups(shape_of(name), setup("zero3", "all", gpus))
    assert sum(found) == sum(real) and len(found) == len(real)
    assert sum(pinned(4 * n) for n in found) == sum(pinned(4 * n) for n in real)


def test_sub_groups_of_a_70b_stay_within_a_power_of_two() -> None:
    """Groups of just over 2^28 elements would be pinned in blocks of 2 GiB, half of each empty."""
    sharded = setup("zero3", "optimizer", 8)
    groups = sub_groups(shape_of("llama-3.1-70b"), sharded)
    assert sub_group_size(shape_of("llama-3.1-70b"), sharded) == 2**28 - 8192 * 28672 // 8
    *layers, last = groups  # with the head
    assert max(layers) <= 2**28 < last and sum(pinned(4 * n) for n in groups) < 1.2 * 4 * sum(groups)
