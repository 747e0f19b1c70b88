"""Sharded memory equals traces of real fully_shard within 0.1%: every kind of unit, 4 to 64 GPUs, no GPU needed."""

from __future__ import annotations

import random
from itertools import product
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loadmaster.models.forward import causal_lm, input_device
from loadmaster.preflight.candidate import FORWARDS, FORWARDS_WHOLE
from loadmaster.preflight.communication import step_traffic
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.memory import worst_micro_batch
from loadmaster.preflight.setup import Setup
from loadmaster.preflight.shards import whole
from loadmaster.preflight.step import evaluation_batch
from loadmaster.training.sharding import codes_without_gradients
from loadmaster.training.trace import Case, _meta_model
from tests.preflight.sharded_trace import micro_batch, sharded_model, sharded_peaks, step_bytes, world_of
from tests.preflight.test_replay import FAMILIES, FOURTH_DIFFERS, random_config

TOLERANCE = 0.001
CASES = [
    Case(512), Case(3000, "full"), Case(3000, "selective"), Case(3000, "offload"), Case(512, "full", accumulated=True),
]


def check(
    family: str, method: str, precision: str, world_sizes: tuple[int, ...], small_vocabulary: bool, tied: bool
) -> None:
    config = random_config(family, 1) | {"tie_word_embeddings": tied}
    if family not in FOURTH_DIFFERS:
        config["num_hidden_layers"] = 3
    if small_vocabulary:
        config["vocab_size"] = 256  # or the loss would be the peak of every case
    shape = from_config(config, family)
    experts = family in ("mixtral", "qwen3_moe")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj") if experts else "all-linear"
    for case, world_size, reshard in product(CASES, world_sizes, (True, False)):
        if not reshard and not small_vocabulary:
            continue  # the loss is the peak, with the same weights gathered or not
        setup = Setup(
            method=method, precision=precision, optimizer="adamw", master_weights=True, sharding="fsdp",
            checkpointing=case.checkpointing, sequence_length=case.tokens, world_size=world_size,
            gradient_accumulation_steps=2 if case.accumulated else 1, lora_targets=targets,
            reshard_after_forward=reshard,
        )
        weights, peak = sharded_peaks(config, method, precision, case, world_size, targets, 1, reshard)
        unit = whole(shape, setup)
        said = f"{config} {case} on {world_size}, resharded {reshard}"
        assert unit.shard + unit.replicated == pytest.approx(weights, rel=0.002), f"weights: {said}"
        worst, gradients = worst_micro_batch(shape, setup, in_place=False)
        replayed = worst.peak + gradients
        # Olmo 3 turns its layers by two sets of cos and sin: one goes with the last layer that it turns, and the plan
        # holds both to the end, a few MiB of any model.
        other = 8 * case.tokens * shape.head_dim * (family == "olmo3")
        off = f"{replayed / peak - 1:+.3%}: {said}"
        assert peak * (1 - TOLERANCE) <= replayed <= peak * (1 + TOLERANCE) + other, off


METHODS = [("full", "bf16"), ("lora", "bf16"), ("lora", "fp8"), ("qlora", "bf16")]


@pytest.mark.parametrize(
    ("method", "precision"), [*METHODS[:2], *(pytest.param(*each, marks=pytest.mark.slow) for each in METHODS[2:])]
)
def test_a_ranks_memory_equals_a_trace_of_fully_shard(method: str, precision: str) -> None:
    check("llama", method, precision, (64,), small_vocabulary=True, tied=False)


def test_a_shard_of_codes_is_a_parameter_without_a_gradient() -> None:
    """As torch 2.11 makes shards: of integers that was an error, when a run on several GPUs began."""
    codes = torch.zeros(4, dtype=torch.uint8)
    with codes_without_gradients():
        assert not nn.Parameter(codes).requires_grad
        assert nn.Parameter(torch.zeros(4)).requires_grad and not nn.Parameter(torch.zeros(4), False).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(codes)


def test_experts_that_do_not_divide_are_padded_as_fully_shard_pads_them() -> None:
    check("mixtral", "full", "bf16", (64,), small_vocabulary=True, tied=True)


def pairs() -> list[tuple[str, str, str]]:
    """Every family with half of the methods, one of them over a base in few bits: what each method does to a family's
    layers on one GPU is with the replay's tests."""
    return [
        (family, *method)
        for number, family in enumerate(FAMILIES)
        for method in (METHODS[(number + 1) % 2], METHODS[2 + number // 2 % 2])
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "precision"), pairs())
def test_every_familys_memory_equals_a_trace_of_fully_shard(family: str, method: str, precision: str) -> None:
    # Every family with one of its methods at each size of vocabulary, every method with half of the families.
    # Each of both with tied tables and with a head of its own.
    number = list(FAMILIES).index(family)
    quantized = (method, precision) in METHODS[2:]
    small_vocabulary, tied = (number // 4 + quantized) % 2 == 0, (number // 8 + quantized) % 2 == 0
    check(family, method, precision, (64,) if small_vocabulary else (4,), small_vocabulary, tied)


def held_to_a_trace(config: dict, method: str, case: Case, world_size: int) -> None:
    targets = ("o_proj",)
    setup = Setup(
        method=method, precision="bf16", optimizer="adamw", master_weights=True, sharding="fsdp",
        checkpointing=case.checkpointing, sequence_length=case.tokens, world_size=world_size, lora_targets=targets,
    )
    _, peak = sharded_peaks(config, method, "bf16", case, world_size, targets)
    replayed = worst_micro_batch(from_config(config, "x"), setup, in_place=False)[0].peak
    assert replayed == pytest.approx(peak, rel=TOLERANCE), f"{replayed / peak - 1:+.3%}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_jobs_drawn_at_random_equal_their_traces(seed: int) -> None:
    """On few GPUs, with heads, vocabularies and feed-forward layers that divide over none of them."""
    draw = random.Random(seed)
    family = draw.choice(["llama", "qwen2", "gemma3_text", "phi3", "qwen3_moe"])
    config = random_config(family, seed)
    config |= {"vocab_size": draw.choice([257, 5003, 32001]), "intermediate_size": draw.choice([777, 1024, 4099])}
    config |= {"mlp_only_layers": draw.choice([[], [0], [1, 2]])} if family == "qwen3_moe" else {}
    config |= {"tie_word_embeddings": draw.random() < 0.3}
    case = Case(draw.choice([16, 512, 1040]), draw.choice(["none", "selective", "full", "offload"]))
    held_to_a_trace(config, draw.choice(["full", "lora", "qlora"]), case, draw.randint(2, 8))


def test_on_few_gpus_the_last_gradient_is_there_whole_until_its_unit_is_reduced() -> None:
    """Of an untied head: over two GPUs what comes out of the reduction is as large as the gradients that went."""
    config = {**random_config("llama", 1), "vocab_size": 32001, "tie_word_embeddings": False}
    held_to_a_trace(config, "full", Case(16, "full"), 2)


def test_a_layer_that_is_gathered_ahead_is_one_with_experts_or_without_as_it_comes() -> None:
    config = random_config("qwen3_moe", 1)
    config |= {"vocab_size": 256, "mlp_only_layers": [0, 1], "intermediate_size": 4096}
    for method, case in (("full", Case(16, "full")), ("lora", Case(512))):
        held_to_a_trace(config, method, case, 4)


@pytest.mark.parametrize(("method", "objective"), [("lora", "dpo"), ("lora", "kto"), ("lora", "orpo"), ("full", "kto")])
def test_preference_tunings_memory_equals_a_trace_of_fully_shard(method: str, objective: str) -> None:
    """What a pass without gradients leaves whole is there in the next one: a head of its own, and kept layers."""
    for checkpointing, vocabulary, tied, reshard, tokens in (
        ("none", 256, True, True, 512), ("full", 32001, False, True, 512), ("none", 5003, False, False, 512),
    ):
        config = {**random_config("llama", 1), "vocab_size": vocabulary, "tie_word_embeddings": tied}
        setup = Setup(
            method=method, precision="bf16", optimizer="adamw", master_weights=True, sharding="fsdp",
            checkpointing=checkpointing, sequence_length=tokens, world_size=8, objective=objective,
            reshard_after_forward=reshard,
        )
        case = Case(tokens, checkpointing, objective=objective)
        _, peak = sharded_peaks(config, method, "bf16", case, 8, reshard_after_forward=reshard)
        replayed = worst_micro_batch(from_config(config, "llama"), setup, in_place=False)[0].peak
        more = 8 * vocabulary  # of a token: the last of each of two documents predicts nothing, the plan leaves out one
        assert peak * (1 - TOLERANCE) <= replayed <= peak * (1 + TOLERANCE) + more, f"{replayed / peak - 1:+.3%}"


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    ("tied", "vocabulary", "tokens"), [(False, 64000, 16), (False, 256, 512), (True, 5003, 512), (True, 64000, 16)]
)
def test_an_evaluations_memory_equals_a_trace_of_fully_shard(reshard, tied, vocabulary, tokens) -> None:
    """The second batch finds whole what the first has left so, and the first gathers it."""
    config = {**random_config("llama", 1), "vocab_size": vocabulary, "tie_word_embeddings": tied}
    setup = Setup(
        method="lora", precision="bf16", optimizer="adamw", master_weights=True, sharding="fsdp",
        sequence_length=tokens, world_size=8, reshard_after_forward=reshard,
    )
    _, peak = sharded_peaks(config, "lora", "bf16", Case(tokens, evaluated=True), 8, reshard_after_forward=reshard)
    replayed = evaluation_batch(from_config(config, "llama"), setup, in_place=False).peak
    assert replayed == pytest.approx(peak, rel=TOLERANCE), f"{replayed / peak - 1:+.3%}"


def test_tokens_go_where_an_embedding_whose_shards_are_in_host_memory_is_gathered() -> None:
    model = _meta_model(random_config("llama", 1))
    with world_of(2) as mesh:
        for device, expected in (("cpu", "cuda"), ("meta", "meta")):
            weight = DTensor.from_local(torch.empty(8, 4, device=device), mesh, run_check=False)
            model.set_input_embeddings(nn.Embedding(8, 4, _weight=weight))
            with mock.patch.object(type(mesh), "device_type", "cuda"):
                assert input_device(model).type == expected


@pytest.mark.parametrize("reshard", [True, False])
def test_an_embedding_of_its_own_stays_whole_while_answers_are_made_and_no_longer(reshard) -> None:
    config = {**random_config("llama", 1), "vocab_size": 256, "tie_word_embeddings": False}
    with world_of(8) as mesh, torch.no_grad():
        engine, root = sharded_model(config, "full", "bf16", Case(16), mesh, "all-linear", reshard)
        lm = causal_lm(root)
        embedding, ids = lm.get_input_embeddings(), torch.zeros(1, 16, dtype=torch.long, device="meta")
        root(micro_batch(Case(16), True))
        assert isinstance(embedding.weight, DTensor) == reshard
        engine.settle(root)
        with engine.generating(root):
            for _ in range(2):
                assert not isinstance(embedding.weight, DTensor)
                embedding(ids)
        assert all(isinstance(weight, DTensor) for weight in root.parameters())
        root(micro_batch(Case(16), True))
        assert isinstance(embedding.weight, DTensor) == reshard


def test_hybrid_sharding_keeps_each_layers_sum_to_the_end() -> None:
    config = {**random_config("llama", 1), "vocab_size": 256, "tie_word_embeddings": False}
    for method in ("full", "lora"):
        setup = Setup(
            method=method, precision="bf16", optimizer="adamw", master_weights=True, sharding="fsdp",
            checkpointing="full", sequence_length=512, world_size=64, replicas=8,
        )
        weights, peak = sharded_peaks(config, method, "bf16", Case(512, "full"), 64, replicas=8)
        shape = from_config(config, "llama")
        assert whole(shape, setup).shard == pytest.approx(weights, rel=0.002)
        assert worst_micro_batch(shape, setup, in_place=False)[0].peak == pytest.approx(peak, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("method", "objective"), [("full", "sft"), ("lora", "sft"), ("lora", "dpo"), ("lora", "kto"), ("full", "kto")]
)
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_bytes_that_a_step_moves_equal_those_of_fully_shard(method, objective, reshard, micro_batches) -> None:
    tied = reshard == (micro_batches == 1)
    config = {**random_config("llama", 1), "vocab_size": 256, "tie_word_embeddings": tied}
    setup = Setup(
        method=method, precision="bf16", optimizer="adamw", master_weights=True, sharding="fsdp",
        checkpointing="full", sequence_length=512, world_size=8, gpus_per_node=8,
        gradient_accumulation_steps=micro_batches, reshard_after_forward=reshard, objective=objective,
        forwards=(FORWARDS_WHOLE if method == "full" else FORWARDS).get(objective, 0),
    )
    case = Case(512, "full", objective=objective)
    gathered, reduced = step_bytes(config, method, case, 8, micro_batches, reshard)
    traffic = step_traffic(from_config(config, "llama"), setup)
    assert (traffic.gathered, traffic.reduced) == pytest.approx((gathered, reduced), rel=0.001)
